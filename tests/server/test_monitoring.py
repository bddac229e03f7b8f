"""Alerts and the dashboard ask for metrics that there are, and a real Prometheus answers; the manual knows them all."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import evosample
from evosample_server.metrics import Metrics
from support import ServerProcess, fixed_losses, metrics_address, train

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docker/prometheus/alerts.yaml"
DASHBOARD = ROOT / "docker/grafana/dashboards/evosample.json"
MANUAL = ROOT / "docs/monitoring.md"
METRIC = re.compile(r"\b(?:evosample|process)_[a-z_]+")
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panel_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def metric_names() -> set[str]:
    metrics = Metrics(max_experiments=1, max_streams=1, max_project_streams=1)
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, [""])}


@pytest.mark.parametrize("expressions", [[rule["expr"] for rule in rules()], panel_expressions()])
def test_what_is_asked_for_is_there(expressions: list[str]) -> None:
    asked = {name for expression in expressions for name in METRIC.findall(expression)}
    assert len(asked) > 5
    assert asked <= metric_names()


def test_the_manual_explains_every_metric_and_alert_and_no_others() -> None:
    told = set(re.findall("`([A-Za-z_]+)`", MANUAL.read_text()))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in metric_names()}
    assert {name for name in told if METRIC.fullmatch(name)} <= families
    assert {name for name in families if name.startswith("evosample")} <= told
    assert {name for name in told if name.startswith("Evosample")} == {rule["alert"] for rule in rules()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
@pytest.mark.parametrize("command", [("check", "rules", ALERTS), ("test", "rules", ALERTS.parent / "alerts_test.yaml")])
def test_alerts_pass_promtool(command: tuple[str, str, Path]) -> None:
    ended = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((ALERTS.parent / "alerts_test.yaml").read_text())["tests"]
    for of_one in tests[:2]:  # what follows looks at single cases
        tested = [case["alertname"] for case in of_one["alert_rule_test"]]
        assert tested == [rule["alert"] for rule in rules()]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Callable[[str], Any]]:
    """A Prometheus with our alerts that looks at one server; yields what asks its API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "evosample", "static_configs": [{"targets": [target]}]}],
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log)

    def ask(path: str) -> Any:
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}/api/v1/{path}", timeout=20) as response:
                    return json.load(response)["data"]
            except urllib.error.HTTPError as error:
                if error.code != 503:  # it has yet to start
                    raise AssertionError(error.read().decode()) from error
            except urllib.error.URLError:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
            time.sleep(0.1)

    try:
        yield ask
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
def test_a_real_prometheus_answers_every_question(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start_server("--metrics", "127.0.0.1:0", "--log-format", "json")
    expressions = [expr.replace("$__rate_interval", "1m").replace("$instance", ".*") for expr in panel_expressions()]
    expressions += [re.sub(r" (==|<|>) (?=[\d.])", r" \1 bool ", rule["expr"]) for rule in rules()]
    stopping = threading.Event()

    def job() -> None:
        losses = fixed_losses(400, 4)
        losses[:, :5] = np.nan
        with evosample.connect(server.address) as client:
            number = 0
            while not stopping.is_set():
                experiment = client.create_experiment(
                    f"e{number}", num_samples=400, num_epochs=4, meta_batch_size=40, mini_batch_size=10
                )
                train(experiment, losses)
                number += 1
                stopping.wait(0.2)

    training = threading.Thread(target=job)
    training.start()
    try:
        with prometheus(tmp_path, metrics_address(server)) as ask:
            for expression in expressions:
                deadline_s = time.monotonic() + 60
                while not ask(f"query?query={urllib.parse.quote(expression)}")["result"]:
                    assert time.monotonic() < deadline_s, f"no data for {expression}"
                    time.sleep(0.2)
            (group,) = ask("rules")["groups"]
            assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}  # unknown: not evaluated yet
    finally:
        stopping.set()
        training.join()
