"""The systems that one might use instead, at the same jobs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from performance.ranks import serving
from performance.rows import Row, alternate
from performance.streaming import fetched_per_s, new_experiment, reported_per_s

import evosample

_REVERB = Path(__file__).parent / "reverb_peer.py"
_REVERB_SAMPLES = 200_000


def reverb(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """Drawing samples, and changing priorities; PEERS_PYTHON names a Python that has dm-reverb[tensorflow]."""
    names, mutated = (f"peer-{number}" for number in itertools.count()), []

    def peer() -> float:
        command = [os.environ["PEERS_PYTHON"], str(_REVERB), str(_REVERB_SAMPLES)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        found = json.loads(done.stdout)
        mutated.append(found["mutated_per_s"] / 1e6)
        return float(found["sampled_per_s"]) / 1e6

    with serving() as server, evosample.connect(server.address) as client:

        def new() -> evosample.Experiment:
            return new_experiment(client, next(names), num_samples)

        fetched, reported, sampled = alternate(
            num_repeats, lambda: fetched_per_s(new()) / 1e6, lambda: reported_per_s(new()) / 1e6, peer
        )
    unit = "M samples/s"
    yield Row(
        f"ids and prior scores to a client's arrays, {num_samples:,} samples, epoch just planned",
        fetched,
        unit,
        compared_with="Reverb's NewSampler, in the process of its server",
        compared=sampled,
        ratio_target=300,
    )
    yield Row(
        f"losses reported into the store and acknowledged, {num_samples:,} samples",
        reported,
        unit,
        compared_with="Reverb's mutate_priorities, which keeps them in memory",
        compared=mutated[1:],
        ratio_target=10,
    )
