"""PyTorch: a loader that yields what there is to train on, over any map-style dataset.

per_sample = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
loader = evosample.torch.Loader(train_set, experiment, model=model, score=per_sample)
for epoch in range(num_epochs):
    for batch in loader:
        loss = loader.mean(per_sample(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""

from evosample.torch.columns import take_rows
from evosample.torch.distributed import connect
from evosample.torch.figures import EpochFigures
from evosample.torch.loader import Loader, MetaBatch, Prefetching
from evosample.torch.losses import language_model_losses, prediction_columns

__all__ = [
    "EpochFigures",
    "Loader",
    "MetaBatch",
    "Prefetching",
    "connect",
    "language_model_losses",
    "prediction_columns",
    "take_rows",
]
