from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from faults import crowd, soak
from faults.harness import SETTINGS, computed, run_job
from support import ServerProcess


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    """The short form of `make soak`."""
    report = tmp_path / "report.json"
    command = [sys.executable, soak.__file__, "--minutes", "0.4", "--workers", "1", "--report", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    figures = json.loads(report.read_text())
    assert figures["jobs that came to their end"] >= 5
    assert figures["jobs with a wrong id, choice or score"] == 0


def test_idle_and_training_clients_do_not_disturb_each_other() -> None:
    """The short form of `make crowd`."""
    command = [sys.executable, crowd.__file__, "--seconds", "3", "--idle", "60", "--active", "10"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_what_the_formulas_give_is_what_a_server_gives(server: ServerProcess, name: str) -> None:
    assert run_job(server.address, name) == computed(SETTINGS, 2)
