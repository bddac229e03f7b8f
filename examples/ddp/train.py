"""Data-parallel training: every process trains on its part of what one experiment selects.

    torchrun --nproc-per-node 2 examples/ddp/train.py

On one machine process 0 starts a private server for all; for several machines start an `evosample-server` and pass
--address.
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import track
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import evosample.torch


def spirals(num_samples: int, seed: int) -> TensorDataset:
    """Points [n, 2] on two interleaved noisy spirals, and which of them each one is on, [n]."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(2, (num_samples,), generator=generator).float()
    angles = torch.rand(num_samples, generator=generator).sqrt() * 9
    radii = angles / 9 * torch.where(sides > 0, 1, -1)
    points = torch.stack([radii * angles.cos(), radii * angles.sin()], 1)
    return TensorDataset(points + 0.05 * torch.randn(num_samples, 2, generator=generator), sides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=24, help="of a quarter of the samples each")
    parser.add_argument("--address", help="of a running evosample-server; default: a private one")
    options = parser.parse_args()
    distributed.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    train_set = spirals(options.samples, seed=0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    client = evosample.torch.connect(options.address)
    experiment = client.create_experiment(
        "spirals",
        num_samples=len(train_set),
        num_epochs=options.epochs,
        mini_batch_size=256,  # over all processes
    )
    loader = evosample.torch.Loader(train_set, experiment)
    is_first = distributed.get_rank() == 0
    for epoch in range(options.epochs):
        for points, sides in track(loader, f"epoch {epoch}", total=None, disable=not is_first):
            losses = functional.binary_cross_entropy_with_logits(model(points).squeeze(1), sides, reduction="none")
            loss = loader.mean(losses)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    loader.state_dict()  # on all processes: whatever a checkpoint holds, every loss before it is in the store
    if is_first:
        points, sides = spirals(5_000, seed=1).tensors
        accuracy = ((model.module(points).squeeze(1) > 0) == (sides > 0)).float().mean()
        print(f"test accuracy {accuracy:.1%} with {distributed.get_world_size()} processes")
    distributed.barrier()  # the private server ends with process 0
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
