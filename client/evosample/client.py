"""The client: connect to a server, create experiments, train on what they select."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import grpc
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from evosample.credentials import Tls, tls_to_use, token_to_use
from evosample.epoch import as_invalid_argument
from evosample.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from evosample.private_server import PrivateServer
from evosample.rpc import Connection
from evosample.run import OnUnavailable, Run
from evosample.sampling import (
    DoReMi,
    EvolvedSampling,
    ExperimentSpec,
    Groups,
    ImportanceWeight,
    InvalidValue,
    MissingPolicy,
    Mixture,
    Policy,
    check_groups,
    check_int,
    check_name,
    check_seconds,
)
from evosample.v1 import administration_pb2 as administration_pb
from evosample.v1 import selection_pb2 as pb
from evosample.wire import (
    ExperimentName,
    ExperimentStatus,
    PastEpoch,
    Position,
    Role,
    ServerStatus,
    Token,
    Watched,
    check_address,
    column,
    column_bytes,
    ref_to_proto,
    role_to_proto,
    server_from_proto,
    spec_to_proto,
    status_from_proto,
    token_from_proto,
    watched_from_proto,
)

_log = logging.getLogger("evosample")

_SCORE_DTYPES = {"scores": np.float32, "sampling_weights": np.float32, "num_visits": np.uint16}
PRIVATE: dict[str, Any] = {"token": "", "tls": False}
"""What to `connect` to a private server with: it is reached by this user alone, and asks for nothing."""
_LITTLE_SAVING = 0.2  # of compute: what is left of it is lost to loading and waiting, or to noise
_IMPORT_ROWS = 40_000  # 10 bytes each, and 4 for each column of the policy: well under 1 MiB
_GROUP_ROWS = 160_000  # 6 bytes each


class ExportedScores(NamedTuple):
    """The scores of all samples at an epoch's start, in the order of sample ids, and what has become of each so far.

    Attributes:
        epoch: the epoch at whose start they stood; num_epochs after the last.
        scores: float32 [num_samples].
        sampling_weights: float32 [num_samples].
        num_visits: uint16 [num_samples], finite losses so far: how many epochs have visited it, at most 65,535.
        staleness: uint8 [num_samples], epochs that have ended since its last finite loss (or the start), at most 255.
        num_chosen: uint16 [num_samples], how many times it was chosen for back-propagation, at most 65,535.
        chosen_staleness: uint8 [num_samples], epochs that have ended since it was last chosen (or the start).
        last_losses: float32 [num_samples], as they counted; NaN where there was none, or the policy can't tell.
        groups: uint16 [num_samples], as they are now; None without groups.
        columns: float32 [num_samples] each, what the policy keeps besides, by name.

    To start another experiment from, the first four suffice; `columns` are taken, too, where its policy has them.
    """

    epoch: int
    scores: NDArray[np.float32]
    sampling_weights: NDArray[np.float32]
    num_visits: NDArray[np.uint16]
    staleness: NDArray[np.uint8] | None = None
    num_chosen: NDArray[np.uint16] | None = None
    chosen_staleness: NDArray[np.uint8] | None = None
    last_losses: NDArray[np.float32] | None = None
    groups: NDArray[np.uint16] | None = None
    columns: Mapping[str, NDArray[np.float32]] = MappingProxyType({})


def connect(
    address: str | Sequence[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    tls: Tls | bool | None = None,
    connect_timeout_s: float = 10.0,
    outage_timeout_s: float = 300.0,
) -> Client:
    """Connect to a selection server or, without an address, start a private one that ends with this process.

    Args:
        address: HOST:PORT or unix:/PATH of a running `evosample-server`; or several of them on one Redis, in a list or
            separated by commas; or a name that stands for several. When one fails, calls go to another. The connection
            opens with the first call. Default: as the environment variable EVOSAMPLE_ADDRESS says, else none.
        data_dir: where a private server keeps its scores, for jobs that are resumed. Default: nowhere for long.
        token: what the server is to know this client by. Default: the environment variable EVOSAMPLE_TOKEN, or what is
            in the file EVOSAMPLE_TOKEN_FILE; empty: none, whatever these say. One that is passed here is part of the
            pickled client, for worker processes need it; one of the environment is not.
        tls: True to speak TLS with servers whose certificate the system trusts, `evosample.Tls(ca=..., cert=...,
            key=...)` with others; False for plain text. Default: as the environment variables EVOSAMPLE_TLS (1 or 0),
            EVOSAMPLE_TLS_CA, EVOSAMPLE_TLS_CERT and EVOSAMPLE_TLS_KEY say; else, and on unix sockets, plain text.
        connect_timeout_s: how long the first call tries to reach a server.
        outage_timeout_s: how long later calls wait for an absent server. Training goes on meanwhile, for any time, with
            what was fetched ahead: only at an epoch's end it has to wait.

    Raises:
        UnavailableError: the private server could not be started.
        InvalidArgumentError: `data_dir` together with an address, `token` or `tls` without one, or files of these that
            can't be used.
    """
    if address is not None and data_dir is not None:
        raise InvalidArgumentError(
            f"data_dir={os.fspath(data_dir)!r}: only a private server takes it; the one at {address} has its own",
            field="data_dir",
        )
    server = None
    if address is None and data_dir is None:
        address = address_to_use()
    if address is None:
        if token or tls:
            raise InvalidArgumentError(
                "token, tls: they are for a server that runs elsewhere; pass its address (a private one needs neither)",
                field="token" if token else "tls",
            )
        token, tls = PRIVATE["token"], PRIVATE["tls"]
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
    if tls is None and all(each.startswith("unix:") for each in addresses):
        tls = False
    tls = tls_to_use(tls)
    if tls is not None:
        if any(each.startswith("unix:") for each in addresses):
            raise InvalidArgumentError("tls: there is no TLS on a unix socket; leave it out", field="tls")
        tls.context()  # what is wrong with its files, or with the token's, shows here, and not in a thread
    token_to_use(token)
    connection = Connection(
        addresses,
        connect_timeout_s=connect_timeout_s,
        outage_timeout_s=outage_timeout_s,
        tls=tls,
        token=token,
        server=server,
    )
    return Client(connection)


def address_to_use() -> str | None:
    """The address of the environment variable EVOSAMPLE_ADDRESS; None if there is none."""
    return os.environ.get("EVOSAMPLE_ADDRESS") or None


class Client:
    """A connection to a server; made by `connect`. Pickling keeps the address, and what it needs to open another."""

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

    @property
    def tls(self) -> Tls | None:
        """With what it speaks TLS; None: it speaks plain text."""
        return self._connection.tls

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
        mini_batch_size: int | None = None,
        meta_batch_size: int | None = None,
        policy: Policy | None = None,
        importance_weight: ImportanceWeight = "none",
        seed: int = 0,
        initial_scores: ExportedScores | None = None,
        max_skipped_epochs: int = 0,
        loss_clip_quantile: float = 1.0,
        groups: ArrayLike | None = None,
        group_floor: float = 0.0,
        mixture: Mixture | None = None,
        reference_losses: ArrayLike | None = None,
        shard_sizes: Sequence[int] = (),
        shuffle_block_samples: int | None = None,
        project: str | None = None,
    ) -> Experiment:
        """Create an experiment, or find the one of this name if its spec is equal.

        Logs the size of a new experiment's run: with INFO; with WARNING, so that it is seen, where the policy is the
        default without scoring, or where scoring saves next to nothing.

        Args:
            name: unique in its project.
            num_samples: n, samples of the dataset; sample ids are 0..n-1.
            num_epochs: epochs of the whole run. With the default policy an epoch is a quarter of the dataset: for as
                much training as E ordinary epochs pass 4 * E.
            mini_batch_size: b, samples that a step trains on, over all ranks: your batch size.
            meta_batch_size: B, samples that a step loads and scores, over all ranks, to draw the mini-batch from them.
                Default: mini_batch_size, so that no step scores.
            policy: the selection method. Default: `EvolvedSampling()`, which draws a quarter of the dataset for an
                epoch; with a larger meta-batch it is ES as published.
            importance_weight: "none", "unbiased" or "self_normalized"; see `ExperimentSpec`.
            seed: of all random draws, 0 <= seed < 2**64.
            initial_scores: what to start from, such as an earlier experiment's `export_scores()`: the first epoch then
                selects as well. An experiment that has begun to train keeps the scores that it has.
            max_skipped_epochs: a sample without a loss in so many epochs in a row is kept, whatever the policy would
                do. Default, 0: none is for that reason.
            loss_clip_quantile: losses above this quantile count as that. Default, 1: losses count as they are.
            groups: uint16 [num_samples], the group of each sample, such as its class or domain, from 0 to 999 at most.
                An experiment that has begun to train keeps those that it has; `Experiment.set_groups` changes them.
            group_floor: share of each group that every epoch keeps at least, in [0, 1): the samples of the highest
                sampling weights.
            mixture: each group's share of what an epoch keeps: `Mixture(weights=...)`, or `DoReMi()`, which learns
                them. It needs a policy that prunes.
            reference_losses: float32 [num_samples], losses of a reference model, which DoReMi needs.
            shard_sizes: samples of each shard, whose ids follow each other: epochs are shuffled so that shards are read
                nearly one after the other. Default: one shuffle over all samples.
            shuffle_block_samples: over how many samples such a shuffle goes, in whole shards. Default: ten shards.
            project: what the experiment belongs to. Default: the project that the token opens; without one, "default".

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
                mini_batch_size=cast(int, mini_batch_size),  # None stands for the default
                meta_batch_size=cast(int, meta_batch_size),
                policy=EvolvedSampling() if policy is None else policy,
                importance_weight=importance_weight,
                seed=seed,
                warm_start=initial_scores is not None,
                max_skipped_epochs=max_skipped_epochs,
                loss_clip_quantile=loss_clip_quantile,
                num_groups=0 if groups is None else _num_groups(groups, mixture),
                group_floor=group_floor,
                mixture=mixture,
                shard_sizes=cast(tuple[int, ...], shard_sizes),
                shuffle_block_samples=cast(int, shuffle_block_samples),
            )
            request = pb.CreateExperimentRequest(ref=self._ref(name, project), spec=spec_to_proto(spec))
        if initial_scores is not None:
            for field, column_dtype in _SCORE_DTYPES.items():  # before anything is created
                checked_column(field, getattr(initial_scores, field), column_dtype, spec.num_samples)
        columns = _group_columns(spec, num_samples, groups, reference_losses)
        created = self._connection.call("CreateExperiment", request).experiment
        experiment = self._experiment(created)
        is_new = not created.generation and experiment.num_samples == num_samples  # nobody has added samples to it
        if is_new:
            is_seen = spec.compute_saving < _LITTLE_SAVING if spec.selects else policy is None
            _log.log(logging.WARNING if is_seen else logging.INFO, "experiment %s: %s", name, spec.extent())
        if initial_scores is not None and is_new:
            try:
                experiment.import_scores(
                    initial_scores.scores,
                    sampling_weights=initial_scores.sampling_weights,
                    num_visits=initial_scores.num_visits,
                    columns={
                        name: values for name, values in initial_scores.columns.items() if name in spec.policy.columns
                    },
                )
            except FailedPreconditionError:
                if not experiment.status().generation:  # else another rank has brought them and begun
                    raise
        if columns and is_new:
            experiment._send_groups(columns)
        return experiment

    def get_experiment(self, name: str, *, project: str | None = None) -> Experiment:
        """Find an experiment by name; raises NotFoundError."""
        request = pb.GetExperimentRequest(ref=self._checked_ref(name, project))
        return self._experiment(self._connection.call("GetExperiment", request).experiment)

    def list_experiments(self, *, project: str | None = None) -> Iterator[ExperimentStatus]:
        """All experiments of a project, in the order of their names."""
        request = pb.ListExperimentsRequest(project=_checked_project(project))
        while True:
            page = self._connection.call("ListExperiments", request)
            yield from map(_status, page.experiments)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete_experiment(self, name: str, *, project: str | None = None) -> None:
        """Delete an experiment with its scores; raises NotFoundError."""
        found = self.get_experiment(name, project=project)
        request = pb.DeleteExperimentRequest(ref=found.ref)  # with its uid: sent twice it deletes no other of the name
        with contextlib.suppress(NotFoundError):  # the first answer got lost
            self._connection.call("DeleteExperiment", request)

    def create_token(
        self, role: Role, *, project: str | None = None, note: str = "", ttl_s: int | None = None
    ) -> tuple[Token, str]:
        """Make a token that opens a project; for the project's administrators.

        Args:
            role: what it allows: "reader" (to look), "writer" (to train) or "administrator" (also to delete, to end
                epochs and to make tokens).
            project: what it opens. Default: the project of this client's own token; without one, "default".
            note: what it is for: at most 200 characters.
            ttl_s: seconds until it expires. Default: never.

        Returns:
            What is known of it, and the token itself, which nobody can find out later.

        Raises:
            PermissionDeniedError: this client's own token is not an administrator's.
        """
        with as_invalid_argument():
            request = administration_pb.CreateTokenRequest(
                project=_checked_project(project), role=role_to_proto(role), note=note, ttl_s=ttl_s
            )
        created = self._connection.call("CreateToken", request)
        return token_from_proto(created.token), created.bearer_token

    def list_tokens(self, *, project: str | None = None) -> list[Token]:
        """The tokens of a project, those that have expired included; for its administrators."""
        request = administration_pb.ListTokensRequest(project=_checked_project(project))
        return [token_from_proto(token) for token in self._connection.call("ListTokens", request).tokens]

    def revoke_token(self, token_id: str, *, project: str | None = None) -> None:
        """Make a token of a project worthless, within a second; for its administrators. Raises NotFoundError."""
        self._connection.call(
            "RevokeToken", administration_pb.RevokeTokenRequest(project=_checked_project(project), id=token_id)
        )

    def server_status(self) -> ServerStatus:
        """How the server and its store are, and what this client may do there."""
        return server_from_proto(self._connection.call("GetServer", administration_pb.GetServerRequest()))

    def _checked_ref(self, name: str, project: str | None) -> pb.ExperimentRef:
        with as_invalid_argument():
            return self._ref(name, project)

    @staticmethod
    def _ref(name: str, project: str | None) -> pb.ExperimentRef:
        return ref_to_proto(ExperimentName(_checked_project(project), check_name("name", name)))

    def _experiment(self, message: pb.Experiment) -> Experiment:
        return Experiment(self._connection, _status(message), self._runs)


