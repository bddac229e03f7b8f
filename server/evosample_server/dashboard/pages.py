"""The pages: NiceGUI elements, and how they follow what they show."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar
from urllib.parse import quote

from nicegui import ui
from starlette.requests import Request

from evosample.errors import NotFoundError
from evosample.figures import (
    RECENT_S,
    Throughput,
    activity,
    age,
    covered_share,
    differing_settings,
    mean_recent_loss,
    num_recent_ranks,
    number,
    percent,
    progress_share,
    saved_share,
)
from evosample.sampling import EpochSummary, ExperimentSpec
from evosample.wire import RankProgress, Watched
from evosample_server.dashboard import plots
from evosample_server.dashboard.sessions import Sessions
from evosample_server.dashboard.visit import Followed, SignedOut, Visit
from evosample_server.experiments import Experiments
from evosample_server.status import to_domain

_CARDS_A_PAGE = 24
_MAX_SHOWN_RANKS = 100
_MAX_LIVE_POINTS = 600
_MAX_LEGEND_CHARACTERS = 24
_THEME_COOKIE = "evosample_theme"
_THEMES: dict[str, tuple[bool | None, str]] = {
    "auto": (None, "brightness_auto"),
    "dark": (True, "dark_mode"),
    "light": (False, "light_mode"),
}
_ACTIVITY_COLORS = {
    "training": "positive",
    "silent": "orange-9",
    "not started": "grey-7",
    "planning": "primary",
    "finished": "primary",
}

_CSS = """
body.body--light { background: #f4f5f7; }
.nicegui-content { width: 100%; max-width: 90rem; margin: 0 auto; padding: 1rem; box-sizing: border-box; }
.nicegui-content > * { max-width: 100%; }
.nicegui-header { align-items: center; padding: .4rem 1rem; gap: .5rem; background: #0b6ca0; }
.nicegui-header a { color: #fff; font-size: 1.2rem; font-weight: 600; text-decoration: none; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; width: 100%; }
.grow { flex: 1 1 16rem; min-width: 0; }
h1 { font-size: 1.5rem; line-height: 1.3; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; line-height: 1.4; font-weight: 600; margin: 0; }
.cards, .plots, .figures { display: grid; width: 100%; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.plots > :last-child:nth-child(odd) { grid-column: 1 / -1; }
.figures { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .5rem; }
.figure { padding: .5rem .75rem; gap: 0; }
.figure .value { font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.nicegui-card { min-width: 0; width: 100%; }
.plots .nicegui-card { gap: .25rem; padding: .75rem; }
.nicegui-echart { width: 100%; height: auto; min-height: 17rem; flex-grow: 1; }
.muted { opacity: .7; font-size: .85rem; }
.name { font-weight: 600; overflow-wrap: anywhere; min-width: 0; flex: 1; }
.pairs { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; width: 100%; font-variant-numeric: tabular-nums; }
.problem { width: 100%; padding: .6rem .9rem; border-radius: 6px; background: #b3380b; color: #fff; }
.empty { width: 100%; padding: 2rem 1rem; text-align: center; opacity: .8; }
.pairs > :nth-child(even) { text-align: right; }
body.body--light main a { color: #0b6ca0; }
body.body--dark main a { color: #7cc0e6; }
.q-table__container { width: 100%; }
.q-table__middle { max-height: 17rem; }
.q-table thead tr th { position: sticky; top: 0; z-index: 1; background: #fff; }
body.body--dark .q-table thead tr th { background: #1d1d1d; }
"""


def add_pages(experiments: Experiments, sessions: Sessions) -> None:
    """Add the pages to NiceGUI's app."""

    @ui.page("/", response_timeout=30)
    async def overview(request: Request, project: str = "") -> None:
        await _Overview(Visit(experiments, sessions, request, project), request).open()

    @ui.page("/experiments/{name}", response_timeout=30)
    async def experiment(request: Request, name: str, project: str = "") -> None:
        await _ExperimentPage(Visit(experiments, sessions, request, project), request, name).open()

    @ui.page("/compare", response_timeout=30)
    async def compare(request: Request, a: str = "", b: str = "", project: str = "") -> None:
        await _Comparison(Visit(experiments, sessions, request, project), request, a, b).open()


class _Page(ABC):
    """A page that is brought up to date again and again, for as long as its visitor may see it."""

    INTERVAL_S: ClassVar[float] = 1.0

    def __init__(self, visit: Visit, request: Request) -> None:
        self.visit = visit
        self._place = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        theme = request.cookies.get(_THEME_COOKIE, "")
        self._theme = theme if theme in _THEMES else "auto"
        self._timer: ui.timer | None = None

    @abstractmethod
    def build(self) -> None:
        """Make the elements, still without figures."""

    @abstractmethod
    async def update(self) -> None:
        """Bring the elements up to date."""

    async def open(self) -> None:
        """Build the page and start to follow."""
        ui.add_css(_CSS)
        ui.colors(primary="#0b6ca0", positive="#1a7f4b")
        header = ui.header()
        self._problem = ui.label().classes("problem").props("role=alert")
        self._problem.visible = False
        self._content = ui.column().style("width: 100%")
        if await self._succeeds(self.visit.check):
            with self._content:
                self.build()
            if await self._succeeds(self.update):
                self._timer = ui.timer(self.INTERVAL_S, self.refresh, immediate=False)
        with header:
            self._fill_header()

    async def refresh(self) -> None:
        """Bring the page up to date, or say why that can't be."""
        await self._succeeds(self.update)

    async def _succeeds(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Whether it makes sense to go on: what went wrong is shown."""
        problem = ""
        may_pass = True
        try:
            await step()
        except SignedOut:
            may_pass = False
            ui.navigate.to(f"/sign-in?next={quote(self._place, safe='')}")
        except NotFoundError:
            problem, may_pass = "There is nothing of this name here, or not any more.", False
            ui.context.client.status_code = 404
            self._content.visible = False
        except Exception as error:  # noqa: BLE001  # the boundary: whatever it is, the visitor is told
            problem = str(to_domain(error))
        self._problem.text = problem
        self._problem.visible = bool(problem)
        if not may_pass and self._timer is not None:
            self._timer.deactivate()
        return may_pass

    def _fill_header(self) -> None:
        ui.link("evosample", self.visit.link("/"))
        ui.space()
        if self.visit.may_switch:
            # In the browser: before the page has found its server, events may overtake each other on their way to it.
            go = "(event) => { window.location.href = '/?project=' + encodeURIComponent(event.target.value) }"
            ui.input("project", value=self.visit.project).props("dense dark standout").style("width: 8.5rem").on(
                "keydown.enter", js_handler=go
            )
        else:
            ui.label(self.visit.project)
        is_dark, icon = _THEMES[self._theme]
        dark = ui.dark_mode(is_dark)

        def switch_theme() -> None:
            names = list(_THEMES)
            self._theme = names[(names.index(self._theme) + 1) % len(names)]
            dark.value, icon = _THEMES[self._theme]
            button.props(f"icon={icon}")
            cookie = f"{_THEME_COOKIE}={self._theme}; path=/; max-age=31536000; samesite=strict"
            ui.run_javascript(f"document.cookie = '{cookie}'")

        button = ui.button(icon=icon, on_click=switch_theme).props('flat round dense color=white aria-label="theme"')
        button.tooltip("theme: like the system's, dark, light")
        if self.visit.can_sign_out:
            out = ui.button(icon="logout", on_click=self._sign_out)
            out.props('flat round dense color=white aria-label="sign out"').tooltip("sign out")

    def _sign_out(self) -> None:
        self.visit.sign_out()
        ui.navigate.to("/sign-in")


class _Overview(_Page):
    """The experiments of a project."""

    INTERVAL_S = 2.0

    def __init__(self, visit: Visit, request: Request) -> None:
        super().__init__(visit, request)
        self._cards: dict[str, _ExperimentCard] = {}

    def build(self) -> None:
        with ui.element("div").classes("bar"):
            _heading(1, "Experiments")
            self._count = ui.label().classes("muted")
            ui.space()
            self._search = ui.input("search", on_change=self.refresh).props("dense outlined clearable debounce=300")
            self._search.style("flex: 1 1 12rem; max-width: 20rem")
            ui.link("compare two", self.visit.link("/compare"))
        self._empty = ui.label().classes("empty")
        self._grid = ui.element("div").classes("cards")
        self._pages = ui.pagination(1, 1, on_change=self.refresh).props("max-pages=5")

    async def update(self) -> None:
        names = await self.visit.names()
        wanted = (self._search.value or "").strip().lower()
        found = [name for name in names if wanted in name.lower()]
        self._pages.max = -(-len(found) // _CARDS_A_PAGE) or 1
        self._pages.visible = self._pages.max > 1
        first = _CARDS_A_PAGE * (min(self._pages.value or 1, self._pages.max) - 1)
        all_watched = await self.visit.watch_all(found[first : first + _CARDS_A_PAGE])
        self._count.text = f"{len(found):,} of {len(names):,}" if wanted else f"{len(names):,}"
        self._empty.visible = not all_watched
        self._empty.text = (
            f"No experiment's name contains {wanted!r}."
            if names
            else f"There are no experiments in project {self.visit.project!r} yet. "
            "Make one with client.create_experiment(...): see the README."
        )
        if list(all_watched) != list(self._cards):
            self._grid.clear()
            with self._grid:
                self._cards = {name: _ExperimentCard(name, self.visit) for name in all_watched}
        for name, watched in all_watched.items():
            self._cards[name].show(watched)


class _ExperimentCard:
    """One of the experiments of an overview."""

    def __init__(self, name: str, visit: Visit) -> None:
        self._throughput = Throughput()
        with ui.card().style("gap: .5rem"):
            with ui.element("div").classes("bar").style("flex-wrap: nowrap"):
                ui.link(name, visit.link(f"/experiments/{name}")).classes("name")
                self._state = ui.badge()
            self._progress = ui.linear_progress(0, show_value=False, size="8px").props("rounded")
            with ui.element("div").classes("pairs"):
                self._epochs, self._saved, self._ranks, self._speed = (ui.label() for _ in range(4))

    def show(self, watched: Watched) -> None:
        """Show an experiment's figures."""
        status = watched.status
        _show_activity(self._state, watched)
        self._progress.value = round(progress_share(watched), 4)
        self._epochs.text = f"{status.epoch:,} of {_counted(status.spec.num_epochs, 'epoch')}"
        saved = saved_share(status)
        self._saved.text = "" if saved is None else f"{percent(saved)} saved"
        speed = self._throughput.add(time.monotonic(), watched)
        is_running = bool(status.generation) and status.state != "finished"
        self._ranks.text = _ranks_seen(watched) if is_running else ""
        self._speed.text = f"{number(speed)} samples/s" if is_running else ""


class _ExperimentPage(_Page):
    """All about one experiment."""

    def __init__(self, visit: Visit, request: Request, name: str) -> None:
        super().__init__(visit, request)
        self._followed = Followed(visit, name)
        self._throughput = Throughput()
        self._speeds: list[tuple[float, float | None]] = []
        self._losses: list[tuple[float, float | None]] = []
        self._shown_epochs: list[EpochSummary] | None = None

    def build(self) -> None:
        name = self._followed.name
        with ui.element("div").classes("bar"):
            _heading(1, name)
            self._state = ui.badge()
            ui.space()
            ui.link("compare with another", self.visit.link("/compare", a=name))
        self._progress = ui.linear_progress(0, show_value=False, size="8px").props("rounded")
        self._note = ui.label().classes("muted")
        with ui.element("div").classes("figures"):
            self._figures = {
                label: _figure(label)
                for label in ("epochs", "ranks seen", "samples/s", "mean loss", "kept", "chosen", "saved", "covered")
            }
        with ui.element("div").classes("plots"):
            self._plots = {
                title: _plot(title, explanation)
                for title, explanation in {
                    "Mean loss": "Of the samples that each epoch visited; and the mean score of all samples.",
                    "Kept, chosen": "Samples that each epoch visited, and those that it back-propagated, in % of all.",
                    "Scores": "Of all samples, after the latest epoch; without the thousandths at either end.",
                    "Movement of the scores": "How many samples have which score, epoch by epoch.",
                    "Coverage and staleness": "How many epochs ago the samples had their latest loss.",
                    "Loss now": "Mean loss of the ranks' latest reports, since this page was opened.",
                    "Samples/s": "Visited by all ranks, since this page was opened.",
                }.items()
            }
            with ui.card():
                _heading(2, "Ranks")
                self._ranks_note = ui.label().classes("muted")
                columns = {"rank": "left", "epoch": "right", "step": "right", "mean loss": "right", "reported": "right"}
                self._ranks = _table(columns)
            with ui.card():
                _heading(2, "Hardest samples")
                ui.label("Those of the highest scores after the latest epoch.").classes("muted")
                self._hardest = _table({"sample id": "left", "score": "right"})

    async def update(self) -> None:
        watched = await self._followed.read()
        status, spec, epochs = watched.status, watched.status.spec, self._followed.epochs
        latest = epochs[-1] if epochs else None
        speed, loss = self._throughput.add(time.monotonic(), watched), mean_recent_loss(watched)
        now_ms = round(1000 * time.time())
        _append(self._speeds, (now_ms, speed))
        _append(self._losses, (now_ms, loss))

        _show_activity(self._state, watched)
        self._progress.value = round(progress_share(watched), 4)
        self._note.text = _note(watched)
        self._note.visible = bool(self._note.text)
        figures = {
            "epochs": f"{status.epoch:,} of {spec.num_epochs:,}",
            "ranks seen": f"{num_recent_ranks(watched)} of {status.world_size}" if status.generation else "-",
            "samples/s": number(speed),
            "mean loss": number(loss),
            "kept": percent(latest.num_rows / spec.num_samples if latest else None),
            "chosen": percent(latest.num_trained / spec.num_samples if latest else None),
            "saved": percent(saved_share(status)),
            "covered": percent(covered_share(spec, latest) if latest else None),
        }
        for label, value in figures.items():
            self._figures[label].text = value

        if epochs is not self._shown_epochs:
            self._shown_epochs = epochs
            self._show_epochs(spec, epochs)
        for title, points, unit in (("Loss now", self._losses, "loss"), ("Samples/s", self._speeds, "samples/s")):
            named = {unit: points if any(value is not None for _, value in points) else []}
            self._show(title, plots.curves(named, x="", y=unit, is_time=True, empty="once ranks report"))
        self._show_ranks(watched)

    def _show_epochs(self, spec: ExperimentSpec, epochs: list[EpochSummary]) -> None:
        latest = epochs[-1:]
        self._show("Mean loss", plots.losses(epochs))
        self._show("Kept, chosen", plots.shares(spec, epochs))
        self._show("Scores", plots.histograms({f"after epoch {summary.epoch}": summary for summary in latest}))
        self._show("Movement of the scores", plots.heat_map(epochs))
        self._show("Coverage and staleness", plots.staleness(spec, epochs))
        hardest = [
            {"sample id": f"{sample_id:,}", "score": number(score)}
            for summary in latest
            for sample_id, score in zip(summary.hardest_ids.tolist(), summary.hardest_scores.tolist(), strict=True)
        ]
        _show_rows(self._hardest, hardest)

    def _show(self, title: str, options: plots.Options) -> None:
        _show_plot(self._plots[title], options)

    def _show_ranks(self, watched: Watched) -> None:
        ranks = watched.ranks
        if len(ranks) > _MAX_SHOWN_RANKS:
            ranks = tuple(sorted(ranks, key=lambda rank: (rank.epoch, rank.step))[:_MAX_SHOWN_RANKS])
            self._ranks_note.text = f"The {_MAX_SHOWN_RANKS} that are furthest behind, of {len(watched.ranks):,}."
        else:
            self._ranks_note.text = "Of the latest run, those that have reported losses."
        _show_rows(self._ranks, [_rank_row(rank, watched) for rank in ranks])


class _Comparison(_Page):
    """Two experiments over each other."""

    INTERVAL_S = 2.0

    def __init__(self, visit: Visit, request: Request, a: str, b: str) -> None:
        super().__init__(visit, request)
        self._names = {"a": a, "b": b}
        self._followed = [Followed(visit, name) for name in (a, b) if name]

    def build(self) -> None:
        with ui.element("div").classes("bar"):
            _heading(1, "Compare")
            ui.space()
            self._selects = {
                side: ui.select([name] if name else [], value=name or None, label=f"experiment {side.upper()}")
                for side, name in self._names.items()
            }
            for select in self._selects.values():
                select.props('dense outlined options-dense use-input fill-input hide-selected input-debounce="0"')
                select.classes("grow").style("max-width: 20rem")
                select.on_value_change(self._go)
        self._empty = ui.label("Choose two experiments of the project.").classes("empty")
        self._differences_card = ui.card()
        with self._differences_card:
            _heading(2, "What differs")
            columns = {"": "left", **{f"{side.upper()}": "left" for side in self._names}}
            self._differences = _table(columns)
        self._grid = ui.element("div").classes("plots")
        with self._grid:
            self._plots = {
                title: _plot(title, explanation)
                for title, explanation in {
                    "Mean loss": "Of the samples that each epoch visited.",
                    "Mean loss by work": "The same, over the samples back-propagated so far: lower and further left is "
                    "better.",
                    "Chosen": "Samples that each epoch back-propagated, in % of all.",
                    "Covered": "Samples that have had a loss so far, in % of all.",
                    "Scores": "Of all samples, after the latest epoch of each.",
                }.items()
            }

    def _go(self) -> None:
        chosen = {side: str(select.value) for side, select in self._selects.items() if select.value}
        ui.navigate.to(self.visit.link("/compare", **chosen))

    async def update(self) -> None:
        names = await self.visit.names()
        for select in self._selects.values():
            if select.options != names:
                select.set_options(names)
        both = [(followed, await followed.read()) for followed in self._followed]
        is_complete = len(both) == 2
        self._empty.visible = not is_complete
        self._grid.visible = self._differences_card.visible = is_complete
        if not is_complete:
            return
        (one, one_watched), (other, other_watched) = both
        sides = {f"A: {_shortened(one.name)}": one, f"B: {_shortened(other.name)}": other}
        specs = [one_watched.status.spec, other_watched.status.spec]

        def curves(curve: Callable[..., plots.Curve], *, needs_spec: bool = True, **look: Any) -> plots.Options:
            pairs = zip(sides.items(), specs, strict=True)
            return plots.curves(
                {name: curve(spec, f.epochs) if needs_spec else curve(f.epochs) for (name, f), spec in pairs}, **look
            )

        shown = {
            "Mean loss": curves(plots.loss_curve, needs_spec=False, y="loss"),
            "Mean loss by work": curves(plots.loss_by_work, needs_spec=False, x="samples back-propagated", y="loss"),
            "Chosen": curves(plots.chosen_curve, y="%", is_share=True),
            "Covered": curves(plots.covered_curve, y="%", is_share=True),
            "Scores": plots.histograms({name: f.epochs[-1] for name, f in sides.items() if f.epochs}),
        }
        for title, options in shown.items():
            _show_plot(self._plots[title], options)
        rows = {
            "state": (activity(one_watched), activity(other_watched)),
            "epochs done": tuple(f"{w.status.epoch:,}" for w in (one_watched, other_watched)),
            "saved": tuple(percent(saved_share(w.status)) for w in (one_watched, other_watched)),
            **differing_settings(*specs),
        }
        _show_rows(self._differences, [{"": name, "A": a, "B": b} for name, (a, b) in rows.items()])


# Elements


def _heading(level: int, text: str) -> None:
    with ui.element(f"h{level}"):
        ui.label(text)


def _figure(label: str) -> ui.label:
    with ui.card().classes("figure"):
        ui.label(label).classes("muted")
        return ui.label("-").classes("value")


def _plot(title: str, explanation: str) -> ui.echart:
    with ui.card():
        _heading(2, title)
        ui.label(explanation).classes("muted")
        return ui.echart({}).props(f'role=img aria-label="{title}"')


def _show_plot(plot: ui.echart, options: plots.Options) -> None:
    """Send the options to the browser if they are others than before."""
    if plot.options != options:
        plot.options.clear()
        plot.options.update(options)
        plot.update()


def _table(alignments: Mapping[str, str]) -> ui.table:
    columns = [
        {"name": name, "label": name, "field": name, "align": alignment} for name, alignment in alignments.items()
    ]
    return ui.table(columns=columns, rows=[], row_key=next(iter(alignments))).props("dense flat hide-no-data")


def _show_rows(table: ui.table, rows: list[dict[str, str]]) -> None:
    if table.rows != rows:
        table.rows = rows


def _show_activity(badge: ui.badge, watched: Watched) -> None:
    doing = activity(watched)
    badge.text = doing
    badge.props(f"color={_ACTIVITY_COLORS[doing]}")


def _append(points: list[tuple[float, float | None]], point: tuple[float, float | None]) -> None:
    """Add a point; of many, every second is left out."""
    points.append(point)
    if len(points) > _MAX_LIVE_POINTS:
        del points[1::2]


# Words


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _shortened(name: str) -> str:
    return (
        name if len(name) <= _MAX_LEGEND_CHARACTERS else name[: _MAX_LEGEND_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )


def _ranks_seen(watched: Watched) -> str:
    return f"{num_recent_ranks(watched)} of {_counted(watched.status.world_size, 'rank')}"


def _note(watched: Watched) -> str:
    status = watched.status
    lost = [
        f"{_counted(count, 'loss' if count == 1 else 'losse')} {what}"
        for count, what in ((status.non_finite_rows, "not finite"), (status.unreported_rows, "never reported"))
        if count
    ]
    match activity(watched):
        case "not started":
            return "No run has joined yet: for epoch in experiment.epochs(): ... begins one."
        case "silent":
            return "; ".join([f"no rank has reported for {RECENT_S:.0f} s", *lost])
        case _:
            return "; ".join(lost)


def _rank_row(rank: RankProgress, watched: Watched) -> dict[str, str]:
    status = watched.status
    num_steps = status.num_steps if rank.epoch == status.epoch else status.spec.shape(rank.epoch).num_steps
    return {
        "rank": str(rank.rank),
        "epoch": f"{rank.epoch:,}",
        "step": f"{rank.step:,} of {num_steps:,}",
        "mean loss": number(rank.mean_loss),
        "reported": age(rank.age_s),
    }
