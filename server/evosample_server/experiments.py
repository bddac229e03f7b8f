"""The use cases: what clients ask of an experiment."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from evosample.errors import (
    AlreadyExistsError,
    EpochClosedError,
    EpochNotRetainedError,
    FailedPreconditionError,
    NotFoundError,
    ResourceExhaustedError,
    StoreBehindError,
    SupersededError,
)
from evosample.sampling import (
    DoReMi,
    EpochShape,
    ExperimentSpec,
    Groups,
    InvalidValue,
    MiniBatch,
    MissingPolicy,
    Report,
    Scores,
    Table,
    check_groups,
    check_int,
    check_name,
    check_scores,
    checksum,
    initial_scores,
    recorded_losses,
    sample_id_dtype,
    select_mini_batch,
    shown,
)
from evosample.wire import ExperimentName, ExperimentStatus, Position, Watched, check_column
from evosample_server.keys import BLOCK_ROWS
from evosample_server.metrics import Metrics
from evosample_server.planner import Planner
from evosample_server.store import Head, Member, Store
from evosample_server.tasks import in_thread

_log = structlog.get_logger()

_MAX_PAGE_SHARDS = 200_000  # up to 1 MiB of their sizes in a message
_MAX_NAMED_RANKS = 100
_WAIT_MESSAGE_INTERVAL_S = 2.0
_WATCH_S = 600.0
_TARGET_MESSAGE_BYTES = 8 * BLOCK_ROWS // 4  # as a rule a quarter of a block; more leaves the processor's cache
_EXPORT_BYTES = 960_000
_MAX_EXTENDED_SAMPLES = 2**32  # beyond it ids would need more bytes, from one epoch to the next
_MAX_PROJECT_EXPORTS = 10
_MAX_PROJECT_WATCHES = 200
_MAX_PROJECT_LOOKS_PER_S = 50


class Limits(NamedTuple):
    """What a server takes on; see the settings of these names."""

    max_samples: int
    max_experiments: int
    max_project_samples: int
    max_streams: int
    max_project_streams: int
    max_message_bytes: int


class Joined(NamedTuple):
    """A rank's place in a run."""

    generation: int
    claim: int
    position: Position
    unreported_rows: int


class EpochWait(NamedTuple):
    """The epoch is not planned yet; ranks that have not finished the one before, at most 100."""

    waiting_for_ranks: list[int]


class EpochStart(NamedTuple):
    """The epoch is planned."""

    plan_id: str
    shape: EpochShape
    table_checksum: int
    new_rows: int | None
    skipped_ranks: tuple[int, ...]
    learning_rate_factor: float


class EpochRows(NamedTuple):
    """Consecutive steps of a rank's part; the columns are [num_steps, part rows of a step]."""

    first_step: int
    table: Table


class ScoreRows(NamedTuple):
    """Columns of consecutive samples as they came: float32, float32, uint16 or empty, and a policy's own, float32."""

    first_sample: int
    scores: bytes
    sampling_weights: bytes
    num_visits: bytes
    columns: Mapping[str, bytes]


class GroupRows(NamedTuple):
    """Columns of consecutive samples as they came: uint16, and float32 or empty."""

    first_sample: int
    groups: bytes
    reference_losses: bytes


class ReportedSteps(NamedTuple):
    """A rank's report of the steps [first_step, first_step + num_steps), as it came; see `ReportLossesRequest`."""

    first_step: int
    num_steps: int
    losses: bytes
    columns: Mapping[str, bytes]
    chosen: bytes


class Finish(NamedTuple):
    """Steps (first, count) to be sent again, or else the ranks that have yet to finish."""

    missing_steps: list[tuple[int, int]]
    waiting_for_ranks: list[int]


