"""Fine-tune with the Hugging Face Trainer on what an experiment selects:

    python train_with_trainer.py
    torchrun --nproc-per-node 2 train_with_trainer.py

Movie reviews, which `make .venv/reviews.tsv` fetches, a small model, and a private selection server for all processes
of the machine; or pass --address of a running one.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from reviews import load_reviews, make_bert, make_tokenizer, tokenized
from transformers import DataCollatorWithPadding, TrainingArguments

import evosample
import evosample.huggingface
import evosample.torch


def accuracy(predictions: Any) -> dict[str, float]:
    """Of classes predicted for the test set."""
    return {"accuracy": (predictions.predictions.argmax(1) == predictions.label_ids).mean()}


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=9_600)
    parser.add_argument("--epochs", type=int, default=24, help="of a quarter of the samples each")
    parser.add_argument("--address", help="of a running evosample-server; default: a private one")
    options = parser.parse_args()
    reviews = load_reviews(10_605)
    random.Random(0).shuffle(reviews)
    tokenizer = make_tokenizer(reviews)
    samples = tokenized(reviews, tokenizer)
    train_set, test_set = samples[: options.samples], samples[-1_000:]

    arguments = TrainingArguments(  # starts torch.distributed, where there are several processes
        output_dir="reviews-trainer",
        per_device_train_batch_size=16,  # a step of 128 accumulates eight of these, or four in two processes
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
    )
    client = evosample.torch.connect(options.address)
    experiment = client.create_experiment(
        "reviews-trainer",
        num_samples=len(train_set),
        num_epochs=options.epochs,
        mini_batch_size=128,  # over all processes
    )
    trainer = evosample.huggingface.Trainer(
        make_bert("SequenceClassification", tokenizer),
        arguments,
        experiment=experiment,
        train_dataset=train_set,
        eval_dataset=test_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"test accuracy {found:.1%} after {trainer.state.global_step} steps")
    trainer.accelerator.end_training()  # the private server ends with process 0


if __name__ == "__main__":
    main()
