"""A training job without a framework, on a selection server: `python job.py --address host:50051`.

A network of one hidden layer learns MNIST, in numpy.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from mnist_arrays import load_digits
from numpy.typing import NDArray
from rich.progress import track

import evosample

Array = NDArray[np.float32]
BATCH_SIZE, CHOSEN = 256, 64


class Network:
    """784 -> 128 (ReLU) -> 10 (softmax), trained by Adam."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._weights = [
            rng.normal(0, (2 / rows) ** 0.5, (rows, columns)).astype(np.float32)
            for rows, columns in ((784, 128), (128, 10))
        ]
        self._moments = [(np.zeros_like(weights), np.zeros_like(weights)) for weights in self._weights]
        self._num_steps = 0

    def probabilities(self, images: Array) -> tuple[Array, Array]:
        """Of the hidden layer and of the digits."""
        hidden = np.maximum(images @ self._weights[0], 0)
        logits = hidden @ self._weights[1]
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        return hidden, exponentials / exponentials.sum(1, keepdims=True)

    def losses(self, images: Array, digits: NDArray[np.int64]) -> Array:
        """The cross entropy of each sample, [m]."""
        _, found = self.probabilities(images)
        losses: Array = -np.log(np.maximum(found[np.arange(len(digits)), digits], 1e-12))
        return losses

    def step(self, images: Array, digits: NDArray[np.int64], learning_rate: float) -> None:
        """One step of Adam on the mean loss."""
        hidden, error = self.probabilities(images)
        error[np.arange(len(digits)), digits] -= 1
        error /= len(digits)
        through = (error @ self._weights[1].T) * (hidden > 0)
        self._num_steps += 1
        gradients = (images.T @ through, hidden.T @ error)
        for weights, (mean, square), gradient in zip(self._weights, self._moments, gradients, strict=True):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            corrected = mean / (1 - 0.9**self._num_steps), square / (1 - 0.999**self._num_steps)
            weights -= learning_rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)


def main(
    address: Annotated[str, typer.Option(help="Of a running evosample-server.")] = "127.0.0.1:50051",
    name: Annotated[str, typer.Option(help="Of the experiment.")] = "mnist",
    samples: int = 60_000,
    epochs: int = 6,
) -> None:
    """Train through all epochs of an experiment, and test."""
    train_set, test_set = load_digits(samples, 10_000)
    network = Network()
    with evosample.connect(address) as client:
        experiment = client.create_experiment(
            name,
            num_samples=len(train_set.digits),
            num_epochs=epochs,
            meta_batch_size=BATCH_SIZE,
            mini_batch_size=CHOSEN,
            policy=evosample.EvolvedSampling(prune_ratio=0.2),
        )
        for epoch in experiment.epochs():
            for batch in track(epoch, f"epoch {epoch.number}", total=epoch.num_steps):
                images, digits = train_set.images[batch.sample_ids], train_set.digits[batch.sample_ids]
                chosen = batch.select(network.losses(images, digits)).positions
                network.step(images[chosen], digits[chosen], 2e-3 * (1 - batch.progress))
    _, found = network.probabilities(test_set.images)
    print(f"test accuracy {(found.argmax(1) == test_set.digits).mean():.1%}")


if __name__ == "__main__":
    typer.run(main)
