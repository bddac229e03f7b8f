"""Rows and devices of collated batches, whatever their nesting."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from evosample.errors import InvalidArgumentError


def take_rows(batch: Any, positions: torch.Tensor, num_rows: int) -> Any:
    """Rows of a collated batch, whatever its nesting.

    Of tensors and arrays it takes rows of the first dimension; scalars and other leaves stay as they are. Mappings,
    dataclasses, named tuples, lists and tuples are gone into, but a list or tuple of `num_rows` elements that are not
    columns themselves (such as the strings that `default_collate` leaves alone) holds one element a sample. A list of
    samples that look like columns, such as n tensors of n rows, needs the loader's `take`.

    Args:
        batch: what a `collate_fn` made.
        positions: int64 [k].
        num_rows: samples in the batch.

    Raises:
        InvalidArgumentError: a tensor or array whose first dimension is not `num_rows`.
    """
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        if not batch.ndim:
            return batch
        if len(batch) != num_rows:
            raise InvalidArgumentError(
                f"the batch has a column of shape {tuple(batch.shape)}, expected {num_rows} rows: pass the loader "
                "take=..., a function that picks the rows of such batches",
                field="take",
            )
        return batch[positions.to(batch.device)] if isinstance(batch, torch.Tensor) else batch[positions.numpy()]
    is_sequence = isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
    if is_sequence and len(batch) == num_rows and not _holds_columns(_children(batch), num_rows):
        return type(batch)(batch[position] for position in positions.tolist())
    return _with_children(batch, lambda child: take_rows(child, positions, num_rows))


def _holds_columns(values: Iterable[Any], num_rows: int) -> bool | None:
    """Whether these are columns of a batch rather than `num_rows` samples; None if nothing tells."""
    found = None
    for value in values:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            is_column = len(value) == num_rows if value.ndim else None
        else:
            is_column = _holds_columns(_children(value), num_rows)
            if is_column is None and isinstance(value, (list, tuple)) and len(value) == num_rows:
                is_column = True  # such as strings, one a sample
        if is_column is False:
            return False
        found = found or is_column
    return found


def _children(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (list, tuple)):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return ()


def with_own_containers(batch: Any) -> Any:
    """A collated batch whose mappings, lists and other containers may be changed; what they hold is the same."""
    return _with_children(batch, with_own_containers)


def moved(batch: Any, device: torch.device, non_blocking: bool = True) -> Any:
    """A collated batch on another device, whatever its nesting; what can move itself does so."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=non_blocking and device.type != "cpu")
    if hasattr(batch, "to"):
        return batch.to(device)
    return _with_children(batch, lambda child: moved(child, device, non_blocking))


def _with_children(batch: Any, function: Callable[[Any], Any]) -> Any:
    """A container made anew with a function applied to its elements; what is no container as it is."""
    if isinstance(batch, Mapping):
        children = {key: function(value) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return children
        made = copy.copy(batch)  # some mappings can't be made from another, such as defaultdict
        made.update(children)
        return made
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(function, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(function, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: function(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    return batch
