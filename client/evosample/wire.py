"""Protobuf messages <-> numpy arrays and dataclasses, for clients and servers alike."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args, get_type_hints

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evosample.sampling import (
    POLICIES,
    DoReMi,
    DrawMethod,
    EpochSummary,
    ExperimentSpec,
    FoldCounts,
    GroupSummary,
    ImportanceWeight,
    InvalidValue,
    MissingPolicy,
    Mixture,
    Policy,
    check_name,
    custom_policy,
    name_of,
)
from evosample.v1 import administration_pb2 as administration_pb
from evosample.v1 import selection_pb2 as pb

DEFAULT_PROJECT = "default"

ExperimentState = Literal["unplanned", "open", "sealed", "finished"]

Role = Literal["reader", "writer", "administrator"]
ROLES: tuple[Role, ...] = get_args(Role)  # each allows what those before it allow, and more

_IMPORTANCE_WEIGHTS: dict[ImportanceWeight, pb.ImportanceWeight.ValueType] = {
    "none": pb.IMPORTANCE_WEIGHT_NONE,
    "unbiased": pb.IMPORTANCE_WEIGHT_UNBIASED,
    "self_normalized": pb.IMPORTANCE_WEIGHT_SELF_NORMALIZED,
}


_DRAW_METHODS: dict[DrawMethod, pb.DrawMethod.ValueType] = {
    "successive": pb.DRAW_METHOD_SUCCESSIVE,
    "systematic": pb.DRAW_METHOD_SYSTEMATIC,
    "top_k": pb.DRAW_METHOD_TOP_K,
    "with_replacement": pb.DRAW_METHOD_WITH_REPLACEMENT,
}
_SETTING_KINDS = {bool: "flag", int: "integer", float: "number", str: "text"}


class Position(NamedTuple):
    """A place in the stream of steps: `step` steps of `epoch` have had their losses handed over."""

    epoch: int
    step: int


class ExperimentName(NamedTuple):
    """What an experiment is called; see `ExperimentRef` in the protocol."""

    project: str
    name: str


@dataclass(frozen=True)
class ExperimentStatus:
    """Where an experiment stands; the fields are those of the protocol's `Experiment`."""

    project: str
    name: str
    uid: str
    spec: ExperimentSpec
    state: ExperimentState
    epoch: int
    generation: int
    world_size: int
    finished_ranks: tuple[int, ...]
    visited_rows: int
    non_finite_rows: int
    unreported_rows: int
    trained_rows: int
    create_time: datetime.datetime
    retained_epochs: tuple[int, ...]
    pins: dict[str, int]
    num_steps: int
    extended_num_samples: int


class RankProgress(NamedTuple):
    """How far a rank is, by what it has reported.

    Attributes:
        epoch, step: steps of the epoch up to the last one that it has reported.
        age_s: since its latest report.
        mean_loss: of the finite losses in that report; None if there was none.
    """

    rank: int
    epoch: int
    step: int
    age_s: float
    mean_loss: float | None


class PastEpoch(NamedTuple):
    """An epoch that has ended.

    Attributes:
        end_time: when its losses were folded into the scores.
        summary: what it has come to.
    """

    end_time: datetime.datetime
    summary: EpochSummary


class Watched(NamedTuple):
    """Live figures of an experiment.

    Attributes:
        status: as `Experiment.status()`.
        ranks: those of the latest run that have reported something, ascending.
        epochs: those that have ended since the figures before, ascending.
    """

    status: ExperimentStatus
    ranks: tuple[RankProgress, ...]
    epochs: tuple[PastEpoch, ...]


