"""Whatever is asked of a server, in whatever order and by whomever: it answers as the model of the design does.

A run has 100 histories of up to 40 calls, the same ones every time. For other ones, and more of them:

    EVOSAMPLE_MODEL_EXAMPLES=2000 .venv/bin/pytest tests/faults/test_model.py

What fails is shown as the shortest history that Hypothesis finds in five minutes, a call and the model's answer a line.
A long run keeps it in .hypothesis, and the next one tries it first.

Calls come one after the other, to one server whose store loses nothing: what happens otherwise is for the other tests
of this folder, and so is the clock of straggler time-outs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

from evosample.sampling import (
    UCB,
    EvolvedSampling,
    ExperimentSpec,
    ImportanceWeight,
    InfoBatch,
    InvalidValue,
    Kakurenbo,
    OrderedSGD,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
)
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import spec_from_proto, spec_to_proto
from faults.model import (
    Ended,
    Experiment,
    Exported,
    Finished,
    Joined,
    Member,
    Model,
    Position,
    Ref,
    Refused,
    Selected,
    Status,
    Streamed,
    Waits,
    checksum,
)
from support import ServerProcess

LONG_RUN = os.environ.get("EVOSAMPLE_MODEL_EXAMPLES")
TIMEOUT_S = 20
WAITS_S = 0.1  # how long a stream that must wait is watched
TURN_S = 10  # in which a turn must have been made
NAMES = ("a", "b")
HOUR_MS = 3_600_000

_projects = itertools.count()
T = TypeVar("T")


class Refusal(NamedTuple):
    """What Refused says, as an answer."""

    code: str
    detail: str


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call of the model or of the server answers, a refusal included."""
    try:
        return call(*arguments)
    except Refused as refused:
        return Refusal(*refused.args)
    except grpc.RpcError as error:
        return refusal(error)


def refusal(error: Any) -> Refusal:
    code = error.code().name
    status = rpc_status.from_call(error)
    if status is None:
        return Refusal(code, error.details())
    (detail,) = status.details
    bad_request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    if detail.Unpack(bad_request):
        return Refusal(code, bad_request.field_violations[0].field)
    detail.Unpack(info)
    return Refusal(code, info.reason)


def shown(value: Any) -> str:
    """A value in one line, the middle of long lists left out."""
    if isinstance(value, np.ndarray):
        return shown(value.tolist())
    if isinstance(value, list) and len(value) > 12:
        return f"[{', '.join(map(shown, value[:4]))}, ... {len(value)} in all]"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = (f"{field}={shown(part)}" for field, part in zip(value._fields, value, strict=True))
        return f"{type(value).__name__}({', '.join(fields)})"
    return repr(value)


def floats(column: bytes) -> list[float]:
    values: list[float] = np.frombuffer(column, "<f4").tolist()
    return values


def integers(column: bytes, dtype: str = "<u4") -> list[int]:
    values: list[int] = np.frombuffer(column, dtype).tolist()
    return values


def column_bytes(columns: dict[str, NDArray[np.float32]]) -> dict[str, bytes]:
    return {name: column.tobytes() for name, column in columns.items()}


