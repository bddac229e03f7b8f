"""Datasets of samples that are their own ids, and what workers may not do; importable where workers are spawned."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset


class Ids(Dataset[int | None]):
    """Samples that are their own ids; None for those that are lost, an error for those that are damaged."""

    def __init__(self, num_samples: int, lost: tuple[int, ...] = (), damaged: tuple[int, ...] = ()) -> None:
        self.num_samples = num_samples
        self.lost = lost
        self.damaged = damaged

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample_id: int) -> int | None:
        if sample_id in self.damaged:
            raise OSError(f"sample {sample_id} is damaged")
        return None if sample_id in self.lost else sample_id


class Announced(Ids):
    """Notes what it is told to come."""

    def __init__(self, num_samples: int, prefetch_samples: int) -> None:
        super().__init__(num_samples)
        self.prefetch_samples = prefetch_samples
        self.announced: list[int] = []
        self.num_ahead = 0

    def prefetch(self, sample_ids: NDArray[np.int64], num_ahead: int) -> None:
        self.announced += sample_ids.tolist()
        self.num_ahead = num_ahead


def refuse_connections(worker: int) -> None:
    """In a worker: any use of gRPC is an error from here on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker uses gRPC")

    for kind in (grpc.Channel, grpc.UnaryUnaryMultiCallable, grpc.UnaryStreamMultiCallable):
        for concrete in kind.__subclasses__():
            for method in ("__init__", "__call__"):
                setattr(concrete, method, refuse)
