"""Takes the pictures of the dashboard that the documentation shows. Run as: screenshots.py FOLDER.

Four ranks train on losses as of a model, while earlier experiments have finished, been left, or not begun.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import evosample
from dashboards import CHROMIUM_ARGUMENTS, Job, OpenDashboard

SETTINGS: dict[str, Any] = {"num_samples": 20_000, "meta_batch_size": 256, "mini_batch_size": 64}
PICTURES = {  # path, color scheme, width, height, of the whole page
    "dashboard-overview.png": ("/", "light", 1280, 460, False),
    "dashboard-experiment.png": ("/experiments/reviews-eswp", "light", 1280, 800, True),
    "dashboard-experiment-dark.png": ("/experiments/reviews-eswp", "dark", 1280, 800, True),
    "dashboard-compare.png": ("/compare?a=digits-es&b=digits-eswp", "light", 1280, 800, True),
    "dashboard-phone.png": ("/experiments/reviews-eswp", "light", 390, 1500, False),
    "dashboard-phone-dark.png": ("/", "dark", 390, 844, False),
}


def train_before(client: evosample.Client) -> None:
    """Make the experiments of earlier days."""
    eswp, es = evosample.EvolvedSampling(prune_ratio=0.3), evosample.EvolvedSampling()
    for name, policy in (("digits-es", es), ("digits-eswp", eswp)):
        experiment = client.create_experiment(name, num_epochs=20, policy=policy, **SETTINGS)
        with Job(experiment, pause_s=0) as job:
            job.wait()
    for name in ("captions-full", "speech-es"):
        client.create_experiment(name, num_epochs=30, policy=es, **SETTINGS)


def take(browser: Browser, url: str, folder: Path) -> None:
    for name, (path, scheme, width_px, height_px, is_whole) in PICTURES.items():
        page = browser.new_page(viewport={"width": width_px, "height": height_px}, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(url + path)
        page.wait_for_timeout(12_000)  # for the live curves
        picture = Image.open(io.BytesIO(page.screenshot(full_page=is_whole)))
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(folder / name, optimize=True)
        page.close()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data_dir, sync_playwright() as playwright:
        dashboard = OpenDashboard(Path(data_dir) / "data")
        train_before(dashboard.client)
        policy = evosample.EvolvedSampling(prune_ratio=0.2)
        live = dashboard.client.create_experiment("reviews-eswp", num_epochs=100, policy=policy, **SETTINGS)
        with contextlib.ExitStack() as jobs:
            for rank in range(4):
                run = {
                    "rank": rank,
                    "world_size": 4,
                    "run_id": "monday",
                    "straggler_timeout_s": 1,
                }  # they end one by one
                jobs.enter_context(Job(live, pause_s=0.02 + 0.002 * rank, **run))
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=CHROMIUM_ARGUMENTS,
            )
            take(browser, dashboard.url, folder)
            browser.close()
        dashboard.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
