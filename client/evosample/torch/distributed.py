"""This process's place in a training job, and when its gradients are exchanged."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed

from evosample import client as core
from evosample.errors import EvosampleError, InvalidArgumentError, UnavailableError, UsageError


def connect(address: str | Sequence[str] | None = None, **options: Any) -> core.Client:
    """`evosample.connect` for all processes of a job: without an address, process 0 starts a private server for all.

    Call it on all processes, after torch.distributed is initialised. A private server is reached from its own machine
    only, and ends with process 0: let that be the last to end (`torch.distributed.barrier()`). For a job on several
    machines start an `evosample-server`.

    Args:
        address, **options: as `evosample.connect` takes them.

    Raises:
        UsageError: a launcher has started several processes, but torch.distributed is not initialised yet.
    """
    if address is None and options.get("data_dir") is None:
        address = core.address_to_use()
    num_processes, num_launched = count_processes(), int(os.environ.get("WORLD_SIZE") or 1)
    if address is None and num_processes == 1 and num_launched > 1:
        raise UsageError(
            f"{num_launched} processes were launched (WORLD_SIZE), but torch.distributed is not initialised: each "
            "would have a private server of its own. Call torch.distributed.init_process_group first, or what calls "
            "it: Accelerator(), TrainingArguments(...)"
        )
    if address is not None or num_processes == 1:
        return core.connect(address, **options)
    client = error = None
    if distributed.get_rank() == 0:
        try:
            client = core.connect(**options)
        except EvosampleError as failed:  # told to the others too, who would wait for ever
            error = failed
    shared, failure = _broadcast([None if client is None else client.share(), None if error is None else str(error)])
    if error is not None:
        raise error
    if failure is not None:
        raise UnavailableError(f"process 0 could not start the job's private server: {failure}")
    if client is None:
        options.pop("data_dir", None)  # of the server, which process 0 has started
        client = core.connect(shared, **(options | core.PRIVATE))
    return client


class Job:
    """Which part of every step this process trains on: as torch.distributed says, or as it is told.

    Args:
        rank, size: of data parallelism. Where processes share their data (tensor or pipeline parallelism), they have
            the same rank: they get the same samples, and must hand over the same losses.
        run_id: names this start of the job. Default: what process 0 broadcasts to all.
    """

    def __init__(self, rank: int | None, size: int | None, run_id: str | None) -> None:
        if (rank is None) != (size is None):
            raise InvalidArgumentError(
                f"data_parallel_rank={rank!r}, data_parallel_size={size!r}: pass both, or neither to go by "
                "torch.distributed",
                field="data_parallel_rank",
            )
        self._rank_and_size = None if rank is None or size is None else (rank, size)
        self._run_id = run_id
        self._num_runs = 0

    def next_run(self, experiment: core.Experiment) -> dict[str, Any]:
        """What `Experiment.epochs` takes to join this job's next run. Called by all processes of the job.

        The first run begins with one broadcast. Each later one (after a `break`, or going on from a saved position)
        begins with a barrier: until all have left the run before, its losses are still on their way.

        Raises:
            InvalidArgumentError: the processes don't divide into `size` equal groups, or are on different servers.
        """
        num_processes = count_processes()
        if num_processes > 1 and self._num_runs:
            distributed.barrier()
        rank, size = self._rank_and_size or (distributed.get_rank() if num_processes > 1 else 0, num_processes)
        if num_processes > 1 and num_processes % size:
            raise InvalidArgumentError(
                f"data_parallel_size={size}: torch.distributed has {num_processes} processes, which do not divide into "
                "so many equal groups",
                field="data_parallel_size",
            )
        if self._run_id is None and num_processes > 1:
            self._run_id, first_name, first_uid = _broadcast([uuid.uuid4().hex, experiment.name, experiment.uid])
            if experiment.uid != first_uid:
                why = (
                    "All take part in one"
                    if experiment.name != first_name
                    else "Is each on a private server of its own? Use evosample.torch.connect() instead of "
                    "evosample.connect(), after torch.distributed is initialised"
                )
                raise InvalidArgumentError(
                    f"process {distributed.get_rank()} has another experiment ({experiment.name!r}, uid "
                    f"{experiment.uid}) than process 0 has ({first_name!r}, uid {first_uid}). {why}",
                    field="experiment",
                )
        elif self._run_id is None and size == 1:
            self._run_id = uuid.uuid4().hex
        run_id = self._run_id
        if run_id is not None and self._num_runs:
            run_id = f"{run_id}-{self._num_runs}"
        self._num_runs += 1
        shares_data = num_processes not in (1, size)
        return {
            "rank": rank,
            "world_size": size,
            "run_id": run_id,
            "process_id": f"{run_id}-rank-{rank}" if shares_data else None,
        }


def count_processes() -> int:
    """Processes of the job, as torch.distributed counts them; 1 where it is not initialised."""
    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_distributed else 1


def _broadcast(values: list[str | None]) -> list[Any]:
    """Process 0's values."""
    distributed.broadcast_object_list(values)
    return values


@contextlib.contextmanager
def gradient_sync(model: torch.nn.Module, is_on: bool) -> Iterator[None]:
    """Whether backward passes exchange gradients between processes: DDP's and FSDP's `no_sync`, FSDP2's setter."""
    no_sync = None if is_on else getattr(model, "no_sync", None)
    set_sync = None if is_on else getattr(model, "set_requires_gradient_sync", None)
    if no_sync is not None:
        with no_sync():
            yield
    elif set_sync is not None:
        set_sync(False)
        try:
            yield
        finally:
            set_sync(True)
    else:
        yield