@dataclass(frozen=True)
class Token:
    """What is known of a token; not the token itself. The fields are those of the protocol's `Token`.

    Attributes:
        expire_time: from when on it is refused; None: never.
    """

    id: str
    project: str
    role: Role
    note: str
    create_time: datetime.datetime
    expire_time: datetime.datetime | None

    @property
    def has_expired(self) -> bool:
        """Whether it is refused by now, by this machine's clock."""
        return self.expire_time is not None and self.expire_time <= datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class ServerStatus:
    """How a server is, and what it lets the caller do; the fields are those of the protocol's `GetServerResponse`.

    Attributes:
        project: the only one that the caller may name; None: any.
        store_error: why the store can't be used; empty if it can.
    """

    version: str
    server_time: datetime.datetime
    needs_tokens: bool
    project: str | None
    role: Role
    store_latency_s: float
    store_used_memory_bytes: int
    store_error: str


def column(data: bytes | memoryview, dtype: DTypeLike) -> NDArray[Any]:
    """A received column as a read-only array over the message's own bytes."""
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))


def check_column(field: str, data: bytes, num_rows: int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """A column that must have `num_rows` rows; raises InvalidValue."""
    dtype = np.dtype(dtype)
    num_bytes = dtype.itemsize * num_rows
    if len(data) != num_bytes:
        raise InvalidValue(field, f"{len(data):,} bytes", f"{num_bytes:,} bytes: {num_rows:,} {dtype} values")
    return column(data, dtype)


def column_bytes(values: NDArray[Any]) -> bytes:
    """A column as it is sent: contiguous, little-endian."""
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def check_address(field: str, address: object) -> None:
    """Raises InvalidValue unless this is HOST:PORT or unix:/PATH. (gRPC takes a port modulo 65,536.)"""
    _, colon, port = str(address).rpartition(":")
    is_port = bool(colon) and port.isascii() and port.isdigit() and int(port) < 2**16
    is_path = str(address).startswith("unix:/")
    if not isinstance(address, str) or not (is_port or is_path) or "://" in address or " " in address:
        raise InvalidValue(field, address, "HOST:PORT with a port from 0 to 65535, or unix:/PATH")


def is_local(address: str) -> bool:
    """Whether an address is a unix socket or on the loopback interface, which other machines don't reach."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return address.startswith("unix:") or host == "localhost"


def ref_to_proto(name: ExperimentName, uid: str = "") -> pb.ExperimentRef:
    """The name, and the uid where known, as a message."""
    return pb.ExperimentRef(project=name.project, name=name.name, uid=uid)


def name_from_proto(ref: pb.ExperimentRef) -> ExperimentName:
    """The checked name of an experiment; raises InvalidValue."""
    return ExperimentName(check_name("project", ref.project), check_name("name", ref.name))


def spec_to_proto(spec: ExperimentSpec) -> pb.ExperimentSpec:
    """A spec as a message, with every field set."""
    message = pb.ExperimentSpec(
        num_samples=spec.num_samples,
        num_epochs=spec.num_epochs,
        meta_batch_size=spec.meta_batch_size,
        mini_batch_size=spec.mini_batch_size,
        importance_weight=_IMPORTANCE_WEIGHTS[spec.importance_weight],
        seed=spec.seed,
        warm_start=spec.warm_start,
        max_skipped_epochs=spec.max_skipped_epochs,
        loss_clip_quantile=spec.loss_clip_quantile,
        shard_sizes=spec.shard_sizes,
        shuffle_block_samples=spec.shuffle_block_samples,
        num_groups=spec.num_groups,
        group_floor=spec.group_floor,
    )
    _put_policy(message, spec.policy)
    if spec.mixture is not None:
        message.mixture.SetInParent()
        message.mixture.weights.extend(spec.mixture.weights)
        if isinstance(spec.mixture, DoReMi):
            message.mixture.step_size, message.mixture.smoothing = spec.mixture.step_size, spec.mixture.smoothing
    return message


def _put_policy(message: pb.ExperimentSpec, policy: Policy) -> None:
    name, is_ours = name_of(policy)
    if not is_ours:
        message.custom.name = name
        message.custom.columns.extend(policy.columns)
        message.custom.reported_columns.extend(policy.reported_columns)
    else:
        getattr(message, name).SetInParent()
    for setting, value in _settings(policy).items():
        if not is_ours:
            try:
                setattr(message.custom.settings[setting], _SETTING_KINDS[type(value)], value)
            except (KeyError, ValueError) as error:
                expected = "a bool, an int of 64 bits, a float or a str, as the settings of policies are"
                raise InvalidValue(setting, value, expected) from error
        elif setting.endswith("_draw"):
            setattr(getattr(message, name), setting, _DRAW_METHODS[value])
        else:
            setattr(getattr(message, name), setting, value)


def _settings(policy: Policy) -> Mapping[str, Any]:
    if isinstance(policy, MissingPolicy):
        return policy.settings
    return {field.name: getattr(policy, field.name) for field in dataclasses.fields(cast(Any, policy))}


def spec_from_proto(message: pb.ExperimentSpec) -> ExperimentSpec:
    """A message as a checked spec; raises InvalidValue."""
    return ExperimentSpec(
        num_samples=message.num_samples,
        num_epochs=message.num_epochs,
        **_optional(message, "meta_batch_size", "mini_batch_size"),
        policy=_policy_from_proto(message),
        importance_weight=_importance_weight_from_proto(message.importance_weight),
        seed=message.seed,
        warm_start=message.warm_start,
        max_skipped_epochs=message.max_skipped_epochs,
        **_optional(message, "loss_clip_quantile"),
        shard_sizes=tuple(message.shard_sizes),
        shuffle_block_samples=message.shuffle_block_samples,
        num_groups=message.num_groups,
        group_floor=message.group_floor,
        mixture=_mixture_from_proto(message.mixture) if message.HasField("mixture") else None,
    )


def _mixture_from_proto(message: pb.Mixture) -> Mixture:
    weights, learning = tuple(message.weights), _optional(message, "step_size", "smoothing")
    if learning and not message.HasField("step_size"):
        raise InvalidValue("mixture.smoothing", message.smoothing, "none without step_size: it is for learned mixtures")
    return DoReMi(weights=weights, **learning) if message.HasField("step_size") else Mixture(weights=weights)


def _policy_from_proto(message: pb.ExperimentSpec) -> Policy:
    name = message.WhichOneof("policy")
    if name is None:
        raise InvalidValue("policy", None, f"one of {', '.join([*POLICIES, 'custom'])}")
    if name == "custom":
        return _custom_policy(message.custom)
    settings = {}
    for setting in dataclasses.fields(cast(Any, POLICIES[name])):
        if setting.name.endswith("_draw"):
            settings[setting.name] = _draw_method_from_proto(
                setting.name, getattr(getattr(message, name), setting.name)
            )
        else:
            settings.update(_optional(getattr(message, name), setting.name))
    return POLICIES[name](**settings)


def _custom_policy(message: pb.CustomPolicy) -> Policy:
    settings = {name: getattr(value, value.WhichOneof("value") or "text") for name, value in message.settings.items()}
    policy = custom_policy(message.name)
    if policy is None:
        columns = dict.fromkeys(message.columns, 0.0)
        return MissingPolicy(message.name, settings, columns, tuple(message.reported_columns))
    try:
        _check_kinds(policy, settings)
        return policy(**settings)
    except InvalidValue:
        raise
    except Exception as error:  # such as a setting that this version of it does not have
        raise InvalidValue("policy", settings, f"settings that {policy.__name__} takes: {error!r}") from error


def _check_kinds(policy: type[Policy], settings: dict[str, Any]) -> None:
    kinds = get_type_hints(policy)
    for name, value in settings.items():
        kind = kinds.get(name)
        if kind in _SETTING_KINDS and type(value) not in ((int, float) if kind is float else (kind,)):
            raise InvalidValue(name, value, f"a value of the type {kind.__name__}")


def _draw_method_from_proto(field: str, value: pb.DrawMethod.ValueType) -> DrawMethod:
    if value == pb.DRAW_METHOD_UNSPECIFIED:
        return "successive"
    for name, number in _DRAW_METHODS.items():
        if value == number:
            return name
    raise InvalidValue(field, value, ", ".join(f"{name.upper()} ({number})" for name, number in _DRAW_METHODS.items()))


def _optional(message: Any, *fields: str) -> dict[str, Any]:
    """Those of the optional fields that are set."""
    return {field: getattr(message, field) for field in fields if message.HasField(field)}


def _importance_weight_from_proto(value: pb.ImportanceWeight.ValueType) -> ImportanceWeight:
    if value == pb.IMPORTANCE_WEIGHT_UNSPECIFIED:
        return "none"
    for name, number in _IMPORTANCE_WEIGHTS.items():
        if value == number:
            return name
    raise InvalidValue("importance_weight", value, "NONE (1), UNBIASED (2) or SELF_NORMALIZED (3)")


def status_to_proto(status: ExperimentStatus) -> pb.Experiment:
    """An experiment's status as a message."""
    message = pb.Experiment(
        ref=ref_to_proto(ExperimentName(status.project, status.name), status.uid),
        spec=spec_to_proto(status.spec),
        state=pb.ExperimentState.Value(f"EXPERIMENT_STATE_{status.state.upper()}"),
        epoch=status.epoch,
        generation=status.generation,
        world_size=status.world_size,
        finished_ranks=status.finished_ranks,
        visited_rows=status.visited_rows,
        non_finite_rows=status.non_finite_rows,
        unreported_rows=status.unreported_rows,
        trained_rows=status.trained_rows,
        retained_epochs=status.retained_epochs,
        pins=status.pins,
        num_steps=status.num_steps,
        extended_num_samples=status.extended_num_samples,
    )
    message.create_time.FromDatetime(status.create_time)
    return message


def status_from_proto(message: pb.Experiment) -> ExperimentStatus:
    """The inverse of `status_to_proto`."""
    state = pb.ExperimentState.Name(message.state).removeprefix("EXPERIMENT_STATE_").lower()
    return ExperimentStatus(
        project=message.ref.project,
        name=message.ref.name,
        uid=message.ref.uid,
        spec=spec_from_proto(message.spec),
        state=cast(ExperimentState, state),
        epoch=message.epoch,
        generation=message.generation,
        world_size=message.world_size,
        finished_ranks=tuple(message.finished_ranks),
        visited_rows=message.visited_rows,
        non_finite_rows=message.non_finite_rows,
        unreported_rows=message.unreported_rows,
        trained_rows=message.trained_rows,
        create_time=message.create_time.ToDatetime(datetime.UTC),
        retained_epochs=tuple(message.retained_epochs),
        pins=dict(sorted(message.pins.items())),
        num_steps=message.num_steps,
        extended_num_samples=message.extended_num_samples,
    )


def past_epoch_to_proto(past: PastEpoch) -> pb.EpochSummary:
    """An epoch's summary as a message."""
    summary = past.summary
    message = pb.EpochSummary(
        epoch=summary.epoch,
        num_rows=summary.num_rows,
        num_trained=summary.num_trained,
        total_trained=summary.total_trained,
        visited_rows=summary.counts.visited,
        non_finite_rows=summary.counts.non_finite,
        unreported_rows=summary.counts.unreported,
        mean_loss=None if math.isnan(summary.mean_loss) else summary.mean_loss,
        mean_score=summary.mean_score,
        score_histogram=summary.score_histogram.tolist(),
        num_never_visited=summary.num_never_visited,
        staleness_histogram=summary.staleness_histogram.tolist(),
        hardest_ids=summary.hardest_ids.tolist(),
        hardest_scores=summary.hardest_scores.tolist(),
        groups=[_group_to_proto(group) for group in summary.groups],
    )
    message.end_time.FromDatetime(past.end_time)
    return message


def _group_to_proto(group: GroupSummary) -> pb.GroupSummary:
    known = {name: value for name, value in group._asdict().items() if value == value}  # no NaN
    return pb.GroupSummary(**known)


def _group_from_proto(message: pb.GroupSummary) -> GroupSummary:
    found = {name: _optional(message, name).get(name, math.nan) for name in ("mean_loss", "excess_loss", "weight")}
    return GroupSummary(message.num_samples, message.num_rows, is_capped=message.is_capped, **found)


def past_epoch_from_proto(message: pb.EpochSummary) -> PastEpoch:
    """The inverse of `past_epoch_to_proto`."""
    summary = EpochSummary(
        epoch=message.epoch,
        num_rows=message.num_rows,
        num_trained=message.num_trained,
        total_trained=message.total_trained,
        counts=FoldCounts(message.visited_rows, message.non_finite_rows, message.unreported_rows),
        mean_loss=message.mean_loss if message.HasField("mean_loss") else math.nan,
        mean_score=message.mean_score,
        score_histogram=np.array(message.score_histogram, np.int64),
        num_never_visited=message.num_never_visited,
        staleness_histogram=np.array(message.staleness_histogram, np.int64),
        hardest_ids=np.array(message.hardest_ids, np.int64),
        hardest_scores=np.array(message.hardest_scores, np.float32),
        groups=tuple(map(_group_from_proto, message.groups)),
    )
    return PastEpoch(message.end_time.ToDatetime(datetime.UTC), summary)


def watched_to_proto(watched: Watched) -> pb.WatchExperimentResponse:
    """Live figures as a message."""
    ranks = [
        pb.RankProgress(
            rank=rank.rank, epoch=rank.epoch, step=rank.step, age_ms=int(1000 * rank.age_s), mean_loss=rank.mean_loss
        )
        for rank in watched.ranks
    ]
    return pb.WatchExperimentResponse(
        experiment=status_to_proto(watched.status), ranks=ranks, epochs=map(past_epoch_to_proto, watched.epochs)
    )


def watched_from_proto(message: pb.WatchExperimentResponse) -> Watched:
    """The inverse of `watched_to_proto`."""
    ranks = [
        RankProgress(
            rank.rank, rank.epoch, rank.step, rank.age_ms / 1000, rank.mean_loss if rank.HasField("mean_loss") else None
        )
        for rank in message.ranks
    ]
    return Watched(
        status_from_proto(message.experiment), tuple(ranks), tuple(map(past_epoch_from_proto, message.epochs))
    )


def role_to_proto(role: Role) -> administration_pb.Role.ValueType:
    """A role as a message has it; raises InvalidValue."""
    if role not in ROLES:
        raise InvalidValue("role", role, f"one of {', '.join(ROLES)}")
    return administration_pb.Role.Value(f"ROLE_{role.upper()}")


def role_from_proto(value: administration_pb.Role.ValueType) -> Role:
    """The inverse of `role_to_proto`; raises InvalidValue."""
    for role in ROLES:
        if value == role_to_proto(role):
            return role
    raise InvalidValue("role", value, "READER (1), WRITER (2) or ADMINISTRATOR (3)")


def token_to_proto(token: Token) -> administration_pb.Token:
    """What is known of a token as a message."""
    message = administration_pb.Token(
        id=token.id, project=token.project, role=role_to_proto(token.role), note=token.note
    )
    message.create_time.FromDatetime(token.create_time)
    if token.expire_time is not None:
        message.expire_time.FromDatetime(token.expire_time)
    return message


def token_from_proto(message: administration_pb.Token) -> Token:
    """The inverse of `token_to_proto`."""
    return Token(
        id=message.id,
        project=message.project,
        role=role_from_proto(message.role),
        note=message.note,
        create_time=message.create_time.ToDatetime(datetime.UTC),
        expire_time=message.expire_time.ToDatetime(datetime.UTC) if message.HasField("expire_time") else None,
    )


def server_from_proto(message: administration_pb.GetServerResponse) -> ServerStatus:
    """How a server is, from its message."""
    return ServerStatus(
        version=message.version,
        server_time=message.server_time.ToDatetime(datetime.UTC),
        needs_tokens=message.needs_tokens,
        project=message.project or None,
        role=role_from_proto(message.role),
        store_latency_s=message.store.latency_s,
        store_used_memory_bytes=message.store.used_memory_bytes,
        store_error=message.store.error,
    )
