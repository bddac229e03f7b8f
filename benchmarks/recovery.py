"""How soon a server answers again after it was killed: `python benchmarks/recovery.py [--num-samples N] [--repeats N]`.

A server with its embedded store is killed (SIGKILL) in the middle of an epoch, and started again at once. Measured is
the time from its start until it answers for the experiment, until it streams ids, and until it has recorded losses;
beside the time that a Python takes to start and import what the server imports, and the time that the store takes to
load its data by itself.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import grpc

import evosample
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample_server.embedded import EmbeddedStore
from support import ServerProcess

_IMPORTS = "import evosample_server.app, pydantic_settings"


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--num-samples", type=int, default=1_000_000)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    n, batch = options.num_samples, options.num_samples // 100
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        server = ServerProcess(data_dir)
        with evosample.connect(server.address) as client:
            experiment = client.create_experiment(
                "e", num_samples=n, num_epochs=10, meta_batch_size=batch, mini_batch_size=batch // 4
            )
            run = experiment.epochs(run_id="before")
            for epoch in run:
                for step, each in enumerate(epoch):
                    each.report(np.random.default_rng(step).random(len(each.sample_ids), np.float32))
                    if epoch.number == 3 and step == 50:
                        break
                else:
                    continue
                break
            run.close()
        for repeat in range(options.repeats):
            server.kill()
            for what, seconds in _recovery(server, experiment.uid, f"after-{repeat}").items():
                figures.setdefault(what, []).append(seconds)
        server.stop()
        for _ in range(options.repeats):
            figures.setdefault("Python and the server's imports alone", []).append(_timed(_import))
            began_s = time.perf_counter()
            store = EmbeddedStore(data_dir)
            figures.setdefault("the store alone", []).append(time.perf_counter() - began_s)
            store.close()
    print(f"{n:,} samples, {options.repeats} kills: seconds from the server's start")
    for what, seconds_each in figures.items():
        median, low, high = statistics.median(seconds_each), min(seconds_each), max(seconds_each)
        print(f"  {what:45} median {median:.2f}, from {low:.2f} to {high:.2f}")


def _recovery(server: ServerProcess, uid: str, run_id: str) -> dict[str, float]:
    ref = pb.ExperimentRef(name="e", uid=uid)
    began_s = time.perf_counter()
    server.restart()
    figures = {"it says that it listens": time.perf_counter() - began_s}
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        stub.GetExperiment(pb.GetExperimentRequest(ref=ref))
        figures["it answers for the experiment"] = time.perf_counter() - began_s
        joined = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id=run_id, world_size=1))
        member = pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)
        request = pb.StreamEpochRequest(member=member, epoch=joined.position.epoch, max_steps=1)
        events = list(stub.StreamEpoch(request))
        figures["it has streamed ids"] = time.perf_counter() - began_s
        losses = bytes(len(events[1].rows.prior_scores))
        stub.ReportLosses(
            pb.ReportLossesRequest(member=member, plan_id=events[0].start.plan_id, num_steps=1, losses=losses)
        )
        figures["it has recorded losses"] = time.perf_counter() - began_s
    return figures


def _import() -> None:
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)


def _timed(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
