"""The client: connect to a server, create experiments, train on what they select."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from evosample.epoch import as_invalid_argument
from evosample.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from evosample.private_server import PrivateServer
from evosample.rpc import Connection
from evosample.run import OnUnavailable, Run
from evosample.sampling import (
    EvolvedSampling,
    ExperimentSpec,
    ImportanceWeight,
    InvalidValue,
    Policy,
    check_int,
    check_name,
    check_seconds,
)
from evosample.v1 import selection_pb2 as pb
from evosample.wire import (
    DEFAULT_PROJECT,
    ExperimentName,
    ExperimentStatus,
    Position,
    check_address,
    column,
    column_bytes,
    ref_to_proto,
    spec_to_proto,
    status_from_proto,
)

_log = logging.getLogger("evosample")

_SCORE_DTYPES = {"scores": np.float32, "sampling_weights": np.float32, "num_visits": np.uint32}
_IMPORT_ROWS = 80_000  # 12 bytes each: just under 1 MiB


class ExportedScores(NamedTuple):
    """The scores of all samples at an epoch's start, in the order of sample ids.

    Attributes:
        epoch: the epoch at whose start they stood; num_epochs after the last.
        scores: float32 [num_samples].
        sampling_weights: float32 [num_samples].
        num_visits: uint32 [num_samples], finite losses so far.
    """

    epoch: int
    scores: NDArray[np.float32]
    sampling_weights: NDArray[np.float32]
    num_visits: NDArray[np.uint32]


def connect(
    address: str | Sequence[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    connect_timeout_s: float = 10.0,
    outage_timeout_s: float = 300.0,
) -> Client:
    """Connect to a selection server or, without an address, start a private one that ends with this process.

    Args:
        address: HOST:PORT or unix:/PATH of a running `evosample-server`; or several of them on one Redis, in a list or
            separated by commas; or a name that stands for several. When one fails, calls go to another. The connection
            opens with the first call.
        data_dir: where a private server keeps its scores, for jobs that are resumed. Default: nowhere for long.
        connect_timeout_s: how long the first call tries to reach a server.
        outage_timeout_s: how long later calls wait for an absent server. Training goes on meanwhile, for any time, with
            what was fetched ahead: only at an epoch's end it has to wait.

    Raises:
        UnavailableError: the private server could not be started.
        InvalidArgumentError: `data_dir` together with an address.
    """
    if address is not None and data_dir is not None:
        raise InvalidArgumentError(
            f"data_dir={os.fspath(data_dir)!r}: only a private server takes it; the one at {address} has its own",
            field="data_dir",
        )
    server = None
    if address is None:
        server = PrivateServer(data_dir)
        address = server.address
    with as_invalid_argument():
        addresses = tuple(address if isinstance(address, (list, tuple)) else str(address).split(","))
        if not addresses:
            raise InvalidValue("address", address, "at least one HOST:PORT")
        for each in addresses:
            check_address("address", each)
        check_seconds("connect_timeout_s", connect_timeout_s)
        check_seconds("outage_timeout_s", outage_timeout_s)
    connection = Connection(
        addresses,
        connect_timeout_s=connect_timeout_s,
        outage_timeout_s=outage_timeout_s,
        server=server,
    )
    return Client(connection)


class Client:
    """A connection to a server; made by `connect`. Pickling keeps the address only."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return Client, (self._connection,)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Report what is left of all runs, close the connection, and stop a private server."""
        with contextlib.ExitStack() as stack:  # one that fails keeps none of the others from being closed
            stack.callback(self._connection.close)
            for run in list(self._runs):
                stack.callback(run.close)

    @property
    def address(self) -> str:
        """Where the server is, or the servers are, separated by commas: what `connect` takes."""
        return ",".join(self._connection.addresses)

    def share(self) -> str:
        """The address for other processes of this machine, which a private server then expects as further ranks."""
        self._connection.is_shared = True
        return self.address

    def create_experiment(
        self,
        name: str,
        *,
        num_samples: int,
        num_epochs: int,
        meta_batch_size: int,
        mini_batch_size: int | None = None,
        policy: Policy | None = None,
        importance_weight: ImportanceWeight = "none",
        seed: int = 0,
        initial_scores: ExportedScores | None = None,
        shard_sizes: Sequence[int] = (),
        shuffle_block_samples: int | None = None,
        project: str = DEFAULT_PROJECT,
    ) -> Experiment:
        """Create an experiment, or find the one of this name if its spec is equal.

        Args:
            name: unique in its project.
            num_samples: n, samples of the dataset; sample ids are 0..n-1.
            num_epochs: epochs of the whole run.
            meta_batch_size: B, samples that a step loads, over all ranks.
            mini_batch_size: b, samples of them that are back-propagated, over all ranks. Default: all of them.
            policy: the selection method. Default: ES.
            importance_weight: "none", "unbiased" or "self_normalized"; see `ExperimentSpec`.
            seed: of all random draws, 0 <= seed < 2**64.
            initial_scores: what to start from, such as an earlier experiment's `export_scores()`: the first epoch then
                selects as well. An experiment that has begun to train keeps the scores that it has.
            shard_sizes: samples of each shard, whose ids follow each other: epochs are shuffled so that shards are read
                nearly one after the other. Default: one shuffle over all samples.
            shuffle_block_samples: over how many samples such a shuffle goes, in whole shards. Default: ten shards.
            project: what the experiment belongs to.

        Raises:
            InvalidArgumentError: a value is out of range, an epoch could have no step, or no step would ever select.
            AlreadyExistsError: the name is taken by an experiment with another spec.
        """
        if initial_scores is not None and not isinstance(initial_scores, ExportedScores):
            raise InvalidArgumentError(
                f"initial_scores={type(initial_scores).__name__}: expected what export_scores() gives; arrays of other "
                "origin go into evosample.ExportedScores(epoch=0, scores=..., sampling_weights=..., num_visits=...)",
                field="initial_scores",
            )
        with as_invalid_argument():
            spec = ExperimentSpec(
                num_samples=num_samples,
                num_epochs=num_epochs,
                meta_batch_size=meta_batch_size,
                mini_batch_size=cast(int, mini_batch_size),  # None stands for the default
                policy=EvolvedSampling() if policy is None else policy,
                importance_weight=importance_weight,
                seed=seed,
                warm_start=initial_scores is not None,
                shard_sizes=cast(tuple[int, ...], shard_sizes),
                shuffle_block_samples=cast(int, shuffle_block_samples),
            )
            request = pb.CreateExperimentRequest(ref=self._ref(name, project), spec=spec_to_proto(spec))
        if initial_scores is not None:
            for field, column_dtype in _SCORE_DTYPES.items():  # before anything is created
                checked_column(field, getattr(initial_scores, field), column_dtype, spec.num_samples)
        created = self._connection.call("CreateExperiment", request).experiment
        experiment = self._experiment(created)
        if initial_scores is not None and not created.generation:
            try:
                experiment.import_scores(
                    initial_scores.scores,
                    sampling_weights=initial_scores.sampling_weights,
                    num_visits=initial_scores.num_visits,
                )
            except FailedPreconditionError:
                if not experiment.status().generation:  # else another rank has brought them and begun
                    raise
        return experiment

    def get_experiment(self, name: str, *, project: str = DEFAULT_PROJECT) -> Experiment:
        """Find an experiment by name; raises NotFoundError."""
        request = pb.GetExperimentRequest(ref=self._checked_ref(name, project))
        return self._experiment(self._connection.call("GetExperiment", request).experiment)

    def list_experiments(self, *, project: str = DEFAULT_PROJECT) -> Iterator[ExperimentStatus]:
        """All experiments of a project, in the order of their names."""
        request = pb.ListExperimentsRequest(project=project)
        while True:
            page = self._connection.call("ListExperiments", request)
            yield from map(status_from_proto, page.experiments)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete_experiment(self, name: str, *, project: str = DEFAULT_PROJECT) -> None:
        """Delete an experiment with its scores; raises NotFoundError."""
        found = self.get_experiment(name, project=project)
        request = pb.DeleteExperimentRequest(ref=found.ref)  # with its uid: sent twice it deletes no other of the name
        with contextlib.suppress(NotFoundError):  # the first answer got lost
            self._connection.call("DeleteExperiment", request)

    def _checked_ref(self, name: str, project: str) -> pb.ExperimentRef:
        with as_invalid_argument():
            return self._ref(name, project)

    @staticmethod
    def _ref(name: str, project: str) -> pb.ExperimentRef:
        return ref_to_proto(ExperimentName(check_name("project", project), check_name("name", name)))

    def _experiment(self, message: pb.Experiment) -> Experiment:
        return Experiment(self._connection, status_from_proto(message), self._runs)


