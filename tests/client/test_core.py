from __future__ import annotations

import evosample
from support import fixed_losses, train


def test_a_run_goes_through_every_step_of_every_epoch(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(
        name, num_samples=500, num_epochs=3, meta_batch_size=32, mini_batch_size=8, policy=evosample.EvolvedSampling()
    )
    visits = train(experiment, fixed_losses(500, 3))
    assert [(visit.epoch, visit.step) for visit in visits] == [(e, s) for e in range(3) for s in range(15)]
    assert experiment.status().state == "finished"
