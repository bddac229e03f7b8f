"""What selection saves under gradient accumulation: `python benchmarks/accumulation.py [--quick]`.

A small transformer learns the sentiment of movie reviews in micro-batches of 8 samples, 32 of them an optimizer step.
Two jobs take their steps in turn: one trains on all 256 samples of a step, the other scores them and trains on 64.
Counted are the backward passes of a step; measured is how much less time a step takes, beside what the times of single
forward and backward passes and of the optimizer, taken in the steps of the first job, lead one to expect.

Ends with exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/huggingface"))

from reviews import load_reviews, make_bert, make_tokenizer

import evosample
import evosample.torch

META_BATCH_SIZE, MINI_BATCH_SIZE, MICRO_BATCH_SIZE = 256, 64, 8
NUM_MICRO_BATCHES = META_BATCH_SIZE // MICRO_BATCH_SIZE
NUM_TOKENS = 32  # of every sample: a micro-batch costs the same, whichever samples are in it
MAX_DEVIATION = 0.10

Samples = list[dict[str, torch.Tensor]]


class Job:
    """Trains a model on what an experiment selects, and takes the time.

    Attributes:
        num_backward_passes: so far.
        step_s, forward_s, backward_s, optimizer_s: seconds of each step, and of each of its parts.
    """

    def __init__(self, client: evosample.Client, samples: Samples, tokenizer: Any, policy: evosample.Policy) -> None:
        self.num_backward_passes = 0
        self.step_s: list[float] = []
        self.forward_s: list[float] = []
        self.backward_s: list[float] = []
        self.optimizer_s: list[float] = []
        sizes = {"dim": 128, "hidden_dim": 512, "n_layers": 4, "n_heads": 4, "max_position_embeddings": NUM_TOKENS}
        self._model = make_bert("SequenceClassification", tokenizer, **sizes)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        experiment = client.create_experiment(
            type(policy).__name__,
            num_samples=len(samples),
            num_epochs=4,
            meta_batch_size=META_BATCH_SIZE,
            mini_batch_size=None if isinstance(policy, evosample.Uniform) else MINI_BATCH_SIZE,
            policy=policy,
        )
        self.loader = evosample.torch.Loader(
            samples,  # type: ignore[arg-type]
            experiment,
            model=self._model,
            score=self._losses,
            micro_batch_size=MICRO_BATCH_SIZE,
            predict_saving=True,
        )

    def _losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return functional.cross_entropy(logits, batch["label"], reduction="none")

    def steps(self) -> Iterator[dict[str, torch.Tensor]]:
        """Train for an epoch; yields a micro-batch of each step, once that is done."""
        step_began_s = time.perf_counter()
        for batch in self.loader:
            began_s = time.perf_counter()
            loss = self.loader.mean(self._losses(batch))
            self.forward_s.append(time.perf_counter() - began_s)
            began_s = time.perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            self.backward_s.append(time.perf_counter() - began_s)
            self.num_backward_passes += 1
            if self.loader.ends_step:
                began_s = time.perf_counter()
                self._optimizer.step()
                self._optimizer.zero_grad()
                self.optimizer_s.append(time.perf_counter() - began_s)
                self.step_s.append(time.perf_counter() - step_began_s)
                yield batch
                step_began_s = time.perf_counter()

    def scoring_s(self, batch: dict[str, torch.Tensor]) -> list[float]:
        """Seconds of forward passes without gradients, one after the other as a step makes them."""
        seconds = []
        for _ in range(4):
            began_s = time.perf_counter()
            with torch.no_grad():
                self._losses(batch)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    def forget(self) -> None:
        """Count and measure from here on."""
        self.num_backward_passes = 0
        for seconds in (self.step_s, self.forward_s, self.backward_s, self.optimizer_s):
            seconds.clear()


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="few steps: whether it works; times are not judged")
    options = arguments.parse_args()
    torch.set_num_threads(1)  # small models: threads would spend their time on waiting for each other
    samples, tokenizer = load_samples(1_280 if options.quick else 10_605)

    scoring_s: list[float] = []
    with evosample.connect() as client:
        everything = Job(client, samples, tokenizer, evosample.Uniform())
        selected = Job(client, samples, tokenizer, evosample.EvolvedSampling())
        for job in (everything, selected):
            for _ in track(job.steps(), "epoch 0, everything", total=len(samples) // META_BATCH_SIZE):
                pass
            job.forget()
        for epoch in (1, 2):
            steps = zip(everything.steps(), selected.steps(), strict=True)
            for batch, _ in track(steps, f"epoch {epoch}, in turn", total=len(samples) // META_BATCH_SIZE):
                scoring_s += everything.scoring_s(batch)
        figures = selected.loader.figures

    num_steps = len(selected.step_s)
    share = selected.num_backward_passes / everything.num_backward_passes
    scoring, optimizer = NUM_MICRO_BATCHES * median(scoring_s), median(everything.optimizer_s)
    training = NUM_MICRO_BATCHES * (median(everything.forward_s) + median(everything.backward_s))
    predicted = 1 - (scoring + training * MINI_BATCH_SIZE / META_BATCH_SIZE + optimizer) / (training + optimizer)
    measured = 1 - median(selected.step_s) / median(everything.step_s)
    deviation = abs(measured - predicted) / predicted
    is_met = {"share": share == MINI_BATCH_SIZE / META_BATCH_SIZE, "deviation": deviation <= MAX_DEVIATION}

    table = Table("", "everything", "selected", "selected / everything", "target")
    passes = [f"{job.num_backward_passes / num_steps:g}" for job in (everything, selected)]
    table.add_row("backward passes a step", *passes, f"{share:.3f}", f"0.25: {said(is_met['share'])}")
    seconds = [median(job.step_s) for job in (everything, selected)]
    table.add_row(
        "a step (median), s", *(f"{each:.3f}" for each in seconds), f"{1 - measured:.3f}, {measured:.1%} saved", ""
    )
    table.add_row(
        "the same, predicted",
        "",
        "",
        f"{predicted:.1%} saved, {deviation:.1%} off",
        f"10%: {said(is_met['deviation'])}",
    )
    console = Console(width=110)
    console.print(f"{num_steps} steps, {MICRO_BATCH_SIZE} samples a micro-batch, {NUM_MICRO_BATCHES} of them a step:")
    console.print(table)
    parts = {"to score": scoring_s, "forward": everything.forward_s, "backward": everything.backward_s}
    costs = ", ".join(f"{median(seconds) * 1e3:.1f} ms {what}" for what, seconds in parts.items())
    console.print(
        f"A micro-batch: {costs}; a step of the optimizer: {optimizer * 1e3:.1f} ms.\n"
        f"The loader itself (predict_saving) predicted a saving of {figures.predicted_saving:.1%}."
    )
    sys.exit(0 if is_met["share"] and (options.quick or is_met["deviation"]) else 1)


def load_samples(num_samples: int) -> tuple[Samples, Any]:
    """Reviews of NUM_TOKENS tokens, cut or padded, and what made them."""
    reviews = load_reviews(num_samples)
    tokenizer = make_tokenizer(reviews)
    tokens = tokenizer(
        [review.text for review in reviews],
        padding="max_length",
        truncation=True,
        max_length=NUM_TOKENS,
        return_tensors="pt",
    )
    labels = torch.tensor([review.is_positive for review in reviews], dtype=torch.int64)
    columns = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "label": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(num_samples)], tokenizer


def said(is_met: bool) -> str:
    """Whether a target is met."""
    return "met" if is_met else "MISSED"


if __name__ == "__main__":
    main()
