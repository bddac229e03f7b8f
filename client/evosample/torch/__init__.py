"""PyTorch: a loader that yields what there is to train on, over any map-style dataset.

loader = evosample.torch.Loader(train_set, experiment)
for epoch in range(num_epochs):
    for images, labels in loader:
        loss = loader.mean(F.cross_entropy(model(images), labels, reduction="none"))
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