class Experiments:
    """All experiments of one Redis. Holds no state of its own: any server can answer any call."""

    def __init__(self, store: Store, planner: Planner, limits: Limits, *, metrics: Metrics) -> None:
        self._store = store
        self._planner = planner
        self._limits = limits
        self._metrics = metrics
        self._num_streams: Counter[str] = Counter()  # by project, as the following
        self._num_watches: Counter[str] = Counter()
        self._num_exports: Counter[str] = Counter()
        metrics.streams.set_function(self._num_streams.total)
        metrics.project_streams.set_function(lambda: max(self._num_streams.values(), default=0))

    async def create(self, name: ExperimentName, uid: str, spec: ExperimentSpec) -> ExperimentStatus:
        """Create an experiment and plan its first epoch, unless an equal one is there."""
        if uid:
            raise InvalidValue("ref.uid", uid, "nothing: the server chooses the uid of a new experiment")
        if isinstance(spec.policy, MissingPolicy):
            raise spec.policy.missing("on the server")
        if spec.num_samples > self._limits.max_samples:
            raise self._too_many_samples(spec.num_samples)
        head = await self._store.head(name)
        if head is None:
            await self._reserve(name, spec.num_samples)
            await self._store.create(name, spec)
            head = await self._store.head(name)  # which may be of another spec: others may create it at the same time
        if head is not None:
            # Whoever made it may have ended before it could.
            await self._store.list_name(name, head.extended_spec.num_samples)
        head = await self._planner.settled(name)
        if head is None:
            raise NotFoundError(f"experiment {name.name!r} was deleted while it was being created", field="name")
        if not _is_stage(spec, head):
            differing = [
                f"{field.name} is {shown(ours)}, not {shown(theirs)}"
                for field in dataclasses.fields(spec)
                if (ours := getattr(head.spec, field.name)) != (theirs := getattr(spec, field.name))
            ]
            raise AlreadyExistsError(
                f"experiment {name.name!r} exists with another spec: {'; '.join(differing)}. "
                "Choose another name, or delete it first"
            )
        return await self._store.status(head)

    def _too_many_samples(self, num_samples: int) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"num_samples={num_samples:,}: this server takes at most {self._limits.max_samples:,} samples an "
            "experiment; raise it with --max-samples, where it has the memory (about 60 bytes a sample)"
        )

    async def _reserve(self, name: ExperimentName, num_samples: int) -> None:
        """Take a place among a project's experiments, before the experiment is made."""
        max_experiments, max_samples = self._limits.max_experiments, self._limits.max_project_samples
        lacking, count = await self._store.reserve(
            name, num_samples, max_experiments=max_experiments, max_project_samples=max_samples
        )
        match lacking:
            case "experiments":
                raise ResourceExhaustedError(
                    f"project {name.project!r} has {count:,} experiments, of {max_experiments:,} that this server "
                    "takes: delete some, or raise it with --max-experiments"
                )
            case "samples":
                raise ResourceExhaustedError(
                    f"num_samples={num_samples:,}: the experiments of project {name.project!r} have {count:,} samples, "
                    f"of {max_samples:,} that this server takes: delete some, or raise it with --max-project-samples"
                )

    async def get(self, name: ExperimentName, uid: str) -> ExperimentStatus:
        """An experiment's status; NotFoundError if there is none of this name and, if given, uid."""
        return await self._store.status(await self._head(name, uid))

    async def list_page(self, project: str, page_size: int, page_token: str) -> tuple[list[ExperimentStatus], str]:
        """A page of a project's experiments in the order of their names, and the token of the next page."""
        check_name("project", project)
        if page_token:
            check_name("page_token", page_token)
        limit = check_int("page_size", page_size or 100, 1, 1000)
        names = await self._store.list_names(project, page_token, limit)
        page: list[ExperimentStatus] = []
        num_shards = 0
        for name in (ExperimentName(project, found) for found in names):
            head = await self._store.head(name)
            if head is None:
                await self._store.forget_name(name)
                continue
            num_shards += len(head.spec.shard_sizes)
            num_shards += 0 if head.spec.mixture is None else 2 * len(head.spec.mixture.weights)  # about as many bytes
            if page and num_shards > _MAX_PAGE_SHARDS:
                return page, page[-1].name
            page.append(await self._store.status(head))
        return page, names[-1] if len(names) == limit else ""

    async def names(self, project: str) -> list[str]:
        """The names of a project's experiments, in order; one may have been deleted just now."""
        check_name("project", project)
        names: list[str] = []
        while more := await self._store.list_names(project, names[-1] if names else "", 10_000):
            names += more
        return names

    async def delete(self, name: ExperimentName, uid: str) -> None:
        """Delete an experiment with everything that belongs to it."""
        head = await self._head(name, uid)
        if not await self._store.delete(head):
            raise _gone(name, head.uid)

    async def force_finish(self, name: ExperimentName, uid: str, epoch: int) -> list[int]:
        """End an epoch, if it has not ended yet, without the ranks that have not finished it; returns these."""
        await self._head(name, uid)
        skipped: list[int] = []
        while True:
            head = await self._planner.settled(name)
            if head is None or (uid and head.uid != uid):
                raise _gone(name, uid)
            if not head.generation:
                raise FailedPreconditionError(f"no run of experiment {name.name!r} has begun: there is nothing to end")
            if epoch > head.epoch:
                raise FailedPreconditionError(
                    f"epoch {epoch} is not reached yet: the experiment stands at epoch {head.epoch}"
                )
            if epoch < head.epoch or head.state == "finished":
                return skipped[:_MAX_NAMED_RANKS]
            skipped = await self._store.unfinished_ranks(head)
            await self._seal(head, at_once=True)

    async def _seal(self, head: Head, *, at_once: bool) -> None:
        if await self._store.seal(head, at_once=at_once):
            skipped = await self._store.unfinished_ranks(head)
            _log.warning(
                "epoch ended without some ranks", experiment=head.name.name, epoch=head.epoch, ranks=skipped[:100]
            )
            await self._planner.announce(head.uid)

    async def pin(self, name: ExperimentName, uid: str, pin: str, epoch: int | None) -> None:
        """Keep an epoch under a name beyond the retained ones, or let go of what that name keeps."""
        check_name("pin", pin)
        head = await self._head(name, uid)
        match await self._store.pin(head, pin, epoch):
            case "gone":
                raise _gone(name, head.uid)
            case "not_retained":
                raise await self._not_retained(head, f"epoch {epoch}")
            case "too_many":
                raise ResourceExhaustedError(
                    f"pin={pin!r}: experiment {name.name!r} has 16 pins, as many as it may have; let go of one, or use "
                    f"one of their names again: {', '.join((await self._store.status(head)).pins)}"
                )

    async def _not_retained(self, head: Head, what: str) -> EpochNotRetainedError:
        retained = ", ".join(map(str, await self._store.retained_epochs(head)))
        return EpochNotRetainedError(
            f"{what} is not here: experiment {head.name.name!r} stands at epoch {head.epoch}, and keeps the scores of "
            f"epochs {retained}. Keep more with --retain-epochs, or pin the epochs of checkpoints"
        )

    async def import_scores(
        self, name: ExperimentName, uid: str, num_samples: int, columns: AsyncIterator[ScoreRows]
    ) -> None:
        """Start an experiment from known scores, before its first run joins."""
        head = await self._head(name, uid)
        n = head.spec.num_samples
        if num_samples != n:
            raise InvalidValue("num_samples", num_samples, f"the experiment's number of samples, {n:,}")
        if head.generation:
            raise _started(head)
        scores = initial_scores(n, head.spec.policy.columns)
        scores.num_visits[:] = 1
        done = 0
        async for first_sample, *received, own in columns:
            num_rows = len(received[0]) // 4
            _check_in_order("scores", first_sample, num_rows, done, n)
            fixed: Sequence[NDArray[Any]] = scores[:3]
            for field, values, data in zip(ScoreRows._fields[1:4], fixed, received, strict=True):
                if data or field != "num_visits":
                    rows = check_column(field, data, num_rows, values.dtype)
                    if field != "num_visits":
                        check_scores(field, rows)
                    values[done : done + num_rows] = rows
            for column, data in own.items():
                if column not in scores.columns:
                    expected = f"what {type(head.spec.policy).__name__} keeps: {', '.join(scores.columns) or 'nothing'}"
                    raise InvalidValue("columns", column, expected)
                rows = check_column(f"columns.{column}", data, num_rows)
                if not np.isfinite(rows).all():
                    raise InvalidValue(f"columns.{column}", "not all finite", "finite numbers")
                scores.columns[column][done : done + num_rows] = rows
            done += num_rows
        if done != n:
            raise InvalidValue("scores", f"{done:,} samples", f"those of all {n:,}")
        is_imported = False
        while not is_imported:  # other ranks may be bringing the same scores
            found = await self._planner.settled(name)
            if found is None or found.uid != head.uid:
                raise _gone(name, head.uid)
            if found.generation:
                raise _started(found)
            is_imported = await self._planner.plan_first(found, scores, is_imported=True)

    async def set_groups(
        self, name: ExperimentName, uid: str, num_samples: int, columns: AsyncIterator[GroupRows]
    ) -> None:
        """Say which group each sample belongs to; before the first run joins the first epoch is planned anew."""
        head = await self._head(name, uid)
        spec = head.extended_spec
        n = spec.num_samples
        if not spec.num_groups:
            raise InvalidValue("groups", f"{num_samples:,} samples", "none: this experiment was created without groups")
        if num_samples != n:
            raise InvalidValue("num_samples", num_samples, f"the experiment's number of samples, {n:,}")
        needs_reference = isinstance(spec.mixture, DoReMi)
        groups = Groups(np.empty(n, np.uint16), np.empty(n, np.float32) if needs_reference else None)
        done = 0
        async for first_sample, ids, reference_losses in columns:
            num_rows = len(ids) // 2
            _check_in_order("groups", first_sample, num_rows, done, n)
            rows = slice(done, done + num_rows)
            groups.ids[rows] = check_column("groups", ids, num_rows, np.uint16)
            if groups.reference_losses is not None:
                groups.reference_losses[rows] = check_column("reference_losses", reference_losses, num_rows)
            elif reference_losses:
                raise InvalidValue("reference_losses", f"{len(reference_losses):,} bytes", "none without DoReMi")
            done += num_rows
        if done != n:
            raise InvalidValue("groups", f"{done:,} samples", f"those of all {n:,}")
        await asyncio.to_thread(check_groups, spec, groups)
        while not self._store.has_groups(head, groups):  # as they are when another rank has brought them
            if head.state == "finished":
                raise FailedPreconditionError(f"experiment {name.name!r} has finished: no epoch is left to be planned")
            await self._store.write_groups(head, groups)
            head = await self._head(name, head.uid)
            if head.extended_spec.num_samples != n:
                raise InvalidValue(
                    "num_samples", n, f"{head.extended_spec.num_samples:,}: samples were added meanwhile"
                )
        await self._settled_first(name, head.uid)

    async def _settled_first(self, name: ExperimentName, uid: str) -> Head:
        """The head; before the first run its epoch is planned with all that was said of its samples."""
        while True:
            head = await self._planner.settled(name)
            if head is None or head.uid != uid:
                raise _gone(name, uid)
            if head.generation or (
                self._planner.next_spec(head) == head.spec
                and (await self._store.plan_info(head, head.plan_id)).groups_id == head.groups_id
            ):
                return head
            with contextlib.suppress(EpochClosedError):  # another rank has planned it, and removed what was there
                scores = await self._store.read_scores(head, head.plan_id)
                is_imported = await self._store.is_imported(head)
                await self._planner.plan_first(head, scores, is_imported=is_imported)

    async def extend(self, name: ExperimentName, uid: str, num_samples: int, shard_sizes: tuple[int, ...]) -> None:
        """Add samples, up to this number in all, from the next epoch on that is planned."""
        while True:
            head = await self._head(name, uid)
            uid, before = head.uid, head.extended_spec
            check_int("num_samples", num_samples, head.birth_spec.num_samples, _MAX_EXTENDED_SAMPLES)
            if num_samples <= before.num_samples:  # was said before
                break
            if num_samples > self._limits.max_samples:
                raise self._too_many_samples(num_samples)
            if head.state == "finished" or (head.generation and head.epoch == before.num_epochs - 1):
                raise FailedPreconditionError(
                    f"experiment {name.name!r} is in its last epoch, or has finished: no epoch is left to be planned"
                )
            spec = dataclasses.replace(before, num_samples=num_samples, shard_sizes=before.shard_sizes + shard_sizes)
            default = dataclasses.replace(before, shuffle_block_samples=cast(int, None))
            if default.shuffle_block_samples == before.shuffle_block_samples:
                spec = dataclasses.replace(spec, shuffle_block_samples=cast(int, None))
            await self._reserve(name, num_samples)
            answer = await self._store.extend(head, spec)
            current = await self._head(name, uid)
            await self._store.list_name(name, current.extended_spec.num_samples)
            if answer != "changed":
                break
        await self._settled_first(name, uid)

    async def join(
        self,
        name: ExperimentName,
        uid: str,
        *,
        run_id: str,
        rank: int,
        world_size: int,
        position: Position | None,
        current_if_not_retained: bool,
        straggler_timeout_ms: int | None,
        rejoining_as: Member | None,
        process_id: str,
    ) -> Joined:
        """Make the caller a rank of a run; a new run_id starts a new generation."""
        if not uid:
            raise InvalidValue("ref.uid", uid, "the uid that CreateExperiment or GetExperiment gave")
        check_name("run_id", run_id)
        if process_id:
            check_name("process_id", process_id)
        if straggler_timeout_ms is not None:
            check_int("straggler_timeout_ms", straggler_timeout_ms, 1, 2**40)
        if rejoining_as is not None:
            check_int("rejoining_as.generation", rejoining_as.generation, 1, 2**53)
            check_int("rejoining_as.claim", rejoining_as.claim, 1, 2**53)
        while True:
            head = await self._settled_first(name, uid)
            world_size = head.spec.check_world_size(world_size)
            check_int("rank", rank, 0, world_size - 1)
            if run_id != head.run_id and await self._store.had_run(head, run_id):
                current = await self._head(name, uid)
                if current.run_id == run_id:  # another rank has begun it just now
                    continue
                raise _superseded(current, Member(0, rank, 0))
            await self._check_has_scores(head)
            stored_claim = await self._store.claim(head, rank)
            target = await self._target(head, run_id, position)
            target_plan_id = await self._store.plan_of_epoch(head, target.epoch) or ""
            if target.step and target.epoch < head.epoch and target_plan_id:
                await self._check_has_groups_of(head, target, target_plan_id)
            is_retained = target.epoch in (head.epoch, *await self._store.retained_epochs(head))
            if not is_retained or target.epoch > head.epoch:
                if current_if_not_retained:
                    position, target = None, Position(head.epoch, 0)
                elif run_id != head.run_id:
                    raise await self._not_retained(head, f"position ({target.epoch}, {target.step})")
            # in the form that does not depend on where the head stands: an epoch's end is the next one's start
            is_end = target.epoch < head.spec.num_epochs and target.step == await self._num_steps(head, target.epoch)
            canonical = Position(target.epoch + 1, 0) if is_end else target
            answer = await self._store.join(
                head,
                run_id=run_id,
                rank=rank,
                world_size=world_size,
                straggler_timeout_ms=straggler_timeout_ms or 0,
                position=canonical,
                is_given=position is not None,
                target=target,
                rejoining_as=rejoining_as,
                process_id=process_id,
                stored_claim=stored_claim,
                target_plan_id=target_plan_id,
            )
            match answer:
                case ["changed"] | ["not_retained"]:
                    continue
                case ["gone"]:
                    raise _gone(name, uid)
                case ["superseded"]:
                    raise _superseded(head, Member(head.generation if run_id == head.run_id else 0, rank, 0))
                case ["straggler_timeout_ms", other]:
                    raise InvalidValue(
                        "straggler_timeout_ms",
                        straggler_timeout_ms,
                        f"{other if other != '0' else 'none'}: the run {run_id!r} was begun with that",
                    )
                case ["world_size", other]:
                    raise InvalidValue(
                        "world_size",
                        world_size,
                        f"{other}: the run {run_id!r} was begun with it. All ranks of a run have the same world size; "
                        "every start of a job needs a run_id of its own",
                    )
                case ["position", other]:
                    raise InvalidValue(
                        "position",
                        tuple(canonical),
                        f"({other.replace(' ', ', ')}): the run {run_id!r} was begun there. All ranks of a run begin "
                        "at the same position; every start of a job needs a run_id of its own",
                    )
                case ["joined", generation, claim]:
                    if run_id == head.run_id:
                        return Joined(int(generation), int(claim), Position(head.epoch, head.first_step), 0)
                    await self._planner.announce(uid)
                    return Joined(int(generation), int(claim), target, await self._unreported_rows(name, target))
                case _:
                    raise AssertionError(answer)

    async def _check_has_scores(self, head: Head) -> None:
        """Raises if an experiment that is to start from known scores has not got them yet."""
        if head.spec.warm_start and not head.generation and not await self._store.is_imported(head):
            raise FailedPreconditionError(
                f"experiment {head.name.name!r} is to start from known scores (warm_start), which are yet to be "
                "imported: create it again with initial_scores, or use ImportScores"
            )
        if head.spec.num_groups and not head.groups_id:
            raise FailedPreconditionError(
                f"experiment {head.name.name!r} has groups (num_groups={head.spec.num_groups}), but which sample is in "
                "which is yet to be said: create it again with groups, or use SetGroups"
            )

    async def _check_has_groups_of(self, head: Head, position: Position, plan_id: str) -> None:
        """Raises if an epoch can't be gone on with: planned again, it would have other rows than were reported of."""
        if (await self._store.plan_info(head, plan_id)).groups_id != head.groups_id:
            raise FailedPreconditionError(
                f"position ({position.epoch}, {position.step}): the groups were changed since epoch {position.epoch} "
                f"was planned. Go on at its start, ({position.epoch}, 0)"
            )

    async def _unreported_rows(self, name: ExperimentName, position: Position) -> int:
        """Rows of the current epoch before a position for which there is no loss."""
        head = await self._store.head(name) if position.step else None
        if head is None or head.epoch != position.epoch:
            return 0
        before = dataclasses.replace(head, num_steps=position.step)  # after going back it is not planned again yet
        report = await self._store.read_report(before, await self._store.plan_info(head, head.plan_id))
        return int(np.count_nonzero(np.isnan(report.losses)))

    async def _num_steps(self, head: Head, epoch: int) -> int:
        """Steps of an epoch as it was planned; of one that is not kept the most that it may have had."""
        if epoch == head.epoch:
            return head.num_steps
        is_known = not head.spec.policy.is_adaptive and head.next_spec is None
        plan_id = None if is_known else await self._store.plan_of_epoch(head, epoch)
        if plan_id is not None:
            return (await self._store.plan_info(head, plan_id)).num_steps
        return head.spec.shape(epoch).num_steps if epoch < head.spec.num_epochs else 0

    async def _target(self, head: Head, run_id: str, position: Position | None) -> Position:
        """Where a run that joins at `position` begins, with the epoch's end brought into one form."""
        num_epochs = head.spec.num_epochs
        if position is None:
            if head.state == "finished" and run_id != head.run_id:
                raise FailedPreconditionError(
                    f"experiment {head.name.name!r} has finished all of its {num_epochs} epochs. "
                    "Create one under another name, delete this one first, or go back to a position"
                )
            return Position(head.epoch, 0)
        epoch = check_int("position.epoch", position.epoch, 0, num_epochs)
        last = await self._num_steps(head, epoch)
        step = check_int("position.step", position.step, 0, last)
        if epoch == head.epoch + 1 and step == 0:  # a run that ended just before the turn: the turn is still due
            return Position(head.epoch, head.num_steps)
        if epoch < head.epoch and step == last:
            return Position(epoch + 1, 0)
        return Position(epoch, step)

    async def stream(
        self, name: ExperimentName, uid: str, member: Member, *, epoch: int, first_step: int, max_steps: int
    ) -> AsyncIterator[EpochWait | EpochStart | EpochRows]:
        """A rank's part of an epoch, waiting for it if it is yet to be planned."""
        if self._num_streams.total() >= self._limits.max_streams:
            raise ResourceExhaustedError(
                f"this server already serves {self._limits.max_streams:,} streams, as many as it takes: add servers, "
                "or raise it with --max-streams"
            )
        if self._num_streams[name.project] >= self._limits.max_project_streams:
            raise ResourceExhaustedError(
                f"this server already serves {self._limits.max_project_streams:,} streams of project "
                f"{name.project!r}, as many as it takes of one: add servers, or raise it with --max-project-streams"
            )
        with _counted(self._num_streams, name.project):
            async for event in self._stream(name, uid, member, epoch, first_step, max_steps):
                yield event

    async def _stream(
        self, name: ExperimentName, uid: str, member: Member, epoch: int, first_step: int, max_steps: int
    ) -> AsyncIterator[EpochWait | EpochStart | EpochRows]:
        last_message_s = time.monotonic()
        while True:
            changed = self._planner.change_of(uid)
            head = await self._head_of_member(name, uid, member)
            if epoch < head.epoch:
                raise EpochClosedError(f"epoch {epoch} is over: the experiment stands at epoch {head.epoch}")
            if epoch > head.epoch + 1 or epoch > head.spec.num_epochs:
                raise StoreBehindError(
                    f"epoch {epoch} is not the next one: the experiment stands at epoch {head.epoch} of "
                    f"{head.spec.num_epochs}. If the run had got there, the store has lost that: join again"
                )
            if head.state in ("sealed", "unplanned"):
                if await self._planner.turn(head):
                    continue
            elif epoch == head.epoch:
                break
            elif head.straggler_timeout_ms:
                await self._seal(head, at_once=False)
            if time.monotonic() - last_message_s >= _WAIT_MESSAGE_INTERVAL_S:
                ranks = await self._store.unfinished_ranks(head) if head.state == "open" else []
                yield EpochWait(ranks[:_MAX_NAMED_RANKS])
                last_message_s = time.monotonic()
            await self._planner.wait(head, changed)
        if head.state == "finished":
            await self._store.replicated(name)  # this rank may end now, and could send nothing again
            return
        shape = head.shape
        check_int("first_step", first_step, 0, shape.num_steps)
        num_hidden = shape.num_hidden_steps * shape.step_rows
        factor = head.spec.policy.learning_rate_factor(shape.num_rows, num_hidden)
        yield EpochStart(head.plan_id, shape, head.table_checksum, head.new_rows, head.skipped_ranks, factor)
        stop = min(first_step + max_steps, shape.num_steps) if max_steps else shape.num_steps
        async for rows in self._rows(head, shape, member.rank, first_step, stop):
            yield rows

    async def _rows(
        self, head: Head, shape: EpochShape, rank: int, first_step: int, stop: int
    ) -> AsyncIterator[EpochRows]:
        id_bytes = sample_id_dtype(head.spec.num_samples).itemsize
        row_bytes = id_bytes + (8 if head.spec.has_set_weights else 4)
        chunk = max(_TARGET_MESSAGE_BYTES // (row_bytes * shape.step_rows // head.world_size), 1)
        for step in range(first_step, stop, chunk):
            table = await self._store.read_part(head, rank, step, min(chunk, stop - step))
            num_rows = table.sample_ids.size
            self._metrics.streamed(num_rows, num_rows * row_bytes)
            yield EpochRows(step, table)

    async def report(
        self,
        name: ExperimentName,
        uid: str,
        member: Member,
        *,
        plan_id: str,
        steps: ReportedSteps,
    ) -> int:
        """Record what a rank reports of consecutive steps; returns how many losses were not finite."""
        head = await self._head_of_member(name, uid, member)
        return await self._take(head, member, plan_id, steps)

    async def _take(self, head: Head, member: Member, plan_id: str, steps: ReportedSteps) -> int:
        self._check_open(head, plan_id)
        shape = head.shape
        first_step, num_steps, losses, columns, chosen = steps
        check_int("first_step", first_step, 0, shape.num_steps - 1)
        check_int("num_steps", num_steps, 1, shape.num_steps - first_step)
        num_bytes = len(losses) + len(chosen) + sum(map(len, columns.values()))
        if num_bytes > self._limits.max_message_bytes:
            raise ResourceExhaustedError(
                f"losses: {num_bytes:,} bytes; this server takes at most {self._limits.max_message_bytes:,} in a "
                "message: report fewer steps at once, or raise it with --max-message-bytes"
            )
        report, num_non_finite = self._report(head, num_steps, losses, columns)
        part_rows = shape.step_rows // head.world_size
        if chosen:
            bits = check_column("chosen", chosen, num_steps * -(-part_rows // 8), np.uint8).reshape(num_steps, -1)
            report.chosen[:] = np.unpackbits(bits, axis=1, count=part_rows, bitorder="little").ravel()
        await self._record(head, member, plan_id, first_step, num_steps, report, num_non_finite)
        return num_non_finite

    @staticmethod
    def _report(head: Head, num_steps: int, losses: bytes, columns: Mapping[str, bytes]) -> tuple[Report, int]:
        """What came of consecutive steps of a part, as it is recorded, and how many losses are not finite."""
        num_rows = num_steps * (head.shape.step_rows // head.world_size)
        names = head.spec.policy.reported_columns
        if set(columns) != set(names):
            expected = f"just the columns that {type(head.spec.policy).__name__} needs: {', '.join(names) or 'none'}"
            raise InvalidValue("columns", sorted(columns), expected)
        values = {name: check_column(f"columns.{name}", columns[name], num_rows) for name in names}
        recorded, num_non_finite = recorded_losses(check_column("losses", losses, num_rows))
        head.spec.policy.check_reported(values)
        return Report(recorded, np.zeros(num_rows, np.bool_), values), num_non_finite

    async def _record(
        self,
        head: Head,
        member: Member,
        plan_id: str,
        first_step: int,
        num_steps: int,
        report: Report,
        num_non_finite: int,
    ) -> None:
        answer = await self._store.write_report(
            head, member, plan_id=plan_id, first_step=first_step, num_steps=num_steps, report=report
        )
        self._check_answer(answer, head, member, plan_id)
        self._metrics.reported(
            head.name,
            num_rows=len(report.losses),
            num_bytes=report.losses.nbytes * (1 + len(report.columns)),
            num_non_finite=num_non_finite,
            progress=(head.epoch + (first_step + num_steps) / head.num_steps) / head.spec.num_epochs,
        )

    async def select(
        self,
        name: ExperimentName,
        uid: str,
        member: Member,
        *,
        plan_id: str,
        step: int,
        losses: bytes,
        columns: Mapping[str, bytes],
    ) -> tuple[MiniBatch, int]:
        """Draw the mini-batch of a rank's step, and record what comes of it; returns also how many were not finite."""
        head = await self._head_of_member(name, uid, member)
        self._check_open(head, plan_id)
        shape = head.shape
        check_int("step", step, 0, shape.num_steps - 1)
        report, num_non_finite = self._report(head, 1, losses, columns)
        rows = await self._store.read_part(head, member.rank, step, 1)
        mini_batch = select_mini_batch(
            head.spec,
            shape,
            epoch=head.epoch,
            step=step,
            rank=member.rank,
            world_size=head.world_size,
            prior_scores=rows.prior_scores[0],
            losses=report.losses,
            set_importance_weights=None if rows.importance_weights is None else rows.importance_weights[0],
        )
        report.chosen[mini_batch.positions] = True
        await self._record(head, member, plan_id, step, 1, report, num_non_finite)
        return mini_batch, num_non_finite

    async def finish(
        self,
        name: ExperimentName,
        uid: str,
        member: Member,
        *,
        epoch: int,
        plan_id: str,
        reported_rows: int | None,
        expected_checksum: int | None,
        last_steps: ReportedSteps | None,
    ) -> Finish:
        """Mark a rank's part as reported; the last rank's call seals the epoch and starts the turn.

        Args:
            last_steps: recorded before.
        """
        head = await self._head_of_member(name, uid, member)
        if head.epoch < epoch:
            raise EpochClosedError(f"epoch {epoch} is not open: the experiment stands at epoch {head.epoch}")
        if last_steps is not None and not await self._has_finished(head, member, epoch):
            try:
                await self._take(head, member, plan_id, last_steps)
            except EpochClosedError:  # unless an earlier attempt, whose answer is under way, has just finished
                head = await self._head_of_member(name, uid, member)
                if not await self._has_finished(head, member, epoch):
                    raise
        if head.epoch == epoch and (reported_rows is not None or expected_checksum is not None):
            self._check_open(head, plan_id, "sealed")
            missing_steps = await self._missing_steps(head, member, reported_rows, expected_checksum)
            if missing_steps:
                return Finish(missing_steps, [])
        answer = await self._store.finish(head, member, plan_id=plan_id, epoch=epoch)
        self._check_answer(answer, head, member, plan_id)
        if answer == "sealed":
            self._planner.start_turn(dataclasses.replace(head, state="sealed"))
            return Finish([], [])
        waiting_for = await self._store.unfinished_ranks(head)
        if head.epoch > epoch or member.rank in waiting_for:  # the next epoch has begun meanwhile
            return Finish([], [])
        return Finish([], waiting_for[:_MAX_NAMED_RANKS])

    async def _has_finished(self, head: Head, member: Member, epoch: int) -> bool:
        """Whether an epoch that takes no losses any more has ended with this rank's: then an answer got lost."""
        if head.epoch == epoch:
            return head.state == "sealed" and member.rank not in await self._store.unfinished_ranks(head)
        return not await self._store.was_skipped(head, epoch, member.rank)

    async def _missing_steps(
        self, head: Head, member: Member, reported_rows: int | None, expected_checksum: int | None
    ) -> list[tuple[int, int]]:
        """What differs from what the rank says it reported: the steps without losses or, if none, all steps."""
        shape = head.shape
        losses = await self._store.read_part_losses(head, member, first_step=0, num_steps=shape.num_steps)
        reported = ~np.isnan(losses)
        matches_rows = reported_rows is None or np.count_nonzero(reported) == reported_rows
        if matches_rows and expected_checksum in (None, await in_thread(losses.size, checksum, losses.ravel())):
            return []
        first = head.first_step
        missing = ~reported[first:].all(axis=1)
        if not missing.any():
            first %= shape.num_steps  # a run that began at the epoch's end has no step of its own to send again
            return [(first, shape.num_steps - first)]
        edges = np.flatnonzero(np.diff(missing, prepend=False, append=False)) + first
        return [(int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2)]

    async def export(
        self, name: ExperimentName, uid: str, epoch: int | None
    ) -> AsyncIterator[tuple[int, int, Scores, NDArray[np.uint16] | None]]:
        """The scores at an epoch's start, as (epoch, first sample, scores of the samples from there, their groups)."""
        if self._num_exports[name.project] >= _MAX_PROJECT_EXPORTS:
            raise ResourceExhaustedError(
                f"this server already exports scores of project {name.project!r} {_MAX_PROJECT_EXPORTS} times at "
                "once, as often as it does: try again when one has ended"
            )
        with _counted(self._num_exports, name.project):
            await self._planner.settled(name)
            head = await self._head(name, uid)
            wanted = head.epoch if epoch is None else epoch
            plan_id = await self._store.plan_of_epoch(head, wanted)
            if plan_id is None:
                raise await self._not_retained(head, f"epoch {wanted}")
            head = dataclasses.replace(head, spec=await self._store.spec_of_plan(head, plan_id))
            chunk = max(_EXPORT_BYTES // (16 + 4 * len(head.spec.policy.columns)), 1)
            for first in range(0, head.spec.num_samples, chunk):
                count = min(chunk, head.spec.num_samples - first)
                scores = await self._store.read_score_rows(head, plan_id, first, count)
                yield wanted, first, scores, await self._store.read_group_rows(head, first, count)

    async def watch(
        self, name: ExperimentName, uid: str, *, interval_ms: int, first_epoch: int, once: bool
    ) -> AsyncIterator[Watched]:
        """Live figures, again and again until the experiment has finished, for ten minutes at most."""
        check_int("interval_ms", interval_ms, 100, 60_000)
        check_int("first_epoch", first_epoch, 0, 2**32)
        if not once and self._num_watches[name.project] >= _MAX_PROJECT_WATCHES:
            raise ResourceExhaustedError(
                f"this server already has {_MAX_PROJECT_WATCHES} watching experiments of project {name.project!r}, as "
                "many as it takes: look once, or try again when one has left"
            )
        deadline_s = time.monotonic() + _WATCH_S
        with contextlib.nullcontext() if once else _counted(self._num_watches, name.project):
            while True:
                head = await self._head(name, uid)
                uid = head.uid
                status, ranks = await self._store.status(head), await self._store.progress(head)
                epochs = await self._store.past_epochs(head, min(first_epoch, head.epoch))
                yield Watched(status, ranks, epochs)
                first_epoch = head.epoch
                if once or head.state == "finished" or time.monotonic() > deadline_s:
                    return
                # A project's watches share so many looks a second, however many they are.
                shared_s = self._num_watches[name.project] / _MAX_PROJECT_LOOKS_PER_S
                await asyncio.sleep(max(interval_ms / 1000, shared_s))

    # What a request must match

    async def _head(self, name: ExperimentName, uid: str) -> Head:
        return _found(await self._store.head(name), name, uid)

    async def _head_of_member(self, name: ExperimentName, uid: str, member: Member) -> Head:
        if not uid:
            raise InvalidValue("ref.uid", uid, "the uid that CreateExperiment or GetExperiment gave")
        current, refusal = await self._store.head_of_member(name, uid, member)
        head = _found(current, name, uid)
        if refusal:
            self._check_answer(refusal, head, member, "")
        self._metrics.heard(name, uid, rank=member.rank, epoch=head.epoch, num_epochs=head.spec.num_epochs)
        return head

    @staticmethod
    def _check_open(head: Head, plan_id: str, *also: str) -> None:
        if plan_id != head.plan_id or head.state not in ("open", *also):
            raise EpochClosedError(f"plan {plan_id!r} is not open: the experiment stands at epoch {head.epoch}")

    def _check_answer(self, answer: str, head: Head, member: Member, plan_id: str) -> None:
        """Turn a script's refusal into its error: what was checked before may have changed since."""
        match answer:
            case "gone":
                raise _gone(head.name, head.uid)
            case "superseded":
                raise _superseded(head, member)
            case "behind":
                raise StoreBehindError(
                    f"nothing is known of this process having joined run {member.generation} as rank {member.rank}: if "
                    "it has, the store has lost that. Join again"
                )
            case "closed":
                raise EpochClosedError(f"plan {plan_id!r} has just been closed")


@contextlib.contextmanager
def _counted(counts: Counter[str], project: str) -> Iterator[None]:
    """Count one of a project's calls while it lasts. Nothing is kept of a project that has none."""
    counts[project] += 1
    try:
        yield
    finally:
        counts[project] -= 1
        if not counts[project]:
            del counts[project]


def _found(head: Head | None, name: ExperimentName, uid: str) -> Head:
    """The head, if there is one and, where a uid is given, of that experiment; else NotFoundError."""
    if head is None or (uid and uid != head.uid):
        raise _gone(name, uid if head is not None else "")
    return head


def _gone(name: ExperimentName, uid: str) -> NotFoundError:
    if uid:
        return NotFoundError(
            f"ref.uid={uid!r}: the experiment {name.name!r} of this uid was deleted; get the one of that name anew",
            field="ref.uid",
        )
    return NotFoundError(
        f"ref.name={name.name!r}: project {name.project!r} has no such experiment; create it, or list those there are",
        field="ref.name",
    )


def _started(head: Head) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"a run has joined experiment {head.name.name!r}: scores are imported before the first run. Import them into a "
        "new experiment"
    )


def _superseded(head: Head, member: Member) -> SupersededError:
    if member.generation != head.generation:
        return SupersededError(
            f"run {member.generation} of experiment {head.name.name!r} was superseded by run {head.generation} "
            f"({head.run_id!r}): another job has joined the experiment"
        )
    return SupersededError(
        f"another process has joined run {head.run_id!r} of experiment {head.name.name!r} as rank {member.rank}"
    )


def _check_in_order(field: str, first_sample: int, num_rows: int, done: int, num_samples: int) -> None:
    """Raises InvalidValue unless a message's columns are of the samples that follow, and of no more than there are."""
    if first_sample != done:
        raise InvalidValue("first_sample", first_sample, f"{done:,}: samples come in order, from 0 on")
    if num_rows > num_samples - done:
        raise InvalidValue(field, f"{num_rows:,} samples", f"at most the {num_samples - done:,} that are left")


def _is_stage(spec: ExperimentSpec, head: Head) -> bool:
    """Whether an experiment has this spec, or had it or will have it as its dataset grows."""
    first, last = head.birth_spec, head.extended_spec
    if spec in (first, last):
        return True
    if not first.num_samples <= spec.num_samples <= last.num_samples:
        return False
    same = {"num_samples": last.num_samples, "shard_sizes": last.shard_sizes}
    same["shuffle_block_samples"] = last.shuffle_block_samples
    is_prefix = spec.shard_sizes == last.shard_sizes[: len(spec.shard_sizes)]
    return is_prefix and dataclasses.replace(spec, **cast(Any, same)) == last
