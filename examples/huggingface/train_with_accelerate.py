"""A loop of your own with Hugging Face accelerate, on what an experiment selects:

    python train_with_accelerate.py
    accelerate launch --num_processes 2 train_with_accelerate.py

Movie reviews, which `make .venv/reviews.tsv` fetches, a small model, and a private selection server for all processes
of the machine; or pass --address of a running one. With --checkpoint, a folder, training stops after half of its steps,
and goes on when it is started again: that needs a server that outlives the job.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from accelerate import Accelerator
from reviews import load_reviews, make_bert, make_tokenizer, tokenized
from rich.progress import track
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

import evosample
import evosample.torch


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=9_600)
    parser.add_argument("--epochs", type=int, default=24, help="of a quarter of the samples each")
    parser.add_argument("--address", help="of a running evosample-server; default: a private one")
    parser.add_argument("--checkpoint", type=Path, help="a folder: stop half way and save, or go on from there")
    options = parser.parse_args()
    if options.checkpoint and not options.address:
        parser.error("--checkpoint needs --address: a private server ends with the job")
    accelerator = Accelerator()
    torch.manual_seed(0)
    reviews = load_reviews(10_605)
    random.Random(0).shuffle(reviews)
    tokenizer = make_tokenizer(reviews)
    samples, collate = tokenized(reviews, tokenizer), DataCollatorWithPadding(tokenizer)
    train_set, test_set = samples[: options.samples], samples[-1_000:]

    model = make_bert("SequenceClassification", tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    # Not the scheduler, nor a loader of training data: their steps are up to the experiment.
    model, optimizer, test_loader = accelerator.prepare(
        model, optimizer, DataLoader(test_set, batch_size=100, collate_fn=collate)
    )

    client = evosample.torch.connect(options.address)
    experiment = client.create_experiment(
        "reviews-accelerate",
        num_samples=len(train_set),
        num_epochs=options.epochs,
        mini_batch_size=128,  # over all processes
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=experiment.total_steps)

    loader = evosample.torch.Loader(
        train_set,
        experiment,
        model=model,  # for accumulate(): it exchanges gradients with the last micro-batch of a step
        micro_batch_size=16,  # of each process
        device=accelerator.device,
        collate_fn=collate,
    )
    accelerator.register_for_checkpointing(loader, scheduler)
    goes_on = options.checkpoint is not None and options.checkpoint.exists()
    if goes_on:
        accelerator.load_state(str(options.checkpoint))

    for epoch in range(loader.position.epoch, options.epochs):
        for batch in track(loader, f"epoch {epoch}", total=None, disable=not accelerator.is_main_process):
            with loader.accumulate():  # instead of accelerator.accumulate(model)
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
                accelerator.backward(loader.mean(losses))
            if not loader.ends_step:
                continue
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if options.checkpoint and not goes_on and loader.progress >= 0.5:
                accelerator.save_state(str(options.checkpoint))
                accelerator.print(f"saved at {loader.position}")
                return

    loader.state_dict()  # on all processes: every loss is in the store
    model.eval()
    is_right = []
    for batch in test_loader:
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        is_right.append(accelerator.gather_for_metrics(logits.argmax(1) == batch["labels"]))
    accuracy = torch.cat(is_right).float().mean()
    accelerator.print(f"test accuracy {accuracy:.1%} with {accelerator.num_processes} processes")
    accelerator.end_training()  # the private server ends with process 0


if __name__ == "__main__":
    main()
