"""The dashboard in a real browser, Chromium, while a job trains."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

import evosample
from dashboards import CHROMIUM_ARGUMENTS, GuardedDashboard, Job, OpenDashboard
from support import ROOT_TOKEN

SETTINGS: dict[str, Any] = {
    "num_samples": 400,
    "num_epochs": 1000,
    "meta_batch_size": 40,
    "mini_batch_size": 10,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2, annealing=0),
}
PHONE_PX = 390
PLOTS = (
    "Mean loss",
    "Kept, chosen",
    "Scores",
    "Movement of the scores",
    "Coverage and staleness",
    "Loss now",
    "Samples/s",
)


@pytest.fixture(scope="module")  # no longer: it keeps an event loop running, and no other can be started beside it
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH: on Debian, apt install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages, each in a context of its own. They must end without an error in the console, and without having
    asked any other host for anything.
    """
    contexts: list[BrowserContext] = []
    errors: list[str] = []
    requests: list[str] = []

    def open_one(url: str, *, width_px: int = 1280, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width_px, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in requests if not re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:", url)] == []


def plotted(page: Page, title: str) -> list[Any]:
    """The points that a plot shows, those of each of its series."""
    points: list[Any] = page.evaluate(
        """async title => {
            const plot = getElement(document.querySelector(`[aria-label="${title}"]`).id.slice(1));
            while (!plot.chart?.getOption()) await new Promise(resolve => setTimeout(resolve, 20));
            return plot.chart.getOption().series.map(series => series.data);
        }""",
        title,
    )
    return points


def wait_until_all_have_moved(page: Page, titles: tuple[str, ...]) -> None:
    """Return once every one of the plots shows something else than now."""
    before = {title: plotted(page, title) for title in titles}
    for _ in range(200):
        before = {title: points for title, points in before.items() if plotted(page, title) == points}
        if not before:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"these plots have not moved for 20 s: {', '.join(before)}")


LIGHT, DARK = "rgb(244, 245, 247)", "rgb(18, 18, 18)"


def test_signing_in_and_watching_a_live_run(
    guarded: GuardedDashboard, open_page: Callable[..., Page], name: str
) -> None:
    experiment = guarded.client.create_experiment(name, project="red", **SETTINGS)
    page = open_page(f"{guarded.url}/experiments/{name}")
    page.get_by_label("Token").fill(guarded.reader)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.get_by_text("not started")).to_be_visible()
    expect(page.get_by_text("No run has joined yet")).to_be_visible()
    assert plotted(page, "Mean loss") == [[], []]
    with Job(experiment):
        expect(page.get_by_text("training")).to_be_visible()
        for _ in range(2):
            wait_until_all_have_moved(page, PLOTS)
        expect(page.locator(".figure", has_text="saved")).to_contain_text(re.compile(r"[1-9]\d %"))
        expect(page.get_by_text("1 of 1", exact=True)).to_be_visible()
        page.get_by_role("link", name="evosample").click()
        card = page.locator(".cards .nicegui-card", has_text=name)
        expect(card).to_contain_text(re.compile(r"[1-9]\d* of 1,000 epochs"))
        expect(card).to_contain_text(re.compile(r"[1-9][\d,]* samples/s"))
    # what the plots show is what the server tells
    history = experiment.history()
    page.goto(f"{guarded.url}/experiments/{name}")
    mean_losses, _ = plotted(page, "Mean loss")
    assert [point[0] for point in mean_losses] == [past.summary.epoch for past in history]
    assert [point[1] for point in mean_losses] == pytest.approx([past.summary.mean_loss for past in history], rel=1e-3)
    kept, chosen = plotted(page, "Kept, chosen")
    assert (kept[-1][1], chosen[-1][1]) == (80, 20)
    hardest = page.locator(".q-card", has_text="Hardest samples").locator("tbody tr")
    expect(hardest).to_have_count(20)
    expect(hardest.first).to_contain_text(str(history[-1].summary.hardest_ids[0]))

    page.get_by_label("sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    page.goto(guarded.url)
    expect(page.get_by_label("Token")).to_be_visible()


def test_a_page_that_is_open_ends_with_its_token(
    guarded: GuardedDashboard, open_page: Callable[..., Page], name: str
) -> None:
    guarded.client.create_experiment(name, project="red", **SETTINGS)
    token = guarded.server.new_token("reader", "red")
    page = open_page(guarded.url)
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name=name)).to_be_visible()
    guarded.store.kill()
    expect(page.get_by_role("alert")).to_contain_text("can't use its store")
    guarded.store.restart()
    expect(page.get_by_role("alert")).to_be_hidden()
    guarded.server.revoke(token, "red")
    expect(page.get_by_label("Token")).to_be_visible()


def test_a_holder_of_all_projects_switches_between_them(
    guarded: GuardedDashboard, open_page: Callable[..., Page], name: str
) -> None:
    guarded.client.create_experiment(name, project="blue", **SETTINGS)
    page = open_page(guarded.url)
    page.get_by_label("Token").fill(ROOT_TOKEN)
    page.keyboard.press("Enter")
    page.get_by_label("project").fill("blue")
    page.get_by_label("project").press("Enter")
    page.get_by_role("link", name=name).click()
    expect(page).to_have_url(f"{guarded.url}/experiments/{name}?project=blue")
    expect(page.get_by_role("heading", name=name)).to_be_visible()


