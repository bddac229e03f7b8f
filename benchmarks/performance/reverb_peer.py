"""Reverb at the same jobs, in an environment of its own: `python reverb_peer.py NUM_SAMPLES`.

Prints JSON: samples drawn a second by their priorities (`NewSampler`), as ids with probabilities and priorities, and
priorities changed a second (`mutate_priorities`), thousands at a time.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import reverb

_BATCH = 4096


def main(num_samples: int) -> None:
    """Fill a table with one id each, draw from it, change its priorities."""
    table = reverb.Table(
        name="scores",
        sampler=reverb.selectors.Prioritized(1.0),
        remover=reverb.selectors.Fifo(),
        max_size=num_samples,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    server = reverb.Server([table])
    client = reverb.Client(f"localhost:{server.port}")
    with client.trajectory_writer(num_keep_alive_refs=1) as writer:
        for sample_id in range(num_samples):
            writer.append({"id": np.uint32(sample_id)})
            writer.create_item("scores", priority=1.0, trajectory={"id": writer.history["id"][-1:]})
            if sample_id % _BATCH == _BATCH - 1:
                writer.flush()
        writer.flush()
    keys = [sample.info.key for sample in client.sample("scores", num_samples=_BATCH, emit_timesteps=False)]

    sampler = client._client.NewSampler("scores", num_samples, 4 * _BATCH)
    began_s = time.perf_counter()
    for _ in range(num_samples):
        sampler.GetNextTrajectory()
    sampled_per_s = num_samples / (time.perf_counter() - began_s)

    updates = dict.fromkeys(keys, 2.0)
    repeats = max(num_samples // len(updates), 1)
    began_s = time.perf_counter()
    for _ in range(repeats):
        client.mutate_priorities("scores", updates)
    mutated_per_s = repeats * len(updates) / (time.perf_counter() - began_s)
    print(json.dumps({"sampled_per_s": sampled_per_s, "mutated_per_s": mutated_per_s}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
