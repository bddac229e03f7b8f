"""A small job on MNIST, once with Lightning and once as a plain loop; as a script both train with DDP.

python tests/lightning_job.py ADDRESS EXPERIMENT RESULTS_DIR
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

sys.path.append(str(Path(__file__).parents[1] / "examples/mnist"))

from digits import Mnist, load_mnist

import evosample
import evosample.lightning
import evosample.torch

N, EPOCHS, B, MINI = 384, 4, 32, 8
# By default the first epoch and the last are annealing: epochs 1 and 2 select, and have 9 steps if a quarter is pruned.
STEPS = N // B
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": EPOCHS, "meta_batch_size": B, "mini_batch_size": MINI}
ESWP = evosample.EvolvedSampling(prune_ratio=0.25)

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def mnist() -> Mnist:
    return load_mnist(N, 1)[0]


class Digits(Dataset[Batch]):
    """(id, image, digit) of MNIST's first samples."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, sample_id: int) -> Any:
        return sample_id, *mnist()[sample_id]


class Net(LightningModule):
    """Has what a scoring pass could disturb: BatchNorm, and dropout if one likes."""

    def __init__(self, total_steps: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10)
        )
        self.total_steps = total_steps
        self.steps: list[list[int]] = []  # the ids that each step trained on
        self.means: list[torch.Tensor] = []  # BatchNorm's, as each step found them

    def per_sample_losses(self, batch: Batch) -> torch.Tensor:
        _, images, digits = batch
        return functional.cross_entropy(self.layers(images), digits, reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.note(batch)
        loss: torch.Tensor = self.trainer.datamodule.mean(self.per_sample_losses(batch))  # type: ignore[attr-defined]
        return loss

    def note(self, batch: Batch) -> None:
        self.steps.append(batch[0].tolist())
        self.means.append(self.layers[2].running_mean.clone())  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ValidatedNet(Net):
    """Lightning warns of a `validation_step` without samples for it."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.per_sample_losses(batch).mean(), batch_size=len(batch[0]))


class _PlainNet(nn.Module):
    """DDP wraps what has a `forward`."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.net.note(batch)
        return self.net.per_sample_losses(batch)


def train_plainly(experiment: evosample.Experiment, net: Net, *, accumulate: int = 1, **options: Any) -> None:
    """What Lightning does, without Lightning."""
    (optimizer,), (schedule,) = net.configure_optimizers()
    model: nn.Module = _PlainNet(net)
    if distributed.is_initialized():
        model = DistributedDataParallel(model)
    loader = evosample.torch.Loader(Digits(), experiment, model=model, score=model, **options)
    for epoch in range(EPOCHS):
        for batch in loader:
            (loader.mean(model(batch)) / accumulate).backward()  # type: ignore[no-untyped-call]
            step = loader.position.step
            if step % accumulate == 0 or loader.position.epoch > epoch:
                optimizer.step()
                schedule["scheduler"].step()
                optimizer.zero_grad()


def quiet_trainer(**options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(**defaults | options)


def main(address: str, name: str, results_dir: str) -> None:
    torch.set_num_threads(1)
    with evosample.connect(address) as client:
        net, plain = Net(client.get_experiment(name).total_steps), Net(client.get_experiment(name).total_steps)
        trainer = quiet_trainer(strategy="ddp", devices=2)
        trainer.fit(net, evosample.lightning.DataModule(Digits(), client.get_experiment(name)))
        train_plainly(client.get_experiment(f"{name}-twin"), plain)
        result = {
            key: {"steps": model.steps, "means": model.means, "state": model.state_dict()}
            for key, model in (("lightning", net), ("plain", plain))
        }
        torch.save(result, Path(results_dir) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