class Experiment:
    """An experiment on the server; made by a client.

    Attributes:
        project, name, uid: what it is called.
        spec: what was fixed at its creation, with all defaults filled in; of the samples that are planned with now.
        num_samples: of the dataset: as in the spec, or more, where samples were added that are yet to be planned.
    """

    def __init__(self, connection: Connection, status: ExperimentStatus, runs: weakref.WeakSet[Run]) -> None:
        self.project = status.project
        self.name = status.name
        self.uid = status.uid
        self._take(status)
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
        return self._refresh()

    def _refresh(self) -> ExperimentStatus:
        status = _status(self._connection.call("GetExperiment", pb.GetExperimentRequest(ref=self.ref)).experiment)
        self._take(status)
        return status

    def _take(self, status: ExperimentStatus) -> None:
        """What may change as the dataset grows."""
        self.spec, self.num_samples = status.spec, max(status.spec.num_samples, status.extended_num_samples)

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
        with as_invalid_argument():
            if isinstance(self.spec.policy, MissingPolicy):
                raise self.spec.policy.missing("in this process")
            world_size = self.spec.check_world_size(world_size)
            check_int("rank", rank, 0, world_size - 1)
            if run_id is None and world_size != 1:
                raise InvalidArgumentError(
                    f"run_id=None with world_size={world_size}: pass the same run_id on all ranks, and another for "
                    "every start of the job",
                    field="run_id",
                )
            run_id = uuid.uuid4().hex if run_id is None else check_name("run_id", run_id)
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

    def watch(self, *, interval_s: float = 1.0) -> Generator[Watched, None, None]:
        """Live figures, again and again until the experiment has finished: where it stands, how far its ranks are, and
        what its epochs have come to. The first ones tell of all past epochs.

        Args:
            interval_s: between two of them, from 0.1 to 60.
        """
        with as_invalid_argument():
            check_seconds("interval_s", interval_s)
        request = pb.WatchExperimentRequest(ref=self.ref, interval_ms=round(1000 * interval_s))
        outage = self._connection.retries()
        while True:
            retry = next(outage)
            try:
                for message in self._connection.stub().WatchExperiment(request):
                    self._connection.answered()
                    outage = self._connection.retries()
                    request.first_epoch = message.experiment.epoch
                    yield _watched(message)
                if message.experiment.state == pb.EXPERIMENT_STATE_FINISHED:
                    return
            except grpc.RpcError as error:
                retry(error)

    def history(self) -> tuple[PastEpoch, ...]:
        """What the experiment's epochs have come to so far: the latest 1,000, of G groups the latest 50,000 / G."""
        (message,) = self._connection.collect("WatchExperiment", pb.WatchExperimentRequest(ref=self.ref, once=True))
        return _watched(message).epochs

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

        def whole(pieces: Iterable[bytes], dtype: DTypeLike) -> NDArray[Any]:
            return np.concatenate([column(piece, dtype) for piece in pieces])

        scores = whole((part.scores for part in parts), np.float32)
        weights = whole((part.sampling_weights for part in parts), np.float32)
        num_visits = whole((part.num_visits for part in parts), np.uint16)
        staleness = whole((part.staleness for part in parts), np.uint8)
        columns = {name: whole((part.columns[name] for part in parts), np.float32) for name in sorted(parts[0].columns)}
        losses = self.spec.policy.last_losses({"scores": scores, "sampling_weights": weights, **columns})
        return ExportedScores(
            parts[0].epoch,
            scores,
            weights,
            num_visits,
            staleness,
            whole((part.num_chosen for part in parts), np.uint16),
            whole((part.chosen_staleness for part in parts), np.uint8),
            np.where((num_visits > 0) & (staleness < parts[0].epoch), losses, np.float32(np.nan)),
            whole((part.groups for part in parts), np.uint16) if parts[0].groups else None,
            columns,
        )

    def import_scores(
        self,
        scores: ArrayLike,
        *,
        sampling_weights: ArrayLike | None = None,
        num_visits: ArrayLike | None = None,
        columns: Mapping[str, ArrayLike] = MappingProxyType({}),
    ) -> None:
        """Start from known scores instead of 1/n each, before the first run joins. All of them are taken, or none.

        Args:
            scores: float32 [num_samples], s, finite and >= 0.
            sampling_weights: float32 [num_samples], w, finite and >= 0. Default: the scores.
            num_visits: uint16 [num_samples], losses behind each score. Samples with 0 have the mean sampling
                weight of the others instead of their own; policies with `keeps_unvisited` visit them before all others.
                Default: 1 each.
            columns: float32 [num_samples] each, what the policy keeps besides, by name, such as UCB's "variance".
                Default: as without known scores.

        Raises:
            InvalidArgumentError: another number of samples, or values out of range.
            FailedPreconditionError: a run has joined.
        """
        weights = scores if sampling_weights is None else sampling_weights
        visits = np.ones(self.spec.num_samples) if num_visits is None else num_visits
        named = dict(zip(_SCORE_DTYPES, (scores, weights, visits), strict=True))
        known = {field: self._checked(field, values, _SCORE_DTYPES[field]) for field, values in named.items()}
        own = {name: self._checked(f"columns.{name}", values, np.float32) for name, values in columns.items()}

        def requests() -> Iterator[pb.ImportScoresRequest]:
            for first in range(0, self.spec.num_samples, _IMPORT_ROWS):
                rows = slice(first, first + _IMPORT_ROWS)
                message = pb.ImportScoresRequest(
                    first_sample=first,
                    scores=column_bytes(known["scores"][rows]),
                    sampling_weights=column_bytes(known["sampling_weights"][rows]),
                    num_visits=column_bytes(known["num_visits"][rows]),
                    columns={name: column_bytes(values[rows]) for name, values in own.items()},
                )
                if not first:
                    message.ref.CopyFrom(self.ref)
                    message.num_samples = self.spec.num_samples
                yield message

        self._connection.send("ImportScores", requests)

    def _checked(self, field: str, values: ArrayLike, dtype: DTypeLike) -> NDArray[Any]:
        return checked_column(field, values, dtype, self.spec.num_samples)

    def extend_dataset(self, num_samples: int, *, shard_sizes: Sequence[int] = ()) -> None:
        """Add samples to the experiment's dataset: they count from the next epoch that is planned.

        With groups they count once `set_groups` has said those of all samples. Jobs that are started later may create
        the experiment with the old number of samples or with the new one.

        Args:
            num_samples: in all; the new samples have the ids that follow. Nothing happens if as many were said before.
            shard_sizes: samples of each shard that is added, in an experiment that has shards.

        Raises:
            InvalidArgumentError: fewer samples than before, or shards of another number of samples.
            FailedPreconditionError: the last epoch is planned already.
        """
        with as_invalid_argument():
            count = check_int("num_samples", num_samples, 1, 2**40)
            sizes = [check_int("shard_sizes", size, 1, 2**40) for size in shard_sizes]
        self._connection.call(
            "ExtendDataset", pb.ExtendDatasetRequest(ref=self.ref, num_samples=count, shard_sizes=sizes)
        )
        self._refresh()

    def set_groups(self, groups: ArrayLike, *, reference_losses: ArrayLike | None = None) -> None:
        """Change which group each sample belongs to, in an experiment with groups: from the next planned epoch on.

        Args:
            groups: uint16 [num_samples], below the experiment's `spec.num_groups`; of added samples as well.
            reference_losses: float32 [num_samples]; needed, and allowed, with DoReMi alone.

        Raises:
            InvalidArgumentError: another number of samples, values out of range, or floors that no epoch has room for.
        """
        if not self.spec.num_groups:
            raise InvalidArgumentError("groups: this experiment was created without any", field="groups")
        self._send_groups(_group_columns(self.spec, self.num_samples, groups, reference_losses))

    def _send_groups(self, columns: Sequence[NDArray[Any]]) -> None:
        num_samples = len(columns[0])

        def requests() -> Iterator[pb.SetGroupsRequest]:
            for first in range(0, num_samples, _GROUP_ROWS):
                some = [column_bytes(values[first : first + _GROUP_ROWS]) for values in columns]
                message = pb.SetGroupsRequest(first_sample=first, groups=some[0], reference_losses=b"".join(some[1:]))
                if not first:
                    message.ref.CopyFrom(self.ref)
                    message.num_samples = num_samples
                yield message

        self._connection.send("SetGroups", requests)

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


