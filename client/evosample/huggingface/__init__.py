"""Hugging Face transformers: the `Trainer`, on what an experiment selects.

trainer = evosample.huggingface.Trainer(model, args, experiment=experiment, train_dataset=train_set, ...)
trainer.train()
"""

from evosample.huggingface.trainer import Trainer

__all__ = ["Trainer"]
