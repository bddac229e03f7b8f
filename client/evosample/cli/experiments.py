"""Commands for experiments."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from evosample import (
    Client,
    EpochSummary,
    EvosampleError,
    ExperimentStatus,
    Watched,
)
from evosample.cli.options import AsJson, Name, Project, Yes, console, echo_json, print_fields, with_client
from evosample.cli.policies import POLICY_HELP, policy_of
from evosample.figures import (
    RECENT_S,
    Throughput,
    age,
    covered_share,
    merged_epochs,
    number,
    percent,
    progress_share,
    saved_share,
)
from evosample.sampling import ImportanceWeight

app = typer.Typer()
_MAX_SHOWN_RANKS = 32
_MAX_SHOWN_EPOCHS = 8


@app.command("list")
@with_client
def list_experiments(client: Client, project: Project = None, as_json: AsJson = False) -> None:
    """List a project's experiments and where they stand."""
    found = list(client.list_experiments(project=project))
    if as_json:
        echo_json(found)
        return
    console().print(_overview(found))


def _overview(found: Iterable[ExperimentStatus]) -> Table:
    table = Table("name", "state", "epoch", "samples", "ranks", "policy", "saved")
    for status in found:
        spec = status.spec
        epoch = f"{status.epoch} of {spec.num_epochs}"
        row = (status.name, status.state, epoch, f"{spec.num_samples:,}", str(status.world_size or ""))
        table.add_row(*row, str(spec.policy), percent(saved_share(status)))
    return table


@app.command()
@with_client
def show(client: Client, name: Name, project: Project = None, as_json: AsJson = False) -> None:
    """Show all that is known of an experiment."""
    with contextlib.closing(client.get_experiment(name, project=project).watch()) as looks:
        watched = next(looks)
    if as_json:
        echo_json(watched)
        return
    print_fields(_shown(watched.status))


@app.command()
@with_client
def watch(
    client: Client,
    name: Annotated[str | None, typer.Argument(help="The experiment's name. Default: all of the project.")] = None,
    project: Project = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=60)] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch an experiment, or all of a project, live; end it with Ctrl-C. With --json a line for every look."""
    if name is None:
        _follow(_looks(client, project, interval), _overview, as_json)
    else:
        _follow(client.get_experiment(name, project=project).watch(interval_s=interval), _Live(), as_json)


def _follow(looks: Iterator[Any], shown: Callable[[Any], RenderableType], as_json: bool) -> None:
    if as_json:
        for look in looks:
            echo_json(look)
        return
    terminal = console()
    if not terminal.is_terminal:  # Live would be silent until the end
        for look in looks:
            terminal.print(shown(look))
        return
    with Live(console=terminal, auto_refresh=False) as live:
        for look in looks:
            live.update(shown(look), refresh=True)


def _looks(client: Client, project: str | None, interval_s: float) -> Iterator[list[ExperimentStatus]]:
    while True:
        yield list(client.list_experiments(project=project))
        time.sleep(interval_s)


class _Live:
    """What is shown of an experiment, look after look."""

    def __init__(self) -> None:
        self._throughput = Throughput()
        self._epochs: list[EpochSummary] = []

    def __call__(self, watched: Watched) -> Group:
        status, spec = watched.status, watched.status.spec
        self._epochs = merged_epochs(self._epochs, watched)
        done, speed = progress_share(watched), self._throughput.add(time.monotonic(), watched)
        head = Table.grid(padding=(0, 2))
        title = Text(f"{status.project}/{status.name}", style="bold")
        head.add_row(title, status.state, f"epoch {status.epoch} of {spec.num_epochs}")
        head.add_row(ProgressBar(1, done, width=40), f"{done:.1%}", f"{number(speed)} samples/s")
        ranks = Table("rank", "epoch", "step", "mean loss", "last report", title="ranks", title_justify="left")
        for rank in watched.ranks[:_MAX_SHOWN_RANKS]:
            is_late = rank.age_s > RECENT_S and status.state == "open"
            reported = Text(age(rank.age_s), style="yellow" if is_late else "")
            ranks.add_row(str(rank.rank), str(rank.epoch), f"{rank.step:,}", number(rank.mean_loss), reported)
        epochs = Table("epoch", "kept", "chosen", "mean loss", "covered", title="epochs", title_justify="left")
        for summary in self._epochs[-_MAX_SHOWN_EPOCHS:]:
            shares = (rows / spec.num_samples for rows in (summary.num_rows, summary.num_trained))
            covered = percent(covered_share(spec, summary))
            epochs.add_row(str(summary.epoch), *map(percent, shares), number(summary.mean_loss), covered)
        return Group(head, ranks, epochs)


@app.command()
@with_client
def create(
    client: Client,
    name: Name,
    samples: Annotated[int, typer.Option(help="Samples of the dataset.")],
    epochs: Annotated[int, typer.Option(help="Epochs of the whole run.")],
    mini_batch_size: Annotated[
        int | None, typer.Option(help="Samples that a step trains on, over all ranks: your batch size.")
    ] = None,
    meta_batch_size: Annotated[
        int | None,
        typer.Option(help="Samples that a step scores, to draw the mini-batch from them. Default: no step scores."),
    ] = None,
    policy: Annotated[str | None, typer.Option(help=f"{POLICY_HELP} Default: evolved-sampling.")] = None,
    importance_weight: Annotated[ImportanceWeight, typer.Option(help="What multiplies the losses.")] = "none",
    seed: Annotated[int, typer.Option(help="Of all random draws.")] = 0,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Create an experiment, or find the one of this name if it is just so."""
    experiment = client.create_experiment(
        name,
        num_samples=samples,
        num_epochs=epochs,
        mini_batch_size=mini_batch_size,
        meta_batch_size=meta_batch_size,
        policy=None if policy is None else policy_of(policy),
        importance_weight=importance_weight,
        seed=seed,
        project=project,
    )
    status = experiment.status()
    if as_json:
        echo_json(status)
        return
    print_fields(_shown(status))