class Server:
    """The model's calls, made of a server. What this has chosen is called here what the model calls it."""

    def __init__(self, stub: pb_grpc.SelectionServiceStub, project: str) -> None:
        self._stub = stub
        self._project = project
        self._values: dict[str, Any] = {}
        self._names: dict[Any, str] = {}

    def knows(self, name: str) -> bool:
        """Whether the server has told its own value for a name of the model's."""
        return name in self._values

    def named(self, theirs: Any, mine: Any) -> Any:
        """An answer of the server's with the names that the model's has; a value keeps the first that it got."""
        if isinstance(theirs, list) and isinstance(mine, list):
            return [self.named(*pair) for pair in zip(theirs, mine, strict=False)] + theirs[len(mine) :]
        if not isinstance(theirs, tuple) or type(theirs) is not type(mine):
            return theirs
        chosen = {field for field in ("uid", "claim", "plan_id") if hasattr(mine, field)}
        names = {field: self._name(getattr(theirs, field), getattr(mine, field)) for field in chosen}
        return theirs._replace(**names)  # type: ignore[attr-defined]  # all answers are named tuples

    def _name(self, value: Any, name: str) -> Any:
        if value not in self._names and name not in self._values:
            self._names[value] = name
            self._values[name] = value
        return self._names.get(value, value)

    def _ref(self, ref: Ref) -> pb.ExperimentRef:
        return pb.ExperimentRef(project=self._project, name=ref.name, uid=self._values.get(ref.uid, ref.uid))

    def _member(self, member: Member) -> pb.Member:
        claim = self._values[member.claim]
        return pb.Member(ref=self._ref(member.ref), generation=member.generation, rank=member.rank, claim=claim)

    def _plan(self, plan_id: str) -> str:
        plan: str = self._values.get(plan_id, plan_id)
        return plan

    def create(self, name: str, spec: ExperimentSpec) -> Status:
        request = pb.CreateExperimentRequest(ref=self._ref(Ref(name)), spec=spec_to_proto(spec))
        return self._status(self._stub.CreateExperiment(request, timeout=TIMEOUT_S).experiment)

    def get(self, ref: Ref) -> Status:
        request = pb.GetExperimentRequest(ref=self._ref(ref))
        return self._status(self._stub.GetExperiment(request, timeout=TIMEOUT_S).experiment)

    def list_experiments(self) -> list[Status]:
        found: list[Status] = []
        request = pb.ListExperimentsRequest(project=self._project, page_size=1)
        while True:
            page = self._stub.ListExperiments(request, timeout=TIMEOUT_S)
            found += map(self._status, page.experiments)
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    def delete(self, ref: Ref) -> None:
        self._stub.DeleteExperiment(pb.DeleteExperimentRequest(ref=self._ref(ref)), timeout=TIMEOUT_S)

    def _status(self, experiment: pb.Experiment) -> Status:
        assert experiment.ref.project == self._project
        return Status(
            experiment.ref.name,
            experiment.ref.uid,
            spec_from_proto(experiment.spec),
            pb.ExperimentState.Name(experiment.state).removeprefix("EXPERIMENT_STATE_").lower(),
            experiment.epoch,
            experiment.generation,
            experiment.world_size,
            tuple(experiment.finished_ranks),
            experiment.visited_rows,
            experiment.non_finite_rows,
            experiment.unreported_rows,
            experiment.trained_rows,
            tuple(experiment.retained_epochs),
            dict(experiment.pins),
            experiment.num_steps,
        )

    def join(
        self,
        ref: Ref,
        run_id: str,
        rank: int,
        world_size: int,
        position: Position | None,
        current_if_not_retained: bool,
        straggler_timeout_ms: int | None,
        rejoining_as: Member | None,
        process_id: str,
    ) -> Joined:
        request = pb.JoinRunRequest(
            ref=self._ref(ref),
            run_id=run_id,
            rank=rank,
            world_size=world_size,
            position=None if position is None else pb.Position(epoch=position.epoch, step=position.step),
            current_if_not_retained=current_if_not_retained,
            straggler_timeout_ms=straggler_timeout_ms,
            rejoining_as=None if rejoining_as is None else self._member(rejoining_as),
            process_id=process_id,
        )
        joined = self._stub.JoinRun(request, timeout=TIMEOUT_S)
        position = Position(joined.position.epoch, joined.position.step)
        return Joined(joined.generation, joined.claim, position, joined.unreported_rows)  # type: ignore[arg-type]  # named later

    def claim(self, name: str) -> int:
        """The server's value of a claim."""
        value: int = self._values[name]
        return value

    def stream(
        self, member: Member, epoch: int, first_step: int, max_steps: int, timeout_s: float
    ) -> Streamed | Waits | Ended:
        request = pb.StreamEpochRequest(
            member=self._member(member), epoch=epoch, first_step=first_step, max_steps=max_steps
        )
        events = self._stub.StreamEpoch(request, timeout=timeout_s)
        try:
            first = next(events, None)
            if first is None:
                return Ended()
            if first.WhichOneof("event") == "wait":
                events.cancel()
                return Waits()
            chunks = [event.rows for event in events]
        except grpc.RpcError as error:
            if refusal(error).code == "DEADLINE_EXCEEDED":
                return Waits()
            raise
        step = first_step
        for chunk in chunks:
            assert chunk.first_step == step
            step += chunk.num_steps
        return Streamed(
            first.start.plan_id,
            first.start.num_steps,
            first.start.step_rows,
            first.start.trained_rows,
            first.start.table_checksum,
            first.start.selecting_interval,
            first.start.num_hidden_steps,
            first.start.learning_rate_factor,
            step - first_step,
            integers(b"".join(chunk.sample_ids for chunk in chunks)),
            floats(b"".join(chunk.prior_scores for chunk in chunks)),
            floats(b"".join(chunk.importance_weights for chunk in chunks)),
        )

    def report(
        self,
        member: Member,
        plan_id: str,
        first_step: int,
        num_steps: int,
        losses: NDArray[np.float32],
        columns: dict[str, NDArray[np.float32]],
        chosen: bytes,
    ) -> int:
        request = pb.ReportLossesRequest(
            member=self._member(member),
            plan_id=self._plan(plan_id),
            first_step=first_step,
            num_steps=num_steps,
            losses=losses.tobytes(),
            columns=column_bytes(columns),
            chosen=chosen,
        )
        return self._stub.ReportLosses(request, timeout=TIMEOUT_S).non_finite_losses

    def select(
        self,
        member: Member,
        plan_id: str,
        step: int,
        losses: NDArray[np.float32],
        columns: dict[str, NDArray[np.float32]],
    ) -> Selected:
        request = pb.SelectMiniBatchRequest(
            member=self._member(member),
            plan_id=self._plan(plan_id),
            step=step,
            losses=losses.tobytes(),
            columns=column_bytes(columns),
        )
        drawn = self._stub.SelectMiniBatch(request, timeout=TIMEOUT_S)
        return Selected(integers(drawn.positions), floats(drawn.importance_weights), drawn.non_finite_losses)

    def finish(self, member: Member, epoch: int, plan_id: str, reported_rows: int | None, crc: int | None) -> Finished:
        request = pb.FinishEpochRequest(
            member=self._member(member),
            epoch=epoch,
            plan_id=self._plan(plan_id),
            reported_rows=reported_rows,
            checksum=crc,
        )
        finished = self._stub.FinishEpoch(request, timeout=TIMEOUT_S)
        missing_steps = [(steps.first_step, steps.num_steps) for steps in finished.missing_steps]
        return Finished(missing_steps, list(finished.waiting_for_ranks))

    def export(self, ref: Ref, epoch: int | None) -> Exported:
        request = pb.ExportScoresRequest(ref=self._ref(ref), epoch=epoch)
        (rows,) = self._stub.ExportScores(request, timeout=TIMEOUT_S)
        assert rows.first_sample == 0
        return Exported(
            rows.epoch,
            floats(rows.scores),
            floats(rows.sampling_weights),
            integers(rows.num_visits, "<u2"),
            integers(rows.staleness, "<u1"),
            integers(rows.num_chosen, "<u2"),
            integers(rows.chosen_staleness, "<u1"),
            {name: floats(column) for name, column in rows.columns.items()},
        )

    def force_finish(self, ref: Ref, epoch: int) -> list[int]:
        request = pb.ForceFinishEpochRequest(ref=self._ref(ref), epoch=epoch)
        return list(self._stub.ForceFinishEpoch(request, timeout=TIMEOUT_S).skipped_ranks)

    def pin(self, ref: Ref, name: str, epoch: int | None) -> None:
        self._stub.PinEpoch(pb.PinEpochRequest(ref=self._ref(ref), pin=name, epoch=epoch), timeout=TIMEOUT_S)

    def import_scores(self, ref: Ref, *columns: NDArray[Any]) -> None:
        num_samples = columns[0].size
        messages = []
        for first in range(0, num_samples, 30):
            scores, sampling_weights, num_visits = (column[first : first + 30].tobytes() for column in columns)
            messages.append(
                pb.ImportScoresRequest(
                    first_sample=first, scores=scores, sampling_weights=sampling_weights, num_visits=num_visits
                )
            )
        messages[0].ref.CopyFrom(self._ref(ref))
        messages[0].num_samples = num_samples
        self._stub.ImportScores(iter(messages), timeout=TIMEOUT_S)


