"""Selection with JAX: a small network learns to tell two noisy rings apart.

    pip install jax
    python examples/jax/train.py

The core client is enough. All batches have one size, so the training step is compiled once.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

import evosample

Parameters = list[tuple[jax.Array, jax.Array]]


def rings(num_samples: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Points [n, 2] on two rings around one centre, and which of them each one is on, [n]."""
    side = rng.integers(0, 2, num_samples)
    angle = rng.random(num_samples) * 2 * np.pi
    radius = 0.6 + 0.4 * side + rng.normal(0, 0.1, num_samples)
    points = (radius * [np.cos(angle), np.sin(angle)]).T
    return points.astype(np.float32), side.astype(np.float32)


def make_parameters(key: jax.Array, sizes: tuple[int, ...]) -> Parameters:
    """Weights and biases of dense layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def predict(parameters: Parameters, points: jax.Array) -> jax.Array:
    """Logits, [m]."""
    for weights, biases in parameters[:-1]:
        points = jax.nn.relu(points @ weights + biases)
    weights, biases = parameters[-1]
    return (points @ weights + biases)[:, 0]


def losses(parameters: Parameters, points: jax.Array, sides: jax.Array) -> jax.Array:
    """Cross entropy of each sample, [m]."""
    logits = predict(parameters, points)
    return jnp.logaddexp(0, logits) - sides * logits


@jax.jit
def train_step(
    parameters: Parameters, points: jax.Array, sides: jax.Array, learning_rate: float
) -> tuple[Parameters, jax.Array]:
    """One step of gradient descent on the mean loss; the new parameters, and the losses before it, [m]."""

    def mean_loss(parameters: Parameters) -> tuple[jax.Array, jax.Array]:
        per_sample = losses(parameters, points, sides)
        return per_sample.mean(), per_sample

    gradients, per_sample = jax.grad(mean_loss, has_aux=True)(parameters)
    return jax.tree.map(lambda p, g: p - learning_rate * g, parameters, gradients), per_sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=40, help="of a quarter of the samples each")
    parser.add_argument("--address", help="of a running evosample-server; default: a private one")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    points, sides = rings(options.samples, rng)
    test_points, test_sides = rings(5_000, rng)
    parameters = make_parameters(jax.random.key(0), (2, 64, 64, 1))
    trained_on = 0

    with evosample.connect(options.address) as client:
        experiment = client.create_experiment(
            "rings",
            num_samples=options.samples,
            num_epochs=options.epochs,
            mini_batch_size=256,
        )
        for epoch in track(experiment.epochs(), "training", total=options.epochs):
            for batch in epoch:
                rows = batch.sample_ids
                learning_rate = 0.2 * (1 - batch.progress)
                parameters, per_sample = train_step(parameters, points[rows], sides[rows], learning_rate)
                batch.report(per_sample)
                trained_on += len(rows)

    accuracy = np.mean((np.asarray(predict(parameters, jnp.asarray(test_points))) > 0) == test_sides)
    passes = trained_on / options.samples
    print(f"test accuracy {accuracy:.1%}, trained on {trained_on:,} samples: {passes:.2f} passes over the data")


if __name__ == "__main__":
    main()
