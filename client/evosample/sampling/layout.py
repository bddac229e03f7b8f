"""Which rows of an epoch's table are whose, and how a rank's losses are written down."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.scores import check_losses

# The bits of numpy's float32 NaN. Losses are stored and hashed as their bits XOR these, so that zero bytes mean
# "not reported": nothing has to be initialised, and a gap in a column is a gap in the losses.
_NAN_BITS = np.uint32(0x7FC00000)
_INFINITY_BITS = 0x7F800000


def sample_id_dtype(num_samples: int) -> np.dtype[Any]:
    """Little-endian uint32, or uint64 where the ids need it."""
    return np.dtype("<u4" if num_samples <= 2**32 else "<u8")


def part(column: NDArray[Any], step_rows: int, rank: int, world_size: int) -> NDArray[Any]:
    """The rows of `rank` in a column of whole steps: a view, [num_steps, step_rows // world_size].

    Step t is the rows [t * step_rows, (t + 1) * step_rows); rank r of W has the r-th of W equal contiguous parts.
    """
    view: NDArray[Any] = column.reshape(-1, world_size, step_rows // world_size)[:, rank]
    return view


def loss_bits(losses: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Losses as they are stored: float32 bits XOR 0x7fc00000, 0 where not reported (NaN in `losses`).

    Unlike a row that was not reported, one reported with a non-finite loss must be +inf in `losses`.
    """
    return losses.view(np.uint32) ^ _NAN_BITS


def losses_of_bits(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The inverse of `loss_bits`."""
    return (bits ^ _NAN_BITS).view(np.float32)


def recorded_losses(losses: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Losses as they are recorded, non-finite ones as +inf, and how many of them there are.

    Raises:
        InvalidValue: a finite loss is negative.
    """
    # As a rule one look finds neither a sign nor a NaN.
    if not losses.size or np.maximum.reduce(losses.view(np.uint32), axis=None) < _INFINITY_BITS:
        return losses, 0
    check_losses(losses)
    finite = np.isfinite(losses)
    return np.where(finite, losses, np.float32(np.inf)), losses.size - int(np.count_nonzero(finite))


def table_checksum(*columns: NDArray[Any] | None) -> int:
    """CRC-32 (zlib's) of a table's columns as they are stored, one after the other; what is None is left out."""
    crc = 0
    for rows in columns:
        if rows is not None:
            crc = zlib.crc32(rows.astype(rows.dtype.newbyteorder("<"), copy=False).data, crc)
    return crc


def checksum(losses: NDArray[np.float32]) -> int:
    """CRC-32 (zlib's) of a part's losses of one epoch as they are stored, little-endian, in the part's order."""
    return zlib.crc32(np.ascontiguousarray(loss_bits(losses).astype("<u4", copy=False)).data)
