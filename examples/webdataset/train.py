"""Train on WebDataset shards, and load only what still teaches the model: `python train.py ['train-{000..029}.tar']`.

Without shards of your own it writes some: MNIST, which `make .venv/mnist` installs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from mnist_shards import write_shards
from torch import nn

import evosample
import evosample.torch
import evosample.webdataset


def train(urls: str | list[str], num_epochs: int) -> None:
    """Train a small network on shards of grey images (.png) of 28 x 28 pixels and digits (.cls)."""
    evosample.webdataset.index_shards(urls)  # or, once and for all, the command: evosample index ...
    shards = evosample.webdataset.Shards(urls)
    dataset = evosample.webdataset.Dataset(shards).decode("torchl8").to_tuple("png", "cls")

    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)

    with evosample.connect() as client:
        experiment = client.create_experiment(
            "webdataset",
            num_samples=len(shards),
            num_epochs=num_epochs,
            mini_batch_size=128,
            shard_sizes=shards.shard_sizes,  # shuffle so that shards are read nearly one after the other
        )
        loader = evosample.torch.Loader(dataset, experiment, num_workers=2)
        for epoch in range(num_epochs):
            total_loss, num_steps = 0.0, 0
            for images, digits in loader:
                losses = nn.functional.cross_entropy(model(images / 255), digits, reduction="none")
                loss = loader.mean(losses)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                total_loss += loss.item()
                num_steps += 1
            print(f"epoch {epoch}: {num_steps} steps, mean training loss {total_loss / num_steps:.3f}")


def main(
    shards: Annotated[str, typer.Argument(help="Shards of .png and .cls. Default: MNIST is written as such.")] = "",
    num_epochs: Annotated[int, typer.Option(help="Of a quarter of the samples each.", min=1)] = 20,
    num_samples: Annotated[int, typer.Option(help="Samples of MNIST to write.", min=1, max=60_000)] = 12_000,
) -> None:
    """Train a small network on WebDataset shards through a private selection server."""
    if shards:
        train(shards, num_epochs)
        return
    with tempfile.TemporaryDirectory() as folder:
        train(write_shards(Path(folder), num_samples, samples_per_shard=max(num_samples // 30, 1)), num_epochs)


if __name__ == "__main__":
    typer.run(main)
