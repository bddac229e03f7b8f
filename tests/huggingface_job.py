"""A small job of the Hugging Face Trainer, for torchrun: tests/huggingface_job.py ADDRESS EXPERIMENT RESULTS_DIR."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

import evosample
from evosample.huggingface import Trainer

N, EPOCHS, B, MINI, MICRO = 96, 5, 16, 8, 4


class Net(nn.Module):
    """A classifier of random points, whose BatchNorm has buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.begins_step = False
        self.seen: list[torch.Tensor] = []  # a buffer as the first training forward pass of each step begins

    def forward(self, points: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if torch.is_grad_enabled() and self.begins_step:
            norm: Any = self.layers[1]
            self.seen.append(norm.running_mean.clone())
            self.begins_step = False
        logits = self.layers(points)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Noting(Trainer):
    """Notes which samples each step loads, and tells the model when one begins."""

    loaded: list[list[int]]
    net: Net

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        def noting() -> Any:
            for meta_batch in epoch_iterator:
                self.loaded.append(meta_batch.planned.sample_ids.tolist())
                yield meta_batch

        batches = super().get_batch_samples(noting(), num_batches, device)
        self.net.begins_step = True
        return batches


def main() -> None:
    address, name, results_dir = sys.argv[1:]
    samples = [
        {"points": point, "labels": sample_id % 2}
        for sample_id, point in enumerate(torch.randn(N, 4, generator=torch.Generator().manual_seed(0)))
    ]
    arguments = TrainingArguments(
        output_dir=results_dir, per_device_train_batch_size=MICRO, save_strategy="no", report_to=[], disable_tqdm=True
    )
    with evosample.connect(address) as client:
        experiment = client.create_experiment(
            name,
            num_samples=N,
            num_epochs=EPOCHS,
            meta_batch_size=B,
            mini_batch_size=MINI,
            policy=evosample.EvolvedSampling(prune_ratio=0.25),
        )
        model = Net()
        trainer = Noting(model, arguments, experiment=experiment, train_dataset=samples)
        trainer.loaded, trainer.net = [], model
        trainer.train()
        results = {"buffers": model.seen, "model": model.state_dict(), "loaded": trainer.loaded}
        torch.save(results, Path(results_dir) / f"rank{os.environ['RANK']}.pt")
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
