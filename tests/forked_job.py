"""Processes that a user of evosample starts, in ways that gRPC does not like; prints what becomes of them.

python tests/forked_job.py ADDRESS
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import torch

import evosample
from evosample.torch import Loader
from samples import Ids

N = 64


def look(address: str) -> None:
    try:
        with evosample.connect(address) as client:
            print("found", len(list(client.list_experiments(project="none"))), flush=True)
    except evosample.UsageError as error:
        print("refused", error, flush=True)


def train(address: str, name: str) -> None:
    """Two forked workers an epoch, while threads of this client talk to the server."""
    client = evosample.connect(address)
    experiment = client.create_experiment(
        name, num_samples=N, num_epochs=4, meta_batch_size=16, mini_batch_size=4, project="forked"
    )
    options: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}
    loader = Loader(Ids(N), experiment, model=torch.nn.Linear(1, 1), score=lambda ids: ids.float(), **options)
    for _ in range(4):
        for ids in loader:
            loader.mean(ids.float())
    cycle: list[object] = [client, experiment]  # garbage, to be collected at any time in any process
    cycle.append(cycle)


if __name__ == "__main__":
    for job in range(10):
        train(sys.argv[1], f"job-{job}")
    for method in ("fork", "spawn", "forkserver"):
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=look, args=sys.argv[1:])
        process.start()
        process.join()
