"""Train with Lightning on what an experiment selects: `python train.py`.

MNIST, which `make .venv/mnist` installs, and a private selection server; or pass --address of a running one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import evosample.lightning

sys.path.append(str(Path(__file__).parents[1] / "mnist"))

from digits import load_mnist


class Classifier(lightning.LightningModule):
    """A small network, which passes the loss of each sample to evosample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, digits = batch
        losses = functional.cross_entropy(self.layers(images), digits, reduction="none")
        data: evosample.lightning.DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        loss = data.mean(losses)
        self.log_dict({"loss": loss, "done": data.loader.progress}, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, digits = batch
        accuracy = (self.layers(images).argmax(1) == digits).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(digits))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=24, help="of a quarter of the samples each")
    parser.add_argument("--address", help="of a running evosample-server; default: a private one")
    options = parser.parse_args()
    train_set, test_set = (TensorDataset(part.images, part.digits) for part in load_mnist(options.samples, 10_000))

    with evosample.connect(options.address) as client:
        experiment = client.create_experiment(
            "mnist-lightning",
            num_samples=len(train_set),
            num_epochs=options.epochs,
            mini_batch_size=256,
        )
        test_loader = DataLoader(test_set, batch_size=1000)
        data = evosample.lightning.DataModule(train_set, experiment, val_dataloaders=test_loader)
        trainer = lightning.Trainer(max_steps=experiment.total_steps, logger=False, enable_checkpointing=False)
        trainer.fit(Classifier(), data)
        print(f"test accuracy {trainer.callback_metrics['accuracy']:.1%} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
