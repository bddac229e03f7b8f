"""Holds 200 idle and 50 training clients on one guarded server for a minute: TLS, tokens, one connection each.

    python tests/faults/crowd.py --seconds 60

Every job's ids, choices and scores must be those that the formulas give, nobody may lose a connection or log a warning,
and the server's memory must stay flat. Prints a table, and ends with code 1 if anything of that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for running it as a script

import evosample
from faults.harness import SETTINGS, computed, outcome
from faults.soak import growth, rss_bytes
from support import Guarded, fixed_losses, log_lines, train

CLIENTS_A_WORKER = 10
PACE_S = 0.05
SAMPLE_INTERVAL_S = 0.5
MIN_SECONDS_FOR_MEMORY = 60.0
MAX_GROWTH = 1.10


def work(address: str, ca: str, number: int, seconds: float) -> None:
    """One process with ten training clients: a line of JSON on standard output for every job."""
    deadline_s = time.monotonic() + seconds
    expected = computed(SETTINGS, 1)
    losses = fixed_losses(SETTINGS["num_samples"], SETTINGS["num_epochs"])
    printing = threading.Lock()

    def loop(member: int) -> None:
        job = 0
        with evosample.connect(address, tls=evosample.Tls(ca=ca)) as client:
            while time.monotonic() < deadline_s:
                experiment = client.create_experiment(f"worker{number}-client{member}-job{job}", **SETTINGS)
                visits = train(experiment, losses, before_step=lambda _: time.sleep(PACE_S))
                is_right = outcome(experiment, [visit.key() for visit in visits]) == expected
                client.delete_experiment(experiment.name)
                with printing:
                    print(json.dumps(is_right), flush=True)
                job += 1

    with ThreadPoolExecutor(CLIENTS_A_WORKER) as clients:
        list(clients.map(loop, range(CLIENTS_A_WORKER)))


def num_connections(address: str) -> int:
    """Connections that are open to a port of this machine."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    tables = [Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6")]  # gRPC takes one of the latter
    rows = (line.split() for table in tables for line in table.splitlines()[1:])
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


def main() -> int:
    """Run, print, and return the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--idle", type=int, default=200, help="clients that are connected and do nothing")
    arguments.add_argument("--active", type=int, default=50, help="clients that train, ten a process")
    arguments.add_argument("--worker", nargs=3, help=argparse.SUPPRESS, metavar=("ADDRESS", "CA", "NUMBER"))
    options = arguments.parse_args()
    if options.worker:
        address, ca, number = options.worker
        work(address, ca, int(number), options.seconds)
        return 0
    with tempfile.TemporaryDirectory(prefix="crowd-") as name, ExitStack() as stack:
        folder = Path(name)
        server = Guarded(folder, "--log-format", "json", has_tls=True)
        stack.callback(server.stop)
        os.environ["EVOSAMPLE_TOKEN_FILE"] = str(folder / "root-token")
        idle = [stack.enter_context(evosample.connect(server.address, tls=server.tls)) for _ in range(options.idle)]
        for client in idle:
            list(client.list_experiments())
        command = [
            sys.executable,
            __file__,
            "--seconds",
            str(options.seconds),
            "--worker",
            server.address,
            str(server.ca),
        ]
        workers = []
        for number in range(options.active // CLIENTS_A_WORKER):
            log = stack.enter_context((folder / f"worker{number}.log").open("w"))
            workers.append(subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=log, text=True))
            stack.callback(workers[-1].kill)
        connections, memory = [], []
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(f"{options.idle} idle and {options.active} training", total=options.seconds)
            began_s = time.monotonic()
            while (passed_s := time.monotonic() - began_s) < options.seconds:
                time.sleep(SAMPLE_INTERVAL_S)
                progress.update(task, completed=passed_s)
                connections.append(num_connections(server.address))
                memory.append(rss_bytes(server.process.pid))
        jobs = [json.loads(line) for worker in workers for line in (worker.communicate()[0] or "").splitlines()]
        warnings = [(folder / f"worker{number}.log").read_text() for number in range(len(workers))]
        warnings += [str(line) for line in log_lines(server) if line["level"] not in ("debug", "info")]
        num_before = num_connections(server.address)
        for client in idle:
            list(client.list_experiments())
        figures: dict[str, Any] = {
            "seconds": options.seconds,
            "jobs that came to their end": len(jobs),
            "jobs with a wrong id, choice or score": jobs.count(False),
            "worker processes that failed": sum(worker.returncode != 0 for worker in workers),
            "warnings of server and clients": sum(map(bool, warnings)),
            "connections at most": max(connections),
            "idle clients that had to connect anew": options.idle - num_before,
            "memory of the server, MB": round(memory[-1] / 1e6),
            "memory of the server, last quarter / second": round(growth(memory), 3),
        }
    table = Table("figure", "value")
    for what, value in figures.items():
        table.add_row(what, str(value))
    Console().print(table)
    for warning in filter(None, warnings):
        Console(stderr=True).print(warning[-3000:], markup=False)
    is_flat = options.seconds < MIN_SECONDS_FOR_MEMORY or growth(memory) < MAX_GROWTH
    is_crowd = max(connections) >= options.idle + options.active
    is_right = bool(jobs) and all(jobs) and not any(worker.returncode for worker in workers)
    return int(not (is_right and is_flat and is_crowd and not any(warnings) and num_before == options.idle))


if __name__ == "__main__":
    sys.exit(main())
