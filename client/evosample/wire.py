"""Protobuf messages <-> numpy arrays and dataclasses, for clients and servers alike."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evosample.sampling import (
    EvolvedSampling,
    ExperimentSpec,
    ImportanceWeight,
    InvalidValue,
    Policy,
    RandomSubset,
    Uniform,
    check_name,
)
from evosample.v1 import selection_pb2 as pb

DEFAULT_PROJECT = "default"

ExperimentState = Literal["unplanned", "open", "sealed", "finished"]

_IMPORTANCE_WEIGHTS: dict[ImportanceWeight, pb.ImportanceWeight.ValueType] = {
    "none": pb.IMPORTANCE_WEIGHT_NONE,
    "unbiased": pb.IMPORTANCE_WEIGHT_UNBIASED,
    "self_normalized": pb.IMPORTANCE_WEIGHT_SELF_NORMALIZED,
}


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
    create_time: datetime.datetime
    retained_epochs: tuple[int, ...]
    pins: dict[str, int]


def column(data: bytes, dtype: DTypeLike) -> NDArray[Any]:
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


def ref_to_proto(name: ExperimentName, uid: str = "") -> pb.ExperimentRef:
    """The name, and the uid where known, as a message."""
    return pb.ExperimentRef(project=name.project, name=name.name, uid=uid)


def name_from_proto(ref: pb.ExperimentRef) -> ExperimentName:
    """The checked name of an experiment; raises InvalidValue."""
    return ExperimentName(check_name("project", ref.project or DEFAULT_PROJECT), check_name("name", ref.name))


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
        shard_sizes=spec.shard_sizes,
        shuffle_block_samples=spec.shuffle_block_samples,
    )
    match spec.policy:
        case EvolvedSampling() as policy:
            message.evolved_sampling.CopyFrom(
                pb.EvolvedSampling(
                    beta1=policy.beta1,
                    beta2=policy.beta2,
                    prune_ratio=policy.prune_ratio,
                    annealing=policy.annealing,
                )
            )
        case Uniform():
            message.uniform.SetInParent()
        case RandomSubset() as policy:
            message.random_subset.CopyFrom(pb.RandomSubset(prune_ratio=policy.prune_ratio))
        case policy:
            raise InvalidValue("policy", policy, "EvolvedSampling, Uniform or RandomSubset")
    return message


def spec_from_proto(message: pb.ExperimentSpec) -> ExperimentSpec:
    """A message as a checked spec; raises InvalidValue."""
    return ExperimentSpec(
        num_samples=message.num_samples,
        num_epochs=message.num_epochs,
        meta_batch_size=message.meta_batch_size,
        mini_batch_size=_optional(message, "mini_batch_size").get("mini_batch_size", cast(int, None)),
        policy=_policy_from_proto(message),
        importance_weight=_importance_weight_from_proto(message.importance_weight),
        seed=message.seed,
        warm_start=message.warm_start,
        shard_sizes=tuple(message.shard_sizes),
        shuffle_block_samples=message.shuffle_block_samples,
    )


def _policy_from_proto(message: pb.ExperimentSpec) -> Policy:
    match message.WhichOneof("policy"):
        case "evolved_sampling":
            fields = ("beta1", "beta2", "prune_ratio", "annealing")
            return EvolvedSampling(**_optional(message.evolved_sampling, *fields))
        case "uniform":
            return Uniform()
        case "random_subset":
            return RandomSubset(**_optional(message.random_subset, "prune_ratio"))
        case _:
            raise InvalidValue("policy", None, "one of evolved_sampling, uniform, random_subset")


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
        retained_epochs=status.retained_epochs,
        pins=status.pins,
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
        create_time=message.create_time.ToDatetime(datetime.UTC),
        retained_epochs=tuple(message.retained_epochs),
        pins=dict(sorted(message.pins.items())),
    )
