"""Losses a sample of models that give the mean of their batch only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from evosample.errors import InvalidArgumentError
from evosample.torch import language_model_losses

_CHECKED_BATCHES = 20
_IGNORED = -100

Formula = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of logits and labels: the loss of each sample, and how much it counts in the model's own mean, [m] each."""


class ModelLosses:
    """losses(model, inputs), [m]: those that the model's own loss is the mean of.

    Which these are is found out from the first batches, where the model is given the labels too: its own loss must be
    the mean of one of
    - the cross entropy of each sequence's tokens, with labels shifted (causal models) or in the place of their
      prediction (masked and encoder-decoder models, tagging), averaged over the tokens of a sequence: long and short
      sequences are compared on equal terms;
    - the cross entropy of each sample's class;
    - the squared error, or the binary cross entropy, of each sample's numbers, averaged over them.
    Later batches go without labels, so that the model need not work out its own loss as well; but for encoder-decoder
    models, which may make their inputs of them, and for models that are not of transformers itself.

    Raises:
        InvalidArgumentError: the model's own loss is the mean of none of them, as where it adds the losses of routers,
            weighs classes, or has none. Then the trainer needs `per_sample_losses`.
    """

    def __init__(self, *, keeps_labels: bool) -> None:
        self._keeps_labels = keeps_labels
        self._formulas: list[Formula] | None = None  # those that all batches so far agree with
        self._num_checked = 0

    def __call__(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor):
            raise _unknown(f"the batch has no tensor of labels, only {', '.join(inputs)}")
        is_checked = self._num_checked >= _CHECKED_BATCHES
        if is_checked and not self._keeps_labels:
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**inputs)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, torch.Tensor):
            raise _unknown(f"the model returns no logits but {_names(outputs)}")
        if self._formulas is None:
            self._formulas = _formulas(logits, labels)
        if not is_checked:
            self._formulas = _matching(self._formulas, logits.detach(), labels, outputs.get("loss"))
            self._num_checked += 1
        return self._formulas[0](logits, labels)[0]


def _matching(
    formulas: list[Formula], logits: torch.Tensor, labels: torch.Tensor, own_loss: torch.Tensor | None
) -> list[Formula]:
    """The formulas whose mean is the model's own loss."""
    if own_loss is None:
        raise _unknown("the model returns no loss of its own to go by")
    own, tolerance = own_loss.item(), 1e-4 if own_loss.dtype == torch.float32 else 1e-2
    if math.isnan(own):  # no label counts
        return formulas
    means = [_mean(formula, logits, labels) for formula in formulas]
    matching = [
        formula
        for formula, mean in zip(formulas, means, strict=True)
        if math.isclose(mean, own, rel_tol=tolerance, abs_tol=tolerance)
    ]
    if not matching:
        said = " or ".join(f"{mean:g}" for mean in means)
        raise _unknown(f"the model's own loss is {own:g}, but the mean of what fits its logits is {said}")
    return matching


def _formulas(logits: torch.Tensor, labels: torch.Tensor) -> list[Formula]:
    """The formulas that logits and labels of these shapes may have."""
    if labels.is_floating_point():
        if logits.numel() == labels.numel():
            return [_squared_errors, _binary_losses]
    elif logits.ndim == 3 and labels.shape == logits.shape[:2]:
        return [_shifted_token_losses, _token_losses]
    elif logits.ndim == 2 and labels.shape == logits.shape[:1]:
        return [_class_losses]
    raise _unknown(f"logits have shape {tuple(logits.shape)} and labels {labels.dtype} {tuple(labels.shape)}")


def _mean(formula: Formula, logits: torch.Tensor, labels: torch.Tensor) -> float:
    losses, counts = formula(logits, labels)
    return ((losses * counts).sum() / counts.sum()).item()


def _shifted_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return language_model_losses(logits, labels), (labels[:, 1:] != _IGNORED).sum(1)


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return language_model_losses(logits, labels, shift=False), (labels != _IGNORED).sum(1)


def _class_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.cross_entropy(logits.float(), labels, reduction="none"), labels != _IGNORED


def _squared_errors(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _averaged(functional.mse_loss, logits, labels)


def _binary_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _averaged(functional.binary_cross_entropy_with_logits, logits, labels)


def _averaged(
    loss: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    predictions, targets = (values.float().reshape(len(labels), -1) for values in (logits, labels))
    losses = loss(predictions, targets, reduction="none").mean(1)
    return losses, torch.ones_like(losses)


def _names(outputs: Any) -> str:
    return ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__


def _unknown(why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{why}: the loss of each sample can't be told. Pass the trainer per_sample_losses=..., a function of (model, "
        "inputs) that returns them, [m]",
        field="per_sample_losses",
    )
