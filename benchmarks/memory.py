"""What an experiment takes in the store and of a server: `python benchmarks/memory.py [--num-samples N ...]`.

A server with its embedded store, and a job of one rank that goes through three epochs of a new experiment for each N,
with nothing pruned. Memory is what the store says of itself (used_memory) beyond what it says without the experiment,
in bytes a sample; beside it what docs/operations.md reckons with.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import redis

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import evosample
from support import ServerProcess, metrics_address

_SCORES, _TABLE, _LOSSES = 14, 8, 4  # bytes a sample; see docs/operations.md
_RETAINED = 2
_IN_USE = (_SCORES + _LOSSES) * _RETAINED + _TABLE
_IN_A_TURN = _IN_USE + _SCORES + _TABLE


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--num-samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    for num_samples in arguments.parse_args().num_samples:
        measure(num_samples)


def measure(num_samples: int) -> None:
    """Create an experiment, train it, and print what it took."""
    print(f"{num_samples:,} samples, bytes a sample:")

    def tell(what: str, num_bytes: float, reckoned: float | None = None) -> None:
        beside = "" if reckoned is None else f"   reckoned {reckoned:g}"
        print(f"  {what:46}{num_bytes / num_samples:8.1f}{beside}")

    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        server = ServerProcess(data_dir, "--metrics", "127.0.0.1:0", "--log-format", "json")
        with redis.Redis(unix_socket_path=server.store_socket) as store, evosample.connect(server.address) as client:
            empty_bytes = used_bytes(store)
            idle_bytes = server_bytes(server, "VmRSS")
            batch = max(num_samples // 100, 2)
            experiment = client.create_experiment(
                "e", num_samples=num_samples, num_epochs=100, meta_batch_size=batch, mini_batch_size=batch // 2
            )
            tell("store: created", used_bytes(store) - empty_bytes, _SCORES + _TABLE)
            began_s = time.perf_counter()
            on_disk: list[int] = []
            run = experiment.epochs()
            for epoch in run:
                for each in epoch:
                    if each.step == epoch.num_steps - 1:  # its losses end the epoch
                        run.flush()
                        retained = min(epoch.number + 1, _RETAINED)
                        reckoned = (_SCORES + _LOSSES) * retained + _TABLE
                        tell(f"store: at the end of epoch {epoch.number}", used_bytes(store) - empty_bytes, reckoned)
                        on_disk.append(sum(file.stat().st_size for file in (data_dir / "appendonlydir").iterdir()))
                    each.report(np.random.default_rng(each.step).random(len(each.sample_ids), np.float32))
                if epoch.number == 2:
                    break
            run.flush()
            seconds = time.perf_counter() - began_s
            run.close()
            peak_bytes = store.info("memory")["used_memory_peak"]
            tell("store: at the most, in an epoch's turn", peak_bytes - empty_bytes, _IN_A_TURN)
            figures = _metrics(server)
            tell("append-only files: at the most, between epochs", max(on_disk))
            tell("server: at the most, beyond an idle one's", server_bytes(server, "VmHWM") - idle_bytes)
            tell("network: ids to ranks, an epoch", figures["evosample_streamed_bytes_total"] / 3)
            tell("network: losses from ranks, an epoch", figures["evosample_reported_bytes_total"] / 3)
        print(f"  an idle server {idle_bytes / 2**20:.0f} MiB, an empty store {empty_bytes / 2**20:.1f} MiB;")
        print(f"  three epochs {seconds:.1f} s, the server's processor {figures['process_cpu_seconds_total']:.1f} s")
        server.stop()


def used_bytes(store: redis.Redis) -> int:
    """Memory that the store uses."""
    time.sleep(1)  # what is unlinked is freed in the background
    return int(store.info("memory")["used_memory"])


def server_bytes(server: ServerProcess, field: str) -> int:
    """Memory of a server's process: "VmRSS", or "VmHWM", the most that it has had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found[1])


def _metrics(server: ServerProcess) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{metrics_address(server)}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


if __name__ == "__main__":
    main()