class Experiment:
    """An experiment on the server; made by a client.

    Attributes:
        project, name, uid: what it is called.
        spec: what was fixed at its creation, with all defaults filled in.
    """

    def __init__(self, connection: Connection, status: ExperimentStatus, runs: weakref.WeakSet[Run]) -> None:
        self.project = status.project
        self.name = status.name
        self.uid = status.uid
        self.spec = status.spec
        self._connection = connection
        self._runs = runs

    def __repr__(self) -> str:
        return f"Experiment({self.project}/{self.name}, uid={self.uid})"

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch, 0 <= epoch < num_epochs."""
        with as_invalid_argument():
            return self.spec.shape(check_int("epoch", epoch, 0, self.spec.num_epochs - 1)).num_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.spec.total_steps

    def status(self) -> ExperimentStatus:
        """Where the experiment stands now, with everything that this process has handed over."""
        self._flush()
        return status_from_proto(
            self._connection.call("GetExperiment", pb.GetExperimentRequest(ref=self.ref)).experiment
        )

    def epochs(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        run_id: str | None = None,
        position: tuple[int, int] | None = None,
        read_ahead: int = 0,
        wait_timeout_s: float = 1800.0,
        straggler_timeout_s: float | None = None,
        on_unavailable: OnUnavailable = "error",
        on_missing_epoch: Literal["error", "current"] = "error",
        process_id: str | None = None,
    ) -> Run:
        """Join a run of the experiment, and go through its epochs from `position`.

        Args:
            rank: this process's number in the job, 0 <= rank < world_size.
            world_size: W, processes of the job; a divisor of the meta-batch and the mini-batch size.
            run_id: names this start of the job: the same on all ranks, another for every start. Needed if W > 1.
            position: (epoch, step) from which to go on, such as an earlier run's `position` after its `flush()`.
                Default: the start of the current epoch.
            read_ahead: batches that may be taken before the losses of the one that is due are handed over.
            wait_timeout_s: how long to wait for other ranks at an epoch's end; then WaitTimeoutError names them.
            straggler_timeout_s: how long after the first rank has finished an epoch the others are waited for; then it
                ends without them, and they go on with the next one. Default: as long as it takes.
            on_unavailable: what to do when no server has answered for `outage_timeout_s` and ids have run out: raise an
                "error", or go on with epochs drawn "uniform"ly until one answers. Those report no losses.
            on_missing_epoch: what to do when the epoch of `position` is not retained: raise an "error", or go on at the
                start of the "current" epoch.
            process_id: the same on processes that share a rank's samples (tensor or pipeline parallelism), which must
                hand over the same losses. Default: this process has its rank for itself, and whichever takes the same
                rank later supersedes it.

        Raises:
            InvalidArgumentError: a value is out of range, or differs from the other ranks'.
            EpochNotRetainedError: the position is not retained, or not reached yet.
            FailedPreconditionError: the experiment has finished.
        """
        if run_id is None:
            if world_size != 1:
                raise InvalidArgumentError(
                    f"run_id=None with world_size={world_size!r}: pass the same run_id on all ranks, and another for "
                    "every start of the job",
                    field="run_id",
                )
            run_id = uuid.uuid4().hex
        with as_invalid_argument():
            world_size = self.spec.check_world_size(world_size)
            check_int("rank", rank, 0, world_size - 1)
            check_name("run_id", run_id)
            process_id = check_name("process_id", uuid.uuid4().hex if process_id is None else process_id)
            check_int("read_ahead", read_ahead, 0, 2**31)
            _check_choice("on_unavailable", on_unavailable, OnUnavailable)
            _check_choice("on_missing_epoch", on_missing_epoch, Literal["error", "current"])
            check_seconds("wait_timeout_s", wait_timeout_s)
            if straggler_timeout_s is not None:
                check_seconds("straggler_timeout_s", straggler_timeout_s)
            start = None if position is None else _checked_position(position)
        if self._connection.server is not None and not self._connection.is_shared and world_size != 1:
            _log.warning(
                "only this process knows of its private server: is every rank in it? Others connect to client.share(); "
                "evosample.torch.connect() sees to that"
            )
        request = pb.JoinRunRequest(
            ref=self.ref,
            run_id=run_id,
            rank=rank,
            world_size=world_size,
            current_if_not_retained=on_missing_epoch == "current",
            straggler_timeout_ms=None if straggler_timeout_s is None else round(1000 * straggler_timeout_s),
            process_id=process_id,
        )
        if start is not None:
            request.position.CopyFrom(pb.Position(epoch=start.epoch, step=start.step))
        # This run takes over from one of this process: what that one has yet to report belongs before the new position.
        predecessors = [run for run in self._active_runs() if run.rank == rank]
        for run in predecessors:
            run.flush()
        joined = self._connection.call("JoinRun", request)
        for run in predecessors:
            run.close()
        at = Position(joined.position.epoch, joined.position.step)
        if at.epoch and (start is None or at.epoch < start.epoch - 1 or at.epoch > start.epoch + 1):
            _log.warning("experiment %s goes on at epoch %d of %d", self.name, at.epoch, self.spec.num_epochs)
        if joined.unreported_rows:
            _log.warning(
                "experiment %s: %d rows of epoch %d before step %d have no losses, and count as not visited. Call "
                "run.flush() before you save run.position",
                self.name,
                joined.unreported_rows,
                at.epoch,
                at.step,
            )
        run = Run(
            self._connection,
            self.spec,
            request,
            joined,
            read_ahead=read_ahead,
            wait_timeout_s=wait_timeout_s,
            on_unavailable=on_unavailable,
        )
        self._runs.add(run)
        return run

    def export_scores(self, *, epoch: int | None = None) -> ExportedScores:
        """The scores at an epoch's start. Default: the latest, with all losses of epochs that every rank has finished.

        Raises:
            FailedPreconditionError: the epoch's scores are no longer retained.
        """
        if epoch is not None:
            with as_invalid_argument():
                check_int("epoch", epoch, 0, self.spec.num_epochs)
        self._flush()
        request = pb.ExportScoresRequest(ref=self.ref, epoch=epoch)
        parts = self._connection.collect("ExportScores", request)
        return ExportedScores(
            parts[0].epoch,
            np.concatenate([column(part.scores, np.float32) for part in parts]),
            np.concatenate([column(part.sampling_weights, np.float32) for part in parts]),
            np.concatenate([column(part.num_visits, np.uint32) for part in parts]),
        )

    def import_scores(
        self,
        scores: ArrayLike,
        *,
        sampling_weights: ArrayLike | None = None,
        num_visits: ArrayLike | None = None,
    ) -> None:
        """Start from known scores instead of 1/n each, before the first run joins. All of them are taken, or none.

        Args:
            scores: float32 [num_samples], s, finite and >= 0.
            sampling_weights: float32 [num_samples], w, finite and >= 0. Default: the scores.
            num_visits: uint32 [num_samples], losses behind each score. Samples with 0 are visited before all others.
                Default: 1 each.

        Raises:
            InvalidArgumentError: another number of samples, or values out of range.
            FailedPreconditionError: a run has joined.
        """
        weights = scores if sampling_weights is None else sampling_weights
        visits = np.ones(self.spec.num_samples) if num_visits is None else num_visits
        columns = [
            checked_column(field, values, dtype, self.spec.num_samples)
            for (field, dtype), values in zip(_SCORE_DTYPES.items(), (scores, weights, visits), strict=True)
        ]

        def requests() -> Iterator[pb.ImportScoresRequest]:
            for first in range(0, self.spec.num_samples, _IMPORT_ROWS):
                rows = (column_bytes(values[first : first + _IMPORT_ROWS]) for values in columns)
                message = pb.ImportScoresRequest(
                    first_sample=first, scores=next(rows), sampling_weights=next(rows), num_visits=next(rows)
                )
                if not first:
                    message.ref.CopyFrom(self.ref)
                    message.num_samples = self.spec.num_samples
                yield message

        self._connection.send("ImportScores", requests)

    def pin_epoch(self, name: str, epoch: int) -> None:
        """Keep an epoch's scores and losses under a name, so that a run can go back to it for longer than to others.

        Pin the epoch of a checkpoint under its name. A name keeps one epoch: what it kept before is let go.

        Raises:
            EpochNotRetainedError: the epoch is not there any more, or not yet.
            ResourceExhaustedError: there are 16 other names.
        """
        with as_invalid_argument():
            request = pb.PinEpochRequest(
                ref=self.ref, pin=check_name("name", name), epoch=check_int("epoch", epoch, 0, self.spec.num_epochs)
            )
        self._connection.call("PinEpoch", request)

    def unpin_epoch(self, name: str) -> None:
        """Let go of what a name keeps; nothing happens if it keeps nothing."""
        with as_invalid_argument():
            request = pb.PinEpochRequest(ref=self.ref, pin=check_name("name", name))
        self._connection.call("PinEpoch", request)

    def force_finish(self, epoch: int) -> tuple[int, ...]:
        """End an epoch without the ranks that have not finished it, and return these (at most 100).

        What they have reported counts; they go on with the next epoch. Nothing happens if it has ended already.
        """
        with as_invalid_argument():
            check_int("epoch", epoch, 0, self.spec.num_epochs - 1)
        request = pb.ForceFinishEpochRequest(ref=self.ref, epoch=epoch)
        return tuple(self._connection.call("ForceFinishEpoch", request).skipped_ranks)

    def _active_runs(self) -> list[Run]:
        """This client's runs of the experiment that may still report."""
        return [run for run in list(self._runs) if run.uid == self.uid and run.is_active]

    def _flush(self) -> None:
        for run in self._active_runs():
            run.flush()

    @property
    def ref(self) -> pb.ExperimentRef:
        """Its name and uid as a message."""
        return ref_to_proto(ExperimentName(self.project, self.name), self.uid)


