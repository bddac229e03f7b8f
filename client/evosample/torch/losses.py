"""Losses a sample, of models whose samples are sequences."""

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
