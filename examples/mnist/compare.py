"""MNIST as training functions that selection methods are compared on: as it is, long-tailed, and with wrong labels.

evosample compare examples/mnist/compare.py:mnist --epochs 6 --output comparison

`train` is all that it takes to compare methods on a training of your own; `evosample compare --help` tells the rest.
"""

from __future__ import annotations

import digits
import torch
from demo import BATCH_SIZE, META_BATCH_SIZE
from digits import Mnist, accuracy, learning_rate, make_model
from torch.nn import functional

import evosample.torch
from evosample.comparison import Trial


def train(trial: Trial, train_set: Mnist, test_set: Mnist) -> dict[str, float]:
    """Train a new model as the trial says, and return what its test on the test set came to."""
    torch.manual_seed(trial.seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    experiment = trial.create_experiment(
        num_samples=len(train_set), mini_batch_size=BATCH_SIZE, meta_batch_size=META_BATCH_SIZE
    )

    def per_sample(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, labels = batch
        logits = model(images)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        wants_predictions = bool(experiment.spec.policy.reported_columns)
        return losses, evosample.torch.prediction_columns(logits, labels) if wants_predictions else {}

    with trial.training():
        loader = evosample.torch.Loader(
            train_set, experiment, model=model, score=per_sample, collate_fn=lambda batch: batch
        )
        for _ in range(trial.num_epochs):
            for batch in loader:
                # By progress, not by a count of steps: methods differ in the number of steps they take.
                optimizer.param_groups[0]["lr"] = learning_rate(loader.progress) * loader.learning_rate_factor
                losses, columns = per_sample(batch)
                loader.mean(losses, **columns).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
    return {"accuracy": accuracy(model, test_set)}


def mnist(trial: Trial) -> dict[str, float]:
    """All 60,000 digits."""
    return train(trial, *digits.all_digits())


def long_tailed(trial: Trial) -> dict[str, float]:
    """About 12,600 digits, 100 times as many zeros as nines: class c has 5,000 * 100^(-c / 9)."""
    return train(trial, *digits.long_tailed(trial.seed))


def wrong_labels(trial: Trial) -> dict[str, float]:
    """All 60,000 digits, of which 20 % have a wrong label."""
    return train(trial, *digits.wrong_labels(trial.seed))