def _status(message: pb.Experiment) -> ExperimentStatus:
    """A status as it came; raises InvalidArgumentError where its policy is one that is not installed here."""
    with as_invalid_argument():
        return status_from_proto(message)


def _watched(message: pb.WatchExperimentResponse) -> Watched:
    with as_invalid_argument():
        return watched_from_proto(message)


def _checked_project(project: str | None) -> str:
    """A project as it is sent: empty where the server is to know; raises InvalidArgumentError."""
    with as_invalid_argument():
        return "" if project is None else check_name("project", project)


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
    if np.dtype(dtype).kind == "u":
        most = np.iinfo(np.dtype(dtype)).max
        bad = ~((found >= 0) & (found <= most) & (found == np.floor(found)))
        if bad.any():
            position = int(np.argmax(bad))
            raise InvalidArgumentError(
                f"{field}: expected integers from 0 to {most:,}; the one at position {position} is {found[position]}",
                field=field,
            )
    return found.astype(dtype)


def _checked_position(position: tuple[int, int]) -> Position:
    if not isinstance(position, tuple) or len(position) != 2:
        raise InvalidValue("position", position, "a pair (epoch, step), such as an earlier run's position")
    return Position(*(check_int("position", number, 0, 2**32 - 1) for number in position))


def _num_groups(groups: ArrayLike, mixture: Mixture | None) -> int:
    ids = np.asarray(groups)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise InvalidValue("groups", f"an array of {ids.dtype} {list(ids.shape)}", "an integer for each sample")
    return max(int(ids.max()) + 1, len(mixture.weights) if isinstance(mixture, Mixture) else 0)


def _group_columns(
    spec: ExperimentSpec, num_samples: int, groups: ArrayLike | None, reference_losses: ArrayLike | None
) -> list[NDArray[Any]]:
    """What is said of groups, checked: their ids, and reference losses where the mixture needs them."""
    needs_reference = isinstance(spec.mixture, DoReMi)
    if needs_reference == (reference_losses is None):
        expected = "a loss for each sample, which DoReMi needs" if needs_reference else "none: they are for DoReMi"
        raise InvalidArgumentError(f"reference_losses: expected {expected}", field="reference_losses")
    if groups is None:
        return []
    columns = [checked_column("groups", groups, np.uint16, num_samples)]
    if reference_losses is not None:
        columns.append(checked_column("reference_losses", reference_losses, np.float32, num_samples))
    if num_samples == spec.num_samples:  # else the server checks
        with as_invalid_argument():
            check_groups(spec, Groups(*columns))
    return columns
