"""Which policies there are: those of this package, and those that other packages bring along."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue
from evosample.sampling.policies import (
    UCB,
    BatchLevel,
    Columns,
    EvolvedSampling,
    InfoBatch,
    Kakurenbo,
    Kept,
    OrderedSGD,
    Policy,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
)

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

ENTRY_POINTS = "evosample.policies"
"""The group of entry points whose objects are policy classes."""

POLICIES: dict[str, type[Policy]] = {
    "evolved_sampling": EvolvedSampling,
    "uniform": Uniform,
    "random_subset": RandomSubset,
    "info_batch": InfoBatch,
    "kakurenbo": Kakurenbo,
    "ordered_sgd": OrderedSGD,
    "ucb": UCB,
    "selective_backprop": SelectiveBackprop,
}
"""The policies of this package by their names in the protocol."""


def _entry_points(name: str | None = None) -> EntryPoints:
    from importlib.metadata import entry_points  # most never need it, and it would take 20 ms of every import

    found = entry_points(group=ENTRY_POINTS)
    return found if name is None else found.select(name=name)


@dataclass(frozen=True)
class MissingPolicy(Policy):
    """Stands for a policy of a package that is not installed here: what it is called can be told, but not what it does.

    Attributes:
        name: of its entry point.
        settings: as they were given.
        columns, reported_columns: see Policy.
    """

    batch_level: ClassVar[BatchLevel] = "scored"  # so that both batch sizes stay as they are
    is_adaptive: ClassVar[bool] = True

    name: str
    settings: Mapping[str, bool | int | float | str]
    columns: Mapping[str, float] = field()  # type: ignore[misc]  # of the instance here
    reported_columns: tuple[str, ...] = field()  # type: ignore[misc]

    def missing(self, where: str = "where this runs") -> InvalidValue:
        """What to raise where it is needed."""
        others = ", ".join(point.name for point in _entry_points())
        return InvalidValue(
            "policy",
            self.name,
            f"one that is installed {where}: {others or 'there is none but those of evosample'}. Install the package "
            f"with the entry point {self.name!r} in the group {ENTRY_POINTS}, where clients and servers run",
        )

    def fold(self, before: Columns, losses: NDArray[np.float32], reported: Columns) -> Columns:
        raise self.missing()

    def keep(self, columns: Columns, num_places: int, progress: float, bits: NDArray[np.uint64]) -> Kept:
        raise self.missing()


def custom_policy(name: str) -> type[Policy] | None:
    """The policy that an installed package brings along under this name of an entry point; None if there is none.

    Raises:
        InvalidValue: it can't be imported, or is no policy.
    """
    for point in _entry_points(name=name):
        try:
            policy = point.load()
        except Exception as error:
            raise InvalidValue("policy", point.value, f"something that can be imported: {error!r}") from error
        if not (isinstance(policy, type) and issubclass(policy, Policy) and dataclasses.is_dataclass(policy)):
            raise InvalidValue("policy", point.value, "a dataclass that is a subclass of evosample.Policy")
        return policy
    return None


def name_of(policy: Policy) -> tuple[str, bool]:
    """A policy's name, and whether it is one of this package.

    Raises:
        InvalidValue: no entry point has it.
    """
    if isinstance(policy, MissingPolicy):
        return policy.name, False
    for name, known in POLICIES.items():
        if type(policy) is known:
            return name, True
    return _custom_name(type(policy)), False  # type: ignore[arg-type]  # mypy looks for the hash of an instance


@cache  # looking for what is installed takes ten milliseconds and more
def _custom_name(policy: type[Policy]) -> str:
    for point in _entry_points():
        with suppress(InvalidValue):  # of another package
            if custom_policy(point.name) is policy:
                return point.name
    raise InvalidValue(
        "policy",
        policy,
        f"a policy of evosample, or one that an installed package names in an entry point of the group {ENTRY_POINTS}",
    )
