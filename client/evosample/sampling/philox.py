"""Counter-based random numbers: every draw is a pure function of (seed, purpose, epoch, step, row).

Nothing is carried from one draw to the next, so a resumed job, another server or another world size draws the same
numbers for the same rows. The bits come from Philox-4x64-10 (Salmon et al., 2011) through numpy's `random_raw`, whose
stream numpy guarantees across versions; that of `Generator`'s methods it does not.
"""

from __future__ import annotations

import enum
import functools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 2**16
"""What is computed of so many rows at a time stays in the processor's cache."""

_BITS_OF_ONE = np.float64(1).view(np.uint64)


class Purpose(enum.IntEnum):
    """Keeps the streams of different draws apart. The numbers are part of the definition: never change one."""

    SELECT = 0
    PRUNE = 1
    SHUFFLE = 2
    SHUFFLE_SHARDS = 3
    SHUFFLE_BLOCKS = 4
    SHUFFLE_HIDDEN = 5
    FLOORS = 6
    SHUFFLE_GUARDED = 7


def random_bits(seed: int, purpose: Purpose, epoch: int, step: int, first: int, count: int) -> NDArray[np.uint64]:
    """Random bits of the rows [first, first + count) of one stream.

    Philox's key is (seed, purpose), its 256-bit counter starts at (first // 4, step, epoch, 0): four numbers a count.

    Args:
        seed: 0 <= seed < 2**64.
        first: index of the first row in the stream.
        count: number of rows.

    Returns:
        uint64 [count].
    """
    block, skipped = divmod(first, 4)
    generator = _generator()
    state, philox = generator.state, generator.philox
    state["state"]["key"][:] = seed, purpose
    state["state"]["counter"][:] = block, step, epoch, 0
    philox.state = state
    num_bits = skipped + count
    if num_bits <= BLOCK_ROWS:
        return philox.random_raw(num_bits)[skipped:]
    bits = np.empty(num_bits, np.uint64)
    for done in range(0, num_bits, BLOCK_ROWS):  # numpy holds Python's lock meanwhile: in between others may run
        bits[done : done + BLOCK_ROWS] = philox.random_raw(min(BLOCK_ROWS, num_bits - done))
    return bits[skipped:]


class _Generator(threading.local):
    """A thread's generator, and the state that it is put into: several times faster than making one for each call."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state: Any = self.philox.state  # of a new one: nothing is left in its buffer


@functools.cache
def _generator() -> _Generator:
    """Made when it is first needed: numpy.random takes 15 ms to import."""
    return _Generator()


def uniforms(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Variates in (0, 1): (bits // 2**12 + 1/2) / 2**52, exact in float64 and never 0 or 1."""
    ones_and_more = bits >> np.uint64(12)
    ones_and_more |= _BITS_OF_ONE  # as float64 in [1, 2), the 52 bits being its mantissa
    variates = ones_and_more.view(np.float64)
    variates -= 1 - 2.0**-53
    return variates


def exponentials(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Exp(1) variates: -log(u), u as in `uniforms`."""
    variates = uniforms(bits)
    np.log(variates, out=variates)
    return np.negative(variates, out=variates)
