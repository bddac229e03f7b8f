"""Trains 20 experiments with several ranks each, over and over, while servers and their store are killed and frozen.

    python tests/faults/soak.py --minutes 10

Three servers share one store. Two of them are killed or frozen again and again, and so is the store; the third lives,
for its memory to be watched. Every job's ids, choices and scores must be those that the formulas give. Prints a table,
writes soak-report.json, and ends with code 1 if anything was lost or memory grew.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for running it as a script

import evosample
from faults.harness import EACH_POLICY, ReplicatedServer, computed, run_job
from stores import StandaloneStore

NUM_WORKERS, EXPERIMENTS_A_WORKER, WORLD_SIZES = 4, 5, (2, 5)
PACE_S = 0.05
SAMPLE_INTERVAL_S = 2.0
MIN_MINUTES_FOR_MEMORY = 5
MAX_GROWTH = 1.10


def work(addresses: str, number: int, seconds: float) -> None:
    """One process that trains: a line of JSON on standard output for every job."""
    deadline_s = time.monotonic() + seconds
    printing = threading.Lock()
    policies = list(EACH_POLICY.values())

    def loop(experiment: int) -> None:
        world_size = WORLD_SIZES[experiment % len(WORLD_SIZES)]
        settings = policies[(EXPERIMENTS_A_WORKER * number + experiment) % len(policies)]
        expected = computed(settings, world_size)
        job = 0
        while time.monotonic() < deadline_s:
            name = f"worker{number}-experiment{experiment}-job{job}"
            began_s = time.monotonic()
            found = run_job(
                addresses, name, settings=settings, world_size=world_size, pace_s=PACE_S, outage_timeout_s=180
            )
            report = {"job": name, "is_right": found == expected, "seconds": time.monotonic() - began_s}
            with printing:
                print(json.dumps(report), flush=True)
            with evosample.connect(addresses) as client:
                client.delete_experiment(name)
            job += 1

    with ThreadPoolExecutor(EXPERIMENTS_A_WORKER) as experiments:
        list(experiments.map(loop, range(EXPERIMENTS_A_WORKER)))


class Harm:
    """Kills and freezes, one thing at a time, at random moments."""

    def __init__(self, servers: list[ReplicatedServer], store: StandaloneStore) -> None:
        self.counts = {"servers killed": 0, "servers frozen": 0, "stores killed": 0, "stores frozen": 0}
        self._servers, self._store = servers, store
        self._random = random.Random(1)

    def go_on(self, stopping: threading.Event) -> None:
        """Do harm until told to stop; everything runs again then."""
        while not stopping.wait(self._random.uniform(0.5, 3)):
            what = self._random.choices(list(self.counts), [10, 1, 3, 1])[0]
            self.counts[what] += 1
            victim: Any = self._random.choice(self._servers) if what.startswith("servers") else self._store
            if what.endswith("killed"):
                victim.kill()
                stopping.wait(self._random.uniform(0, 1))
                victim.start() if victim is self._store else victim.restart()
            else:
                victim.pause()
                stopping.wait(self._random.uniform(1, 5))
                victim.resume()


def rss_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return 1024 * int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def growth(samples: list[int]) -> float:
    """Median of the last quarter over that of the second: the first is for warming up."""
    quarter = max(len(samples) // 4, 1)
    return statistics.median(samples[-quarter:]) / statistics.median(samples[quarter : 2 * quarter] or samples)


def main() -> int:
    """Run, print, and return the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--workers", type=int, default=NUM_WORKERS, help="processes, of five experiments each")
    arguments.add_argument("--report", type=Path, default=Path("soak-report.json"))
    arguments.add_argument("--worker", nargs=2, help=argparse.SUPPRESS, metavar=("ADDRESSES", "NUMBER"))
    options = arguments.parse_args()
    seconds = 60 * options.minutes
    if options.worker:
        work(options.worker[0], int(options.worker[1]), seconds)
        return 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, ExitStack() as stack:
        store = StandaloneStore(Path(folder) / "store")
        stack.callback(store.close)
        servers = []
        for number in range(3):
            # A cache of a gigabyte would take more than ten minutes to fill, and look like a leak until then.
            options_of_server = ("--cache-bytes", "1000000")
            servers.append(ReplicatedServer(Path(folder) / f"server{number}", store.url, *options_of_server))
            stack.callback(servers[-1].stop)
        harm, stopping = Harm(servers[1:], store), threading.Event()
        threads = stack.enter_context(ThreadPoolExecutor(options.workers + 1))
        stack.callback(stopping.set)
        addresses = ",".join(server.address for server in servers)
        command = [sys.executable, __file__, "--minutes", str(options.minutes), "--worker", addresses]
        workers = []
        for number in range(options.workers):
            log = stack.enter_context((Path(folder) / f"worker{number}.log").open("w+"))
            workers.append(
                subprocess.Popen(
                    [*command, str(number)], stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
                )
            )
            stack.callback(workers[-1].kill)
        watched = ["server", "store", *(f"client {number}" for number in range(options.workers))]
        memory: dict[str, list[int]] = {what: [] for what in watched}
        jobs = [threads.submit(_jobs, worker) for worker in workers]
        harming = threads.submit(harm.go_on, stopping)
        with Progress() as progress:
            task = progress.add_task("soaking", total=seconds)
            began_s = time.monotonic()
            while (passed_s := time.monotonic() - began_s) < seconds:
                time.sleep(SAMPLE_INTERVAL_S)
                progress.update(task, completed=passed_s)
                memory["server"].append(rss_bytes(servers[0].process.pid))
                for number, worker in enumerate(workers):
                    if worker.poll() is None:
                        memory[f"client {number}"].append(rss_bytes(worker.pid))
                with suppress(redis.RedisError):  # it is killed or frozen at the moment
                    memory["store"].append(store.call("INFO", "memory")["used_memory"])
        stopping.set()
        harming.result()
        done = [job for future in jobs for job in future.result()]
        codes = [worker.wait() for worker in workers]
        for number, code in enumerate(codes):
            if code:
                Console(stderr=True).print((Path(folder) / f"worker{number}.log").read_text()[-3000:], markup=False)
    return _told(options.report, options.minutes, harm.counts, done, memory, codes)


def _jobs(worker: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert worker.stdout is not None
    return [json.loads(line) for line in worker.stdout]


def _told(
    path: Path,
    minutes: float,
    counts: dict[str, int],
    done: list[dict[str, Any]],
    memory: dict[str, list[int]],
    codes: list[int],
) -> int:
    wrong = [job["job"] for job in done if not job["is_right"]]
    grown = {what: growth(samples) for what, samples in memory.items() if samples}
    figures: dict[str, Any] = {
        "minutes": minutes,
        "jobs that came to their end": len(done),
        "jobs with a wrong id, choice or score": len(wrong),
        "worker processes that failed": sum(code != 0 for code in codes),
        **counts,
        **{
            f"memory of the {what}, MB at the end": round(samples[-1] / 1e6)
            for what, samples in memory.items()
            if samples
        },
        **{f"memory of the {what}, last quarter / second": round(ratio, 3) for what, ratio in grown.items()},
    }
    path.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table("figure", "value")
    for what, value in figures.items():
        table.add_row(what, str(value))
    Console().print(table)
    is_flat = minutes < MIN_MINUTES_FOR_MEMORY or max(grown.values()) < MAX_GROWTH
    return int(bool(wrong) or any(codes) or not done or not is_flat)


if __name__ == "__main__":
    sys.exit(main())