def test_a_project_typed_before_the_page_has_found_its_server_is_gone_to(
    dashboard: OpenDashboard, open_page: Callable[..., Page]
) -> None:
    page = open_page(dashboard.url)
    page.route_web_socket("**", lambda _: None)  # it connects, and nothing ever comes
    page.reload()
    page.get_by_label("project").fill("blue & red")
    page.get_by_label("project").press("Enter")
    expect(page).to_have_url(f"{dashboard.url}/?project=blue%20%26%20red")


def test_experiments_are_found_by_a_part_of_their_name(
    dashboard: OpenDashboard, open_page: Callable[..., Page], name: str
) -> None:
    for i in range(30):
        dashboard.client.create_experiment(f"{name}-{i:02}", project="many", **SETTINGS)
    page = open_page(f"{dashboard.url}/?project=many")
    cards = page.locator(".cards .nicegui-card")
    expect(cards).to_have_count(24)
    page.get_by_label("search").fill("-29")
    expect(cards).to_have_count(1)
    expect(cards).to_contain_text(f"{name}-29")
    page.get_by_label("search").fill("nothing of the kind")
    expect(page.get_by_text("No experiment's name contains")).to_be_visible()
    dashboard.client.create_experiment("nothing-of-the-kind", project="many", **SETTINGS)
    page.get_by_label("search").fill("nothing-of-the-kind")
    expect(cards).to_have_count(1)
    page.goto(f"{dashboard.url}/?project=none")
    expect(page.get_by_text("There are no experiments in project 'none' yet")).to_be_visible()


def test_two_experiments_lie_over_each_other(
    dashboard: OpenDashboard, open_page: Callable[..., Page], name: str
) -> None:
    for suffix, policy in (("es", evosample.EvolvedSampling()), ("uniform", evosample.Uniform())):
        settings = SETTINGS | {"num_epochs": 4, "policy": policy}
        with Job(dashboard.client.create_experiment(f"{name}-{suffix}", project="pair", **settings)) as job:
            job.wait()
    page = open_page(f"{dashboard.url}/compare?project=pair&a={name}-es")
    expect(page.get_by_text("Choose two experiments")).to_be_visible()
    page.get_by_label("experiment B").click()
    page.get_by_role("option", name=f"{name}-uniform").click()
    expect(page).to_have_url(re.compile(f"b={name}-uniform"))
    expect(page.get_by_text("Uniform")).to_be_visible()
    for title in ("Mean loss", "Mean loss by work", "Chosen", "Covered"):
        assert [len(points) for points in plotted(page, title)] == [4, 4], title
    chosen = [[share for _, share in points] for points in plotted(page, "Chosen")]
    assert chosen == [[100, 25, 25, 100], [100, 100, 100, 100]]


def test_an_experiment_that_is_deleted_is_gone_from_its_page(
    dashboard: OpenDashboard, open_page: Callable[..., Page], name: str
) -> None:
    dashboard.client.create_experiment(name, **SETTINGS)
    page = open_page(f"{dashboard.url}/experiments/{name}")
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    dashboard.client.delete_experiment(name)
    expect(page.get_by_role("alert")).to_contain_text("There is nothing of this name here")
    expect(page.get_by_role("heading", name=name)).to_be_hidden()


def test_dark_and_light_follow_the_system_and_the_switch(
    dashboard: OpenDashboard, open_page: Callable[..., Page]
) -> None:
    for scheme, color in (("light", LIGHT), ("dark", DARK)):
        page = open_page(dashboard.url, color_scheme=scheme)
        expect(page.locator("body")).to_have_css("background-color", color)
    page = open_page(dashboard.url, color_scheme="light")
    page.get_by_label("theme").click()
    expect(page.locator("body")).to_have_css("background-color", DARK)
    page.reload()
    expect(page.locator("body")).to_have_css("background-color", DARK)
    page.get_by_label("theme").click()
    expect(page.locator("body")).to_have_css("background-color", LIGHT)


def test_a_phone_scrolls_down_only(
    dashboard: OpenDashboard, guarded: GuardedDashboard, open_page: Callable[..., Page], name: str
) -> None:
    long_name = f"{name}-" + "x" * 100
    with Job(dashboard.client.create_experiment(long_name, **SETTINGS | {"num_epochs": 3})) as job:
        job.wait()
    for place, heading in {
        "/": "Experiments",
        f"/experiments/{long_name}": long_name,
        f"/compare?a={long_name}&b={long_name}": "Compare",
    }.items():
        page = open_page(dashboard.url + place, width_px=PHONE_PX, has_touch=True, is_mobile=True)
        expect(page.get_by_role("heading", name=heading)).to_be_visible()
        for plot in page.locator(".nicegui-echart canvas").all():
            expect(plot).to_be_attached()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE_PX, place
    page = open_page(guarded.url, width_px=PHONE_PX, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE_PX


def test_open_pages_do_not_hold_up_a_server_that_stops_and_come_back_with_it(browser: Browser, tmp_path: Path) -> None:
    dashboard = OpenDashboard(tmp_path / "data")
    page = browser.new_page()  # its console tells of the connection that it loses
    page.goto(dashboard.url)
    expect(page.get_by_text("There are no experiments")).to_be_visible()
    dashboard.client.create_experiment("first", **SETTINGS)
    expect(page.get_by_role("link", name="first")).to_be_visible()
    assert dashboard.stop() == 0
    dashboard = OpenDashboard(tmp_path / "data", dashboard.url.removeprefix("http://"))
    dashboard.client.create_experiment("second", **SETTINGS)
    expect(page.get_by_role("link", name="second")).to_be_visible(timeout=30_000)
    assert dashboard.stop() == 0
    page.close()
