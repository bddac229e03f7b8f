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

    def train(self, points: Array, sides: Array, learning_rate: float) -> Array:
        """One step of Adam on the mean cross entropy; returns each sample's, before the step, [m]."""
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
    parser.add_argument("--epochs", type=int, default=40, help="of a quarter of the samples each")
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
            mini_batch_size=256,
        )
        for epoch in track(experiment.epochs(), "training", total=options.epochs):
            for batch in epoch:
                rows = batch.sample_ids
                losses = net.train(points[rows], sides[rows], learning_rate=0.01 * (1 - batch.progress))
                batch.report(losses)
                trained_on += len(rows)

    accuracy = np.mean((net.forward(test_points)[2] > 0) == test_sides)
    passes = trained_on / options.samples
    print(f"test accuracy {accuracy:.1%}, trained on {trained_on:,} samples: {passes:.2f} passes over the data")


if __name__ == "__main__":
    main()
