"""Selection without a framework: a two-layer network in plain numpy learns to tell two noisy spirals apart.

    python examples/numpy/train.py

The core client yields sample ids and takes losses; everything else is the job's own.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

import evosample

Array = NDArray[np.float64]


def spirals(num_samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Points [n, 2] on two interleaved spirals, and which of them each one is on, [n]."""
    side = rng.integers(0, 2, num_samples)
    angle = np.sqrt(rng.random(num_samples)) * 9
    points = (angle * np.where(side, 1, -1) * [np.cos(angle), np.sin(angle)]).T / 9
    return points + rng.normal(0, 0.05, points.shape), side.astype(np.float64)


class Net:
    """Fourier features -> 64 tanh units -> one logit; trained by Adam."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.frequencies = rng.normal(0, 3, (2, 64))
        self.parameters = [rng.normal(0, 0.1, (128, 64)), np.zeros(64), rng.normal(0, 0.1, 64), np.zeros(1)]
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.parameters]
        self.num_updates = 0

    def forward(self, points: Array) -> tuple[Array, Array, Array]:
        """Features [m, 128], hidden units [m, 64] and logits [m]."""
        w1, b1, w2, b2 = self.parameters
        phases = points @ self.frequencies
        features = np.concatenate([np.sin(phases), np.cos(phases)], 1)
        hidden = np.tanh(features @ w1 + b1)
        return features, hidden, hidden @ w2 + b2

    def losses(self, points: Array, sides: Array) -> Array:
        """Cross entropy of each sample, [m]."""
        logits = self.forward(points)[2]
        return np.logaddexp(0, logits) - sides * logits

    def train(self, points: Array, sides: Array, learning_rate: float) -> Array:
        """One step of Adam on the mean loss; returns the losses before it, [m]."""
        features, hidden, logits = self.forward(points)
        errors = (1 / (1 + np.exp(-logits)) - sides) / len(sides)
        into_hidden = errors[:, None] * self.parameters[2] * (1 - hidden**2)
        gradients = [features.T @ into_hidden, into_hidden.sum(0), hidden.T @ errors, errors.sum(keepdims=True)]
        self.num_updates += 1
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            corrected = square / (1 - 0.999**self.num_updates)
            parameter -= learning_rate * mean / (1 - 0.9**self.num_updates) / (np.sqrt(corrected) + 1e-8)
        return np.logaddexp(0, logits) - sides * logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--address", help="of a running evosample-server; default: a private one")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    points, sides = spirals(options.samples, rng)
    test_points, test_sides = spirals(5_000, rng)
    net = Net(rng)
    trained_on = 0

    with evosample.connect(options.address) as client:
        experiment = client.create_experiment(
            "spirals",
            num_samples=options.samples,
            num_epochs=options.epochs,
            meta_batch_size=256,
            mini_batch_size=64,
            policy=evosample.EvolvedSampling(prune_ratio=0.2),
        )
        for epoch in experiment.epochs():
            for batch in track(epoch, f"epoch {epoch.number}", total=epoch.num_steps):
                x, y = points[batch.sample_ids], sides[batch.sample_ids]
                learning_rate = 0.01 * (1 - batch.progress)
                if batch.selects:
                    chosen = batch.select(net.losses(x, y)).positions
                    net.train(x[chosen], y[chosen], learning_rate)
                    trained_on += len(chosen)
                else:  # the first epoch and the last: one ordinary pass over everything
                    batch.report(net.train(x, y, learning_rate))
                    trained_on += len(x)

    accuracy = np.mean((net.forward(test_points)[2] > 0) == test_sides)
    share = trained_on / (options.samples * options.epochs)
    print(f"test accuracy {accuracy:.1%}, back-propagated {share:.0%} of what ordinary epochs would")


if __name__ == "__main__":
    main()