def mostly(usual: Sequence[T], otherwise: Sequence[T]) -> st.SearchStrategy[T]:
    """One of the usual values, or once in a while another one."""
    if not usual or not otherwise:
        return st.sampled_from([*usual, *otherwise])
    return st.integers(0, 11).flatmap(lambda i: st.sampled_from(otherwise if i == 7 else usual))


draws = ["successive", "systematic", "top_k"]
evolved = st.builds(
    EvolvedSampling,
    prune_ratio=st.sampled_from([0.25, 0.5, 0.0, None]),
    annealing=st.sampled_from([0.0, 0.05, None]),
    set_draw=st.sampled_from(draws),
    batch_draw=st.sampled_from([*draws, "with_replacement"]),
)
policies = st.one_of(
    evolved,
    evolved,
    st.builds(RandomSubset, prune_ratio=st.sampled_from([0.3, 0.75])),
    st.just(Uniform()),
    st.builds(InfoBatch, ratio=st.sampled_from([0.5, 0.9]), delta=st.sampled_from([0.7, 1.0])),
    st.builds(Kakurenbo, max_ratio=st.sampled_from([0.3, 0.6]), min_confidence=st.sampled_from([0.7, 2**-4])),
    st.builds(Kakurenbo, max_ratio=st.sampled_from([0.6, 0.9])),
    st.just(OrderedSGD()),
    st.builds(UCB, prune_ratio=st.sampled_from([0.3, 0.6])),
    st.builds(
        SelectiveBackprop,
        begin=st.sampled_from([0.0, 0.4]),
        end=st.sampled_from([0.7, 1.0]),
        selecting_interval=st.sampled_from([1, 2, 3]),
    ),
)


