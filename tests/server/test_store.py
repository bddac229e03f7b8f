"""The store under a planner that comes late: what the head has gone back to must not be collected."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from redis.asyncio import Redis

import evosample
from evosample.wire import ExperimentName
from evosample_server.metrics import Metrics
from evosample_server.store import Head, Store
from support import fixed_losses, train


def test_a_late_collection_spares_the_epoch_that_a_job_has_gone_back_to(start_server: Any) -> None:
    server = start_server("--cache-bytes", "0")  # everything is read from the store

    async def with_store(stale: Head | None) -> Head:
        redis = Redis(unix_socket_path=server.store_socket)
        metrics = Metrics(max_experiments=0, max_streams=0, max_project_streams=0)
        store = Store(redis, retain_epochs=2, cache_bytes=0, metrics=metrics)
        head = await store.head(ExperimentName("default", "e"))
        assert head is not None
        if stale is not None:
            await store.collect(stale)
        await store.close()
        return head

    losses = fixed_losses(200, 4)
    with evosample.connect(server.address) as client:
        policy = evosample.EvolvedSampling(prune_ratio=0.5, annealing=0)
        sizes: dict[str, Any] = {"num_samples": 200, "num_epochs": 4, "meta_batch_size": 20, "mini_batch_size": 5}
        experiment = client.create_experiment("e", **sizes, policy=policy)
        new_shares = []
        run = experiment.epochs()
        for epoch in run:
            new_shares.append(epoch.new_share)
            if epoch.number == 2:
                break
            for batch in epoch:
                batch.select(losses[batch.epoch, batch.sample_ids])
        before = experiment.export_scores(epoch=1)
        stale = asyncio.run(with_store(None))  # as a planner had read it before it was paused
        assert stale.epoch == 2
        again = experiment.epochs(position=(1, 3))
        epoch = next(again)
        assert epoch.new_share == new_shares[1] != new_shares[2]
        assert asyncio.run(with_store(stale)).epoch == 1
        np.testing.assert_array_equal(experiment.export_scores(epoch=1).scores, before.scores)
        again.close()
        assert len(train(experiment, losses, position=(1, 3))) == 2 + 5 + 5
