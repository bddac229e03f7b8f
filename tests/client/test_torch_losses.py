"""Losses a sample of language models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import evosample
from evosample.torch import language_model_losses

M, LENGTH, VOCABULARY = 3, 6, 11


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 6, 4 and 1 tokens; what follows is padding."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCABULARY, (M, LENGTH), generator=generator)
    labels[1, 4:] = -100
    labels[2, 1:] = -100
    return torch.randn(M, LENGTH, VOCABULARY, generator=generator, requires_grad=True), labels


@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_of_a_sequence_is_the_mean_over_its_own_tokens(shift: bool) -> None:
    logits, labels = logits_and_labels()
    losses = language_model_losses(logits, labels, shift=shift)
    for row in range(M):
        pairs = [(t, labels[row, t + shift]) for t in range(LENGTH - shift) if labels[row, t + shift] != -100]
        one_by_one = [functional.cross_entropy(logits[row, t], label) for t, label in pairs]
        expected = torch.stack(one_by_one).mean() if one_by_one else torch.tensor(0.0)
        torch.testing.assert_close(losses[row], expected)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_sequence_without_labels_has_nothing_to_teach() -> None:
    logits, labels = logits_and_labels()
    assert language_model_losses(logits, labels)[2] == 0


def test_another_index_may_be_ignored() -> None:
    logits, labels = logits_and_labels()
    other = labels.where(labels != -100, 0)
    labels = labels.where(labels != 0, -100)
    torch.testing.assert_close(
        language_model_losses(logits, other, ignore_index=0), language_model_losses(logits, labels)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_not_summed_in_half_precision(dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels()
    losses = language_model_losses(logits.to(dtype), labels)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.float(), language_model_losses(logits.to(dtype).float(), labels))


def test_shapes_that_do_not_fit_are_told() -> None:
    logits, labels = logits_and_labels()
    with pytest.raises(evosample.InvalidArgumentError, match=r"\(3, 6, 11\) and labels \(3, 5\)"):
        language_model_losses(logits, labels[:, 1:])