what_follows = st.sampled_from(["look", "stream", "export", "create"])


@st.composite
def specs(draw: st.DrawFn) -> ExperimentSpec:
    meta_batch_size, mini_batch_size = draw(st.sampled_from([(12, 6), (8, 4), (9, 3), (6, 6), (4, None)]))
    settings: dict[str, Any] = {
        "num_samples": draw(st.integers(40, 80)),
        "num_epochs": draw(st.integers(3, 5)),
        "meta_batch_size": meta_batch_size,
        "mini_batch_size": mini_batch_size,
        "policy": draw(policies),
        "seed": draw(st.integers(0, 9)),
        "warm_start": draw(st.sampled_from([False, False, True])),
        "max_skipped_epochs": draw(st.sampled_from([0, 0, 1])),
        "loss_clip_quantile": draw(st.sampled_from([1.0, 1.0, 0.5])),
    }
    weights: list[ImportanceWeight] = ["none", "unbiased", "self_normalized"]
    settings["importance_weight"] = draw(st.sampled_from(weights))
    with contextlib.suppress(InvalidValue):
        return ExperimentSpec(**settings)
    # The policy has no inclusion probabilities, or could select nothing from such steps.
    sizes = {"meta_batch_size": 8, "mini_batch_size": 4}
    return ExperimentSpec(**(settings | sizes | {"importance_weight": "none"}))


class Values(NamedTuple):
    """Random float32 values, some of them odd: a column that is short to print."""

    size: int
    seed: int
    odd: float | None = None

    def column(self) -> NDArray[np.float32]:
        random = np.random.default_rng(self.seed)
        column = (random.integers(0, 64, self.size) / 16).astype(np.float32)
        if self.odd is not None:
            column[random.random(self.size) < 0.3] = self.odd
        return column

    def of_policy(self, name: str) -> NDArray[np.float32]:
        """Losses, or what else is reported: shares, of predictions that are right 0 or 1; the odd ones as they are."""
        column = self.column()
        if name == "loss":
            return column
        shares = np.round(column / 4) if name == "correct" else column / 4
        return np.where(column >= 0, shares, column).astype(np.float32)


@st.composite
def some_values(draw: st.DrawFn, count: int) -> Values:
    odd = draw(mostly([None], [np.nan, np.inf, -np.inf, -1.0]))
    return Values(draw(mostly([count], [max(count - 1, 0)])), draw(st.integers(0, 99)), odd)


@st.composite
def some_columns(draw: st.DrawFn, experiment: Experiment, count: int) -> dict[str, Values]:
    """What a policy needs beside losses; mostly just that."""
    names = list(experiment.spec.policy.reported_columns)
    others = [names[1:], [*names, "other"]] if names else [["correct"]]
    return {name: draw(some_values(count)) for name in draw(mostly([names], others))}