def _check_choice(field: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise InvalidValue(field, value, f"one of {', '.join(map(repr, get_args(choices)))}")


def checked_column(field: str, values: ArrayLike, dtype: DTypeLike, num_samples: int) -> NDArray[Any]:
    """One number a sample, as they are sent; raises InvalidArgumentError."""
    found = np.asarray(values)
    if found.shape != (num_samples,) or found.dtype.kind not in "iuf":
        raise InvalidArgumentError(
            f"{field}: expected numbers of shape ({num_samples},), one a sample of the experiment; got "
            f"{found.dtype} of shape {found.shape}",
            field=field,
        )
    if dtype is np.uint32:
        bad = ~((found >= 0) & (found < 2**32) & (found == np.floor(found)))
        if bad.any():
            position = int(np.argmax(bad))
            raise InvalidArgumentError(
                f"{field}: expected integers from 0 to 4,294,967,295; the one at position {position} is "
                f"{found[position]}",
                field=field,
            )
    return found.astype(dtype)


def _checked_position(position: tuple[int, int]) -> Position:
    if not isinstance(position, tuple) or len(position) != 2:
        raise InvalidValue("position", position, "a pair (epoch, step), such as an earlier run's position")
    return Position(*(check_int("position", number, 0, 2**32 - 1) for number in position))
