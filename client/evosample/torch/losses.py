"""What a policy needs to know of each sample: losses of sequences, and predictions."""

from __future__ import annotations

import torch
from torch.nn import functional

from evosample.errors import InvalidArgumentError


def language_model_losses(
    logits: torch.Tensor, labels: torch.Tensor, *, shift: bool = True, ignore_index: int = -100
) -> torch.Tensor:
    """The mean cross entropy of each sequence's tokens: long and short sequences are compared on equal terms.

    loss_i = mean over t with label_it != ignore_index of -log softmax(logits_it)[label_it]; 0 without any such t.

    Args:
        logits: [m, length, vocabulary].
        labels: int64 [m, length]; tokens labelled `ignore_index` (padding, a prompt) don't count.
        shift: the logits at t are for the label at t + 1: a causal model with its inputs as labels. False where labels
            stand at the place of their prediction: encoder-decoder models, masked ones, tagging.
        ignore_index: as in `torch.nn.functional.cross_entropy`.

    Returns:
        float32 [m] (float64 of such logits), with its graph.

    Raises:
        InvalidArgumentError: the shapes don't fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise InvalidArgumentError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected "
            "[m, length, vocabulary] and [m, length]",
            field="labels",
        )
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=ignore_index)
    return losses.sum(1) / (labels != ignore_index).sum(1).clamp(min=1)


def prediction_columns(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Kakurenbo needs beside the loss: whether a prediction is right, and the probability that it is given.

    Args:
        logits: [m, classes].
        labels: int64 [m].

    Returns:
        "correct" (1 or 0) and "confidence", max_c softmax(logits_i)_c: float32 [m] each, without a graph.

    Raises:
        InvalidArgumentError: the shapes don't fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InvalidArgumentError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected [m, classes] and [m]",
            field="labels",
        )
    confidence, predicted = logits.detach().float().softmax(1).max(1)
    return {"correct": (predicted == labels).float(), "confidence": confidence}