@st.composite
def some_bits(draw: st.DrawFn, num_steps: int, num_rows: int) -> bytes:
    """Which rows were chosen, or nothing."""
    num_bytes = num_steps * -(-num_rows // 8)
    return draw(mostly([b"", draw(st.randoms()).randbytes(num_bytes)], [b"\xff" * (num_bytes + 1)]))


# What is asked for depends on what there is: these look at the machine, and give one of its methods with arguments.

Call = tuple[Any, ...]


@st.composite
def some_ref(draw: st.DrawFn) -> Ref:
    machine: Machine = draw(st.runner())
    odd = [Ref(name, uid) for name in (*NAMES, "unknown") for uid in ("", *machine.uids)]
    return draw(mostly(machine.refs(), odd))


@st.composite
def some_member(draw: st.DrawFn) -> Member:
    machine: Machine = draw(st.runner())
    current = [member for member in machine.members if machine.is_current(member)]
    member = draw(mostly(current, [member for member in machine.members if member not in current]))
    return draw(mostly([member], [member._replace(ref=Ref(member.ref.name))]))


@st.composite
def some_plan(draw: st.DrawFn, member: Member) -> str:
    """Mostly the current one, if a rank can know it."""
    machine: Machine = draw(st.runner())
    experiment = machine.about(member)
    plan_id = experiment.current.plan_id
    can_know = machine.server.knows(plan_id) or (experiment.state == "open" and machine.is_current(member))
    return draw(mostly([plan_id] if can_know else [], machine.plan_ids))


@st.composite
def some_position(draw: st.DrawFn, experiment: Experiment) -> Position:
    num_epochs = experiment.spec.num_epochs
    retained = sorted(experiment.epochs)
    epoch = draw(mostly([*retained, *retained[:-1]], range(num_epochs + 2)))
    num_steps = experiment.num_steps(min(epoch, num_epochs))
    return Position(epoch, draw(mostly([0, num_steps, *range(num_steps)], [num_steps + 1])))


@st.composite
def new_runs(draw: st.DrawFn) -> Call:
    """A run's first rank; now and then one of a run that has been there before."""
    machine: Machine = draw(st.runner())
    ref = draw(st.sampled_from(machine.refs()))
    experiment = machine.model.experiments[ref.name]
    sizes = [size for size in (1, 2, 3) if experiment.can_have(size)]
    world_size = draw(mostly(sizes + sizes[1:], [size for size in (0, 2, 3, 5, 24) if size not in sizes]))
    rank = draw(mostly(range(max(world_size, 1)), [world_size]))
    earlier = [member for member in machine.members if (member.ref, member.rank) == (ref, rank)]
    member = draw(st.sampled_from([None, None, None, None, *earlier[:2]]))
    return (
        "join",
        draw(mostly([ref], [Ref(ref.name)])),
        machine.run_ids[member] if member else f"run-{len(machine.members) + 1}",
        rank,
        world_size,
        draw(st.none() | some_position(experiment) | some_position(experiment)),
        draw(mostly([False], [True])),
        draw(mostly([None], [HOUR_MS])),
        draw(st.sampled_from([None, member])),
        machine.new_process_id(),
    )


@st.composite
def returns(draw: st.DrawFn) -> Call:
    """A run that goes back to the end of an earlier epoch, which only the store knows if the policy is adaptive."""
    machine: Machine = draw(st.runner())
    ref = draw(st.sampled_from([ref for ref in machine.refs() if len(machine.model.experiments[ref.name].epochs) > 1]))
    experiment = machine.model.experiments[ref.name]
    epoch = draw(st.sampled_from(sorted(experiment.epochs)[:-1]))
    world_size = draw(st.sampled_from([size for size in (1, 2, 3) if experiment.can_have(size)]))
    position = Position(epoch, experiment.num_steps(epoch))
    run_id = f"run-{len(machine.members) + 1}"
    return "join", ref, run_id, 0, world_size, position, False, None, None, machine.new_process_id()


@st.composite
def joins_of_runs(draw: st.DrawFn) -> Call:
    """Another rank of the latest run, or one that joins again, as the same process or as another."""
    machine: Machine = draw(st.runner())
    ref = draw(st.sampled_from(machine.refs(begun=True)))
    experiment = machine.model.experiments[ref.name]
    run = experiment.run
    rank = draw(mostly(range(run.world_size), [run.world_size]))
    earlier = [m for m in machine.members if (m.ref, m.generation, m.rank) == (ref, experiment.generation, rank)]
    processes = [process_id for process_id, (known, _) in run.processes.items() if known == rank]
    positions = sorted(run.begun_at, key=lambda position: position or Position(0, 0))
    return (
        "join",
        ref,
        run.run_id,
        rank,
        draw(mostly([run.world_size], [1, 2, 3])),
        draw(mostly(positions, [draw(some_position(experiment))])),
        draw(mostly([False], [True])),
        draw(mostly([run.straggler_timeout_ms], [None, HOUR_MS])),
        draw(mostly([None], earlier[-2:])),
        draw(mostly(["", machine.new_process_id()], processes)),
    )


@st.composite
def streams(draw: st.DrawFn) -> Call:
    machine: Machine = draw(st.runner())
    member = draw(some_member())
    experiment = machine.about(member)
    epoch, num_steps = experiment.epoch, experiment.num_steps(experiment.epoch)
    return (
        "stream",
        member,
        draw(st.sampled_from([epoch] * 6 + [epoch + 1] * 2 + [max(epoch - 1, 0), epoch + 2])),
        draw(mostly(range(num_steps + 1), [num_steps + 1])),
        draw(st.integers(0, 3)),
    )


@st.composite
def reports(draw: st.DrawFn) -> Call:
    machine: Machine = draw(st.runner())
    member = draw(some_member())
    experiment = machine.about(member)
    total = experiment.num_steps(experiment.epoch)
    first_step = draw(mostly(range(total), [total]))
    num_steps = draw(mostly(range(1, total - first_step + 1), [0, total + 1]))
    num_rows = part_rows(experiment)
    losses, columns = draw(some_values(num_steps * num_rows)), draw(some_columns(experiment, num_steps * num_rows))
    chosen, times = draw(some_bits(num_steps, num_rows)), draw(mostly([1], [2]))
    return "report", member, draw(some_plan(member)), first_step, num_steps, losses, columns, chosen, times


@st.composite
def selections(draw: st.DrawFn) -> Call:
    machine: Machine = draw(st.runner())
    member = draw(some_member())
    experiment = machine.about(member)
    total = experiment.num_steps(experiment.epoch)
    step = draw(mostly(range(total), [total]))
    num_rows = part_rows(experiment)
    losses, columns = draw(some_values(num_rows)), draw(some_columns(experiment, num_rows))
    return "select", member, draw(some_plan(member)), step, losses, columns


def part_rows(experiment: Experiment) -> int:
    """Rows of a rank's part of a step; if there is no epoch or no rank, of what might be one."""
    epoch = min(experiment.epoch, experiment.spec.num_epochs - 1)
    return experiment.spec.shape(epoch).step_rows // max(experiment.run.world_size, 1)


@st.composite
def finishes(draw: st.DrawFn) -> Call:
    machine: Machine = draw(st.runner())
    member = draw(some_member())
    experiment = machine.about(member)
    epoch = experiment.epoch
    rows, crc = 0, 0
    if experiment.state != "finished" and machine.is_current(member):
        rows, crc = experiment.reported_rows(member.rank), checksum(experiment.recorded(member.rank))
    told = [(None, None), (rows, crc), (rows, None), (None, crc), (rows + 1, None), (None, crc ^ 1), (rows, crc ^ 1)]
    return (
        "finish",
        member,
        draw(mostly([epoch], [max(epoch - 1, 0), epoch + 1])),
        draw(some_plan(member)),
        *draw(st.sampled_from(told)),
        draw(what_follows),
    )


@st.composite
def trainings(draw: st.DrawFn) -> Call:
    machine: Machine = draw(st.runner())
    ref = draw(st.sampled_from(machine.refs(begun=True)))
    experiment = machine.model.experiments[ref.name]
    num_rows = experiment.num_steps(experiment.epoch) * part_rows(experiment)
    names = ["loss", *experiment.spec.policy.reported_columns]
    reports = [{name: draw(some_values(num_rows)) for name in names} for _ in range(experiment.run.world_size)]
    return "train_the_epoch", ref, reports, draw(what_follows)


@st.composite
def administrations(draw: st.DrawFn) -> Call:
    machine: Machine = draw(st.runner())
    call = draw(st.sampled_from(["get", "export", "create", "pin", "pin", "force_finish", "import_scores", "delete"]))
    ref = draw(some_ref())
    known = machine.model.experiments.get(ref.name)
    epochs = sorted(known.epochs) if known else []
    match call:
        case "create":
            name = draw(st.sampled_from(NAMES))
            known = machine.model.experiments.get(name)
            return call, name, draw(mostly([known.spec] if known else [], [draw(specs())]))
        case "delete":
            return draw(mostly(["get"], ["delete"])), ref
        case "export":
            return call, ref, draw(mostly([None, *epochs], range(6)))
        case "force_finish":
            return call, ref, draw(mostly(epochs[-1:], range(6)))
        case "pin":
            names = draw(mostly([["x"], ["y"]], [[f"pin-{i}" for i in range(17)]]))
            return call, ref, names, draw(mostly([*epochs, *epochs[-1:], None], range(6)))
        case "import_scores":
            scores = draw(some_values(known.spec.num_samples if known else 40))
            return call, ref, scores, draw(some_values(scores.size))._replace(size=scores.size), draw(st.booleans())
    return call, ref


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Weighed so that runs get far: rules of their own would mostly be ones that need no run."""
    machine: Machine = draw(st.runner())
    kinds = [administrations, administrations]
    if machine.refs(begun=True):
        kinds += [trainings, joins_of_runs, joins_of_runs]
    if machine.members and machine.refs():
        kinds += [streams, reports, reports, reports, selections, selections, finishes, finishes, finishes]
    if any(len(known.epochs) > 1 for known in machine.model.experiments.values()):
        kinds += [returns]
    if machine.refs():
        is_running = any(known.generation and known.state != "finished" for known in machine.model.experiments.values())
        kinds += [new_runs] * (2 if is_running else len(kinds))
    return draw(draw(st.sampled_from(kinds))())


class Machine(RuleBasedStateMachine):
    """Asks the model and the server the same, and compares what they answer and what state they are in."""

    stub: pb_grpc.SelectionServiceStub

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.server = Server(self.stub, f"{os.getpid()}-{time.time_ns()}-{next(_projects)}")
        self.members: list[Member] = []
        self.uids: list[str] = []
        self.run_ids: dict[Member, str] = {}
        self.plan_ids = ["no-plan"]
        self.compared: dict[str, str] = {}

    def refs(self, *, begun: bool = False) -> list[Ref]:
        """The experiments that there are, or those of them that have a run."""
        known = sorted(self.model.experiments.items())
        return [Ref(name, experiment.uid) for name, experiment in known if experiment.generation or not begun]

    def new_process_id(self) -> str:
        return f"process-{len(self.members) + 1}"

    def is_current(self, member: Member) -> bool:
        return member.ref in self.refs() and self.about(member).is_current(member)

    def about(self, member: Member) -> Experiment:
        """The experiment of a member or, if it was deleted, another one."""
        experiments = self.model.experiments
        return experiments.get(member.ref.name) or next(iter(experiments.values()))

    def both(self, call: str, *arguments: Any) -> Any:
        """Make a call of both; returns the answer, or None if it was refused."""
        mine = outcome(getattr(self.model, call), *arguments)
        note(f"{call}({', '.join(map(shown, arguments))}) -> {shown(mine)}")
        if call == "stream":
            arguments += (WAITS_S if isinstance(mine, Waits) else TIMEOUT_S,)
        theirs = self.server.named(outcome(getattr(self.server, call), *arguments), mine)
        if theirs != mine:
            raise AssertionError(f"{call}: expected {shown(mine)}, came {shown(theirs)}")
        return None if isinstance(mine, Refusal) else mine

    @invariant()
    def both_are_in_the_same_state(self) -> None:
        for name, experiment in self.model.experiments.items():
            # A server makes a turn in the background, and lets go of the oldest epoch a moment later.
            is_turning = experiment.state == "sealed" or self.compared.get(name) != experiment.current.plan_id
            deadline_s = time.monotonic() + TURN_S * is_turning
            while True:
                theirs = self.server.get(Ref(name))
                if experiment.state == "sealed" or (experiment.state, theirs.state) == ("unplanned", "open"):
                    self.model.settle(experiment)
                mine = self.model.get(Ref(name))
                theirs = self.server.named(theirs, mine)
                if theirs == mine:
                    break
                if time.monotonic() > deadline_s:
                    raise AssertionError(f"state: expected {shown(mine)}, came {shown(theirs)}")
                time.sleep(0.002)
            self.compared[name] = experiment.current.plan_id

    @initialize(spec=specs(), seed=st.integers(0, 99))
    def begin(self, spec: ExperimentSpec, seed: int) -> None:
        self.create("a", spec)
        if spec.warm_start:
            values = Values(spec.num_samples, seed)
            self.import_scores(self.refs()[0], values, values, True)

    @rule(call=calls())
    def ask(self, call: Call) -> None:
        method, *arguments = call
        getattr(self, method)(*arguments)

    def create(self, name: str, spec: ExperimentSpec) -> None:
        created = self.both("create", name, spec)
        if created and created.uid not in self.uids:
            self.uids.append(created.uid)

    def get(self, ref: Ref) -> None:
        self.both("get", ref)
        self.both("list_experiments")

    def delete(self, ref: Ref) -> None:
        self.both("delete", ref)
        self.both("list_experiments")

    def export(self, ref: Ref, epoch: int | None) -> None:
        self.both("export", ref, epoch)

    def force_finish(self, ref: Ref, epoch: int) -> None:
        self.both("force_finish", ref, epoch)

    def pin(self, ref: Ref, names: list[str], epoch: int | None) -> None:
        for name in names:
            self.both("pin", ref, name, epoch)

    def import_scores(self, ref: Ref, scores: Values, sampling_weights: Values, with_visits: bool) -> None:
        num_visits = (np.arange(scores.size) % 3 * with_visits).astype(np.uint16)
        self.both("import_scores", ref, scores.column(), sampling_weights.column(), num_visits)

    def join(self, ref: Ref, run_id: str, rank: int, *others: Any) -> None:
        joined = self.both("join", ref, run_id, rank, *others)
        if not joined:
            return
        member = Member(ref, joined.generation, rank, joined.claim)
        earlier = [m.claim for m in self.members if (m.ref, m.rank) == (ref, rank) and m != member]
        assert all(self.server.claim(joined.claim) > self.server.claim(claim) for claim in earlier)
        if member not in self.members:
            self.members.append(member)
            self.run_ids[member] = run_id

    def stream(self, member: Member, epoch: int, first_step: int = 0, max_steps: int = 0) -> None:
        streamed = self.both("stream", member, epoch, first_step, max_steps)
        if isinstance(streamed, Waits):  # what the server had begun when the wait was cut short, it now does
            self.stream(member, self.about(member).epoch)
        if isinstance(streamed, Streamed) and streamed.plan_id not in self.plan_ids:
            self.plan_ids.append(streamed.plan_id)

    def learn(self, member: Member, plan_id: str) -> None:
        """A rank knows a plan from its stream."""
        if plan_id not in self.plan_ids:
            self.stream(member, self.about(member).epoch, 0, 1)

    def report(
        self,
        member: Member,
        plan_id: str,
        first_step: int,
        num_steps: int,
        losses: Values,
        columns: dict[str, Values],
        chosen: bytes,
        times: int,
    ) -> None:
        self.learn(member, plan_id)
        values = {name: column.of_policy(name) for name, column in columns.items()}
        for _ in range(times):
            self.both("report", member, plan_id, first_step, num_steps, losses.column(), values, chosen)

    def select(self, member: Member, plan_id: str, step: int, losses: Values, columns: dict[str, Values]) -> None:
        self.learn(member, plan_id)
        values = {name: column.of_policy(name) for name, column in columns.items()}
        self.both("select", member, plan_id, step, losses.column(), values)

    def finish(
        self, member: Member, epoch: int, plan_id: str, reported_rows: int | None, crc: int | None, then: str
    ) -> None:
        self.learn(member, plan_id)
        self.both("finish", member, epoch, plan_id, reported_rows, crc)
        self.after_a_finish(member, then)

    def after_a_finish(self, member: Member, then: str) -> None:
        """If the epoch is sealed, ask at once for what comes after the turn."""
        experiment = self.about(member)
        if experiment.state != "sealed":
            return
        match then:
            case "stream":
                self.stream(member, experiment.epoch + 1)
            case "export":
                self.both("export", member.ref, None)
            case "create":
                self.both("create", member.ref.name, experiment.spec)

    def train_the_epoch(self, ref: Ref, reports: list[dict[str, Values]], then: str) -> None:
        """All ranks of the run join, report what they have not reported yet, and finish."""
        experiment = self.model.experiments[ref.name]
        run, epoch = experiment.run, experiment.epoch
        for rank in range(run.world_size):
            if rank not in run.claims:
                self.join(ref, run.run_id, rank, run.world_size, None, False, run.straggler_timeout_ms, None, "")
            member = Member(ref, experiment.generation, rank, run.claims[rank])
            self.stream(member, epoch)
            if experiment.state == "finished":
                return
            plan_id, recorded = experiment.current.plan_id, experiment.recorded(rank)
            if all(values.size == recorded.size for values in reports[rank].values()):
                columns = {n: values.of_policy(n).reshape(recorded.shape) for n, values in reports[rank].items()}
                losses = columns.pop("loss")
                for step in range(run.first_step, len(recorded)):
                    if not np.isnan(recorded[step]).any():
                        continue
                    others = {name: column[step] for name, column in columns.items()}
                    if step % 2:
                        chosen = np.packbits(losses[step] > 2, bitorder="little").tobytes()
                        self.both("report", member, plan_id, step, 1, losses[step], others, chosen)
                    else:
                        self.both("select", member, plan_id, step, losses[step], others)
            told = experiment.reported_rows(rank), checksum(recorded)
            self.both("finish", member, epoch, plan_id, *told)
            if experiment.state == "sealed":
                self.after_a_finish(member, then)
                return


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[pb_grpc.SelectionServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.SelectionServiceStub(channel)


@pytest.mark.timeout(0 if LONG_RUN else 900)  # finding the shortest history takes minutes
def test_a_server_answers_as_the_model_does(stub: pb_grpc.SelectionServiceStub) -> None:
    class Connected(Machine):
        pass

    Connected.stub = stub
    run_state_machine_as_test(
        Connected,
        settings=settings(
            max_examples=int(LONG_RUN or 100),
            stateful_step_count=40,
            deadline=None,
            derandomize=not LONG_RUN,
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