def _shown(status: ExperimentStatus) -> dict[str, str]:
    spec = status.spec
    missing = sorted(set(range(status.world_size)) - set(status.finished_ranks))
    shown = {
        "experiment": f"{status.project}/{status.name}",
        "uid": status.uid,
        "created": f"{status.create_time:%Y-%m-%d %H:%M:%S} UTC",
        "state": status.state,
        "epoch": f"{status.epoch} of {spec.num_epochs}",
        "samples": f"{spec.num_samples:,}",
        "meta-batch, mini-batch": f"{spec.meta_batch_size:,}, {spec.mini_batch_size:,}",
        "policy": str(spec.policy),
        "importance weight": spec.importance_weight,
        "seed": str(spec.seed),
        "run": f"{status.generation}, with {status.world_size} ranks" if status.generation else "none yet",
        "losses": f"{status.visited_rows:,} learned from, {status.non_finite_rows:,} not finite, "
        f"{status.unreported_rows:,} not reported",
    }
    if status.state == "open" and status.generation:
        shown["ranks still in this epoch"] = _listed(missing)
    shown["can go back to epochs"] = ", ".join(map(str, status.retained_epochs))
    if status.pins:
        shown["pins"] = ", ".join(f"{pin}: epoch {epoch}" for pin, epoch in status.pins.items())
    return shown


@app.command()
@with_client
def finish_epoch(
    client: Client,
    name: Name,
    project: Project = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """End the current epoch without the ranks that have yet to finish it. What they have reported counts."""
    experiment = client.get_experiment(name, project=project)
    status = experiment.status()
    if status.state == "finished":
        raise EvosampleError(f"{status.project}/{name} has finished: there is no epoch to end")
    missing = sorted(set(range(status.world_size)) - set(status.finished_ranks))
    if not yes:
        question = f"End epoch {status.epoch} of {status.project}/{name} without the ranks {_listed(missing)}?"
        typer.confirm(question, abort=True, err=True)
    skipped = experiment.force_finish(status.epoch)
    if as_json:
        echo_json({"epoch": status.epoch, "skipped_ranks": skipped})
        return
    typer.echo(f"epoch {status.epoch} of {status.project}/{name} has ended without the ranks {_listed(skipped)}")


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks)) or "(none is missing)"


@app.command()
@with_client
def delete(
    client: Client,
    name: Name,
    project: Project = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete an experiment with its scores."""
    found = client.get_experiment(name, project=project)  # before the question: there may be nothing to delete
    if not yes:
        typer.confirm(f"Delete experiment {found.project}/{name} with all its scores?", abort=True, err=True)
    client.delete_experiment(name, project=found.project)
    if as_json:
        echo_json({"project": found.project, "name": name, "uid": found.uid})
        return
    typer.echo(f"deleted {found.project}/{name}")
