"""Experiments in Redis: the head, which only scripts change, and the columns, which are written once."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import hashlib
import importlib.resources
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import numpy as np
import structlog
from numpy.typing import DTypeLike, NDArray
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisClusterException, RedisError, ResponseError

from evosample.errors import DataLossError, EpochClosedError, FailedPreconditionError
from evosample.sampling import (
    DoReMi,
    EpochShape,
    EpochSummary,
    ExperimentSpec,
    Groups,
    Report,
    Scores,
    Table,
    loss_bits,
    losses_of_bits,
    part,
    sample_id_dtype,
)
from evosample.v1 import selection_pb2 as pb
from evosample.wire import (
    ExperimentName,
    ExperimentState,
    ExperimentStatus,
    PastEpoch,
    Position,
    RankProgress,
    past_epoch_from_proto,
    past_epoch_to_proto,
    spec_from_proto,
    spec_to_proto,
)
from evosample_server import keys
from evosample_server.keys import BLOCK_ROWS, ExperimentKeys
from evosample_server.metrics import Metrics
from evosample_server.tasks import in_thread

_log = structlog.get_logger()

_SCRIPTS = (
    "reserve",
    "unlist",
    "create",
    "register",
    "keep",
    "join",
    "membership",
    "report",
    "finish",
    "seal",
    "pin",
    "commit",
    "retire",
    "set_groups",
    "extend",
    "unlink_table",
    "delete",
    "forget",
    "progress",
)
_SCRIPTS_OF_MEMBERS = ("report", "finish")  # they begin with member.lua
_MAX_PINS = 16
_MAX_STRETCH_BLOCKS = 16
_MAX_SCORES_SHARE = 0.25  # of the cache, those of one experiment
_RESERVED_S = 60
_PROBE_TTL_MS = 60_000
_BLOCKS_AT_ONCE = 8
_STAGED_TTL_MS = 120_000
_SMALL_BYTES = 2**18
_MAX_SKIPPED_RANKS = 100  # that commit.lua notes
_LISTEN_TIMEOUT_S = 10.0
_REPLICATION_TIMEOUT_S = 1.0
_TABLE_COLUMNS = ("sample_id", "prior_score", "importance_weight")
_SCORE_COLUMNS: dict[str, DTypeLike] = {
    "score": np.float32,
    "sampling_weight": np.float32,
    "num_visits": np.uint16,
    "staleness": np.uint8,
    "num_chosen": np.uint16,
    "chosen_staleness": np.uint8,
}  # in the order of Scores; a policy's own follow as policy:<name>
_GROUP_COLUMNS = ("group", "reference_loss")  # in the order of Groups
_KEPT_SUMMARIES = 1_000
_KEPT_GROUP_SUMMARIES = 50_000  # of all kept epochs together: a message holds them


@dataclass(frozen=True)
class Head:
    """An experiment's head as it was read. Scripts compare it with what stands when they run."""

    name: ExperimentName
    uid: str
    spec: ExperimentSpec
    state: ExperimentState
    epoch: int
    plan_id: str
    generation: int
    run_id: str
    world_size: int
    first_step: int
    straggler_timeout_ms: int
    table_checksum: int
    num_steps: int
    num_hidden_steps: int
    new_rows: int | None
    skipped_ranks: tuple[int, ...]
    groups_id: str
    groups_size: int
    groups_digest: str
    groups_spec: ExperimentSpec | None
    birth_spec: ExperimentSpec
    next_spec: ExperimentSpec | None
    create_time: datetime.datetime

    @cached_property
    def shape(self) -> EpochShape:
        """Sizes of the current epoch, as it was planned."""
        return dataclasses.replace(
            self.spec.shape(self.epoch), num_steps=self.num_steps, num_hidden_steps=self.num_hidden_steps
        )

    @property
    def extended_spec(self) -> ExperimentSpec:
        """The spec with all samples that were added, be they planned with or not yet."""
        return self.spec if self.next_spec is None else self.next_spec

    @cached_property
    def keys(self) -> ExperimentKeys:
        return ExperimentKeys(self.name, self.uid)

    def identity(self) -> list[str | int]:
        """What join and commit expect to find unchanged."""
        return [self.uid, self.epoch, self.state, self.plan_id, self.generation]


class Member(NamedTuple):
    """A process's membership of a run, as it claims it."""

    generation: int
    rank: int
    claim: int


class RowCounts(NamedTuple):
    """Rows of an experiment's epochs so far, by what became of them."""

    visited_rows: int = 0
    non_finite_rows: int = 0
    unreported_rows: int = 0
    trained_rows: int = 0


class PlanGeneration(NamedTuple):
    """A run's share in an epoch: from which step on it reported."""

    generation: int
    world_size: int
    first_step: int


class PlanInfo(NamedTuple):
    """What is known of a plan beside its columns."""

    row_counts: RowCounts
    generations: tuple[PlanGeneration, ...]
    num_steps: int
    mixture: NDArray[np.float64] | None
    groups_id: str


class _Steps(NamedTuple):
    """Consecutive steps of the part of a generation's rank."""

    plan_id: str
    generation: int
    rank: int
    first_step: int
    num_steps: int


class _Block(NamedTuple):
    """A stretch of rows within one block."""

    number: int
    start: int
    num_rows: int


def _blocks(first: int, count: int, size: int = BLOCK_ROWS) -> list[_Block]:
    """The stretches that the rows [first, first + count) fall into."""
    stop = first + count
    return [
        _Block(index, max(first - index * size, 0), min(stop, (index + 1) * size) - max(first, index * size))
        for index in range(first // size, -(-stop // size))
    ]


async def replicated(redis: Redis | RedisCluster, key: str) -> None:
    """Return once a replica has all that was written to the node of a key, if there is one; for a second at most.

    Args:
        redis: the client that has written it.
        key: what is written to find out, and gone in a moment.
    """
    timeout_ms = int(1000 * _REPLICATION_TIMEOUT_S)
    try:
        async with asyncio.timeout(2 * _REPLICATION_TIMEOUT_S):
            target: dict[str, Any] = {}
            if isinstance(redis, RedisCluster):
                target = {"target_nodes": redis.get_node_from_key(key)}
            if not (await cast(Any, redis).info("replication", **target)).get("connected_slaves"):
                return
            pipeline: Any = redis.pipeline(transaction=False)  # WAIT waits for what its own connection has written
            pipeline.set(key, 1, px=timeout_ms)
            pipeline.execute_command("WAIT", 1, timeout_ms, **target)
            cause = "" if (await pipeline.execute())[1] else "none has confirmed it"
    except ResponseError as error:  # managed services hide some commands
        _log.debug("cannot wait for replicas", cause=str(error))
        return
    except (RedisError, RedisClusterException, TimeoutError) as error:
        cause = str(error) or "no answer"
    if cause:
        _log.warning("a commit may not be on a replica yet", key=key, cause=cause)


def _bytes_of(spec: ExperimentSpec) -> bytes:
    return spec_to_proto(spec).SerializeToString(deterministic=True)


@lru_cache(maxsize=256)
def _spec(data: bytes) -> ExperimentSpec:
    return spec_from_proto(pb.ExperimentSpec.FromString(data))


def _head(name: ExperimentName, fields: Mapping[bytes, bytes]) -> Head | None:
    if not fields.get(b"uid"):
        return None
    return Head(
        name=name,
        uid=fields[b"uid"].decode(),
        spec=_spec(fields[b"spec"]),
        state=cast(ExperimentState, fields[b"state"].decode()),
        epoch=int(fields[b"epoch"]),
        plan_id=fields[b"plan_id"].decode(),
        generation=int(fields[b"generation"]),
        run_id=fields[b"run_id"].decode(),
        world_size=int(fields[b"world_size"]),
        first_step=int(fields[b"first_step"]),
        straggler_timeout_ms=int(fields[b"straggler_timeout_ms"]),
        table_checksum=int(fields[b"table_checksum"]),
        num_steps=int(fields[b"num_steps"]),
        num_hidden_steps=int(fields[b"num_hidden_steps"]),
        new_rows=int(fields[b"new_rows"]) if fields.get(b"new_rows") else None,
        skipped_ranks=tuple(map(int, fields.get(b"skipped_ranks", b"").split())),
        groups_id=fields.get(b"groups_id", b"").decode(),
        groups_size=int(fields.get(b"groups_size", 0)),
        groups_digest=fields.get(b"groups_digest", b"").decode(),
        groups_spec=_spec(fields[b"groups_spec"]) if b"groups_spec" in fields else None,
        birth_spec=_spec(fields.get(b"birth_spec", fields[b"spec"])),
        next_spec=_spec(fields[b"next_spec"]) if b"next_spec" in fields else None,
        create_time=datetime.datetime.fromtimestamp(int(fields[b"create_time"]), datetime.UTC),
    )


class Store:
    """The verbs that experiments need of Redis.

    Args:
        redis: a client of one server or of a cluster, that does not decode responses.
        retain_epochs: epochs whose scores and losses are kept, the current one counted.
        cache_bytes: bound of the memory that holds blocks of columns.
        metrics: where commands are timed, and blocks found in memory counted.
    """

    def __init__(self, redis: Redis | RedisCluster, *, retain_epochs: int, cache_bytes: int, metrics: Metrics) -> None:
        self._redis = redis
        self._retain_epochs = retain_epochs
        self._cache = _BlockCache(cache_bytes)
        # A thread of its own: where streams shared those of turns they would wait for these.
        self._laying_out = ThreadPoolExecutor(1)
        self._metrics = metrics
        metrics.cache_bytes.set_function(lambda: self._cache.num_bytes)
        folder = importlib.resources.files(__package__) / "scripts"
        texts = {name: (folder / f"{name}.lua").read_text() for name in _SCRIPTS}
        member = (folder / "member.lua").read_text()
        texts |= {name: member + texts[name] for name in _SCRIPTS_OF_MEMBERS}
        self._scripts = {name: (hashlib.sha1(text.encode()).hexdigest(), text) for name, text in texts.items()}  # noqa: S324  # what Redis calls a script by
        # What all commands go through, but for pipelines and subscriptions.
        cast(Any, redis).execute_command = self._timed(redis.execute_command)

    def _timed(self, execute: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        script_names = {digest: name for name, (digest, _) in self._scripts.items()}

        async def execute_command(command: str, *args: Any, **options: Any) -> Any:
            label = script_names[args[0]] if command == "EVALSHA" else command.lower()
            with self._metrics.store_seconds.labels(label).time():
                return await execute(command, *args, **options)

        return execute_command

    async def check(self) -> None:
        """Raises if Redis does not answer, or would throw data away when its memory is full."""
        await cast(Any, self._redis.ping())
        await self._check_is_no_lone_node()
        for target in self._primaries():
            try:
                config = await cast(Any, self._redis).config_get("maxmemory-policy", **target)
            except ResponseError:  # managed services hide CONFIG
                _log.warning("cannot read Redis's maxmemory-policy: make sure that it is noeviction")
                return
            policy = next(iter(config.values()), "noeviction")  # managed services may answer with nothing
            if policy in ("noeviction", b"noeviction"):
                continue
            policy = policy.decode() if isinstance(policy, bytes) else policy
            raise FailedPreconditionError(
                f"Redis has maxmemory-policy {policy}, which deletes scores when memory runs out: "
                "set it to noeviction (redis-cli config set maxmemory-policy noeviction)"
            )

    async def _check_is_no_lone_node(self) -> None:
        """A node of a cluster that is taken for a single server refuses most keys."""
        if isinstance(self._redis, RedisCluster):
            return
        try:
            hello = await cast(Any, self._redis).execute_command("HELLO")
        except ResponseError:  # Redis 5
            return
        if b"cluster" in (hello.values() if isinstance(hello, dict) else hello):
            raise FailedPreconditionError(
                "this Redis is a node of a cluster: name it with redis+cluster://HOST:PORT (or rediss+cluster://)"
            )

    async def close(self) -> None:
        await self._redis.aclose()

    async def probe(self) -> None:
        """Raises RedisError if the store does not take writes now."""
        await self._redis.set(keys.PROBE, 1, px=_PROBE_TTL_MS)

    async def used_memory_bytes(self) -> int:
        """Memory that the store uses, over all primaries of a cluster."""
        found = [await cast(Any, self._redis).info("memory", **target) for target in self._primaries()]
        return sum(int(memory["used_memory"]) for memory in found)

    def _primaries(self) -> list[dict[str, Any]]:
        """For each node that takes writes what names it in a command."""
        if isinstance(self._redis, RedisCluster):
            return [{"target_nodes": node} for node in self._redis.get_primaries()]
        return [{}]

    async def announce(self, uid: str) -> None:
        """Tell all servers that an experiment's head has changed. They would find out by themselves, only later."""
        with suppress(RedisError):
            await cast(Any, self._redis.publish(keys.CHANGES, uid))

    async def changes(self) -> AsyncIterator[str]:
        """uids of experiments whose head has changed, as servers announce them; raises RedisError when cut off."""
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(keys.CHANGES)
            is_answer_due = False
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=_LISTEN_TIMEOUT_S)
                if message is not None and message["type"] == "message":
                    yield message["data"].decode()
                elif message is None and is_answer_due:
                    raise RedisConnectionError("the store has fallen silent")
                is_answer_due = message is None
                if is_answer_due:
                    await pubsub.ping()

    async def _run(self, script: str, script_keys: list[str], args: Iterable[Any]) -> Any:
        digest, text = self._scripts[script]
        arguments = [len(script_keys), *script_keys, *args]
        try:
            return await cast(Any, self._redis.evalsha(digest, *arguments))
        except NoScriptError:
            return await cast(Any, self._redis.eval(text, *arguments))

    # The head

    async def head(self, name: ExperimentName) -> Head | None:
        """The head as it stands; None if there is none, or only a tombstone."""
        return _head(name, await cast(Any, self._redis.hgetall(keys.head(name))))

    async def head_of_member(self, name: ExperimentName, uid: str, member: Member) -> tuple[Head | None, str]:
        """The head as it stands, and why a member is not the latest process of its rank in the latest run.

        That is empty if it is; else "superseded" or "behind", as in member.lua.
        """
        experiment = ExperimentKeys(name, uid)
        fields, stored = await self._run("membership", [experiment.head, experiment.claims], [member.rank])
        head = _head(name, dict(zip(fields[::2], fields[1::2], strict=True)))
        if head is None:
            return None, ""
        claim = None if stored is None else int(stored)
        if (member.generation, member.claim) == (head.generation, claim):
            return head, ""
        is_newer = head.generation == member.generation and claim is not None and claim > member.claim
        return head, "superseded" if head.generation > member.generation or is_newer else "behind"

    async def status(self, head: Head) -> ExperimentStatus:
        """Everything that is shown of an experiment."""
        finished = await self._finished(head)
        pins = await cast(Any, self._redis.hgetall(head.keys.pins))
        counts = (await self.plan_info(head, head.plan_id)).row_counts
        return ExperimentStatus(
            project=head.name.project,
            name=head.name.name,
            uid=head.uid,
            spec=head.spec,
            state=head.state,
            epoch=head.epoch,
            generation=head.generation,
            world_size=head.world_size,
            finished_ranks=tuple(finished.nonzero()[0].tolist()),
            create_time=head.create_time,
            retained_epochs=tuple(await self.retained_epochs(head)),
            pins={pin.decode(): int(epoch) for pin, epoch in sorted(pins.items())},
            num_steps=head.num_steps if head.state in ("open", "sealed") else 0,
            extended_num_samples=0 if head.next_spec is None else head.next_spec.num_samples,
            **counts._asdict(),
        )

    async def create(self, name: ExperimentName, spec: ExperimentSpec) -> None:
        """Make a head without a planned epoch, unless there is one."""
        await self._finish_deletion(name)
        uid = secrets.token_hex(8)
        fields: dict[str, Any] = {
            "uid": uid,
            "birth_uid": uid,
            "spec": _bytes_of(spec),
            "state": "unplanned",
            "epoch": 0,
            "plan_id": "",
            "generation": 0,
            "run_id": "",
            "world_size": 0,
            "first_step": 0,
            "straggler_timeout_ms": 0,
            "finish_began_ms": 0,
            "table_checksum": 0,
            "num_steps": 0,
            "num_hidden_steps": 0,
            "create_time": int(time.time()),
        }
        await self._run("create", [keys.head(name)], (item for pair in fields.items() for item in pair))
        await self.replicated(name)

    async def reserve(
        self, name: ExperimentName, num_samples: int, *, max_experiments: int, max_project_samples: int
    ) -> tuple[str, int]:
        """Put a name without a head into its project's index if there is room: "reserved". Else what there is no room
        for, "experiments" or "samples", and how many of it the project has.

        Its head is to be made within a minute, and `list_name` called then.
        """
        args = [name.name, num_samples, max_experiments, max_project_samples, int(time.time())]
        answer, count = await self._run("reserve", [keys.samples(name.project), keys.names(name.project)], args)
        return answer.decode(), int(count)

    async def list_name(self, name: ExperimentName, num_samples: int) -> None:
        """Put a name into its project's index. One without a head is mended by whoever lists it."""
        await cast(Any, self._redis.hset(keys.samples(name.project), name.name, str(num_samples)))
        await cast(Any, self._redis.zadd(keys.names(name.project), {name.name: 0}))

    async def replicated(self, name: ExperimentName) -> None:
        """Return once a replica has what was written so far, if there is one: then a fail-over does not lose it.

        For a second at most: what is lost all the same is sent again by living clients.
        """
        await replicated(self._redis, keys.replicated(name))

    async def list_names(self, project: str, after: str, limit: int) -> list[str]:
        """Up to `limit` names of a project's experiments, in order, that come after `after`."""
        start = f"({after}" if after else "-"
        found = await cast(Any, self._redis.zrangebylex(keys.names(project), start, "+", start=0, num=limit))
        return [name.decode() for name in found]

    async def forget_name(self, name: ExperimentName) -> None:
        """Take a name without a head out of the index, unless it was reserved just now."""
        index = [keys.samples(name.project), keys.names(name.project)]
        await self._run("unlist", index, [name.name, int(time.time()) - _RESERVED_S])
        head = await self.head(name)
        if head is not None:  # created again in between
            await self.list_name(name, head.extended_spec.num_samples)

    async def delete(self, head: Head) -> bool:
        """Delete an experiment; False if it is gone already."""
        if not await self._run("delete", [head.keys.head], [head.uid]):
            return False
        await self._finish_deletion(head.name)
        await self.forget_name(head.name)
        return True

    async def _finish_deletion(self, name: ExperimentName) -> None:
        """Remove what a tombstone stands for. Repeating it does no harm, so it survives any crash."""
        fields = ("uid", "birth_uid", "spec", "next_spec")
        uid, birth_uid, spec, next_spec = await cast(Any, self._redis.hmget(keys.head(name), *fields))
        if uid is not None or birth_uid is None:
            return
        gone = ExperimentKeys(name, birth_uid.decode())
        for registry in (gone.plans, gone.doomed):
            for plan_id in await cast(Any, self._redis.hkeys(registry)):
                await self._unlink_plan(gone, _spec(next_spec or spec), plan_id.decode())
        rest = [gone.claims, gone.finished, gone.plans, gone.doomed, gone.epochs, gone.pins, gone.runs, gone.turn_lock]
        rest += [gone.progress, gone.history]
        await self._run("forget", [gone.head, *rest], [gone.uid])

    async def join(
        self,
        head: Head,
        *,
        run_id: str,
        rank: int,
        world_size: int,
        straggler_timeout_ms: int,
        position: Position,
        is_given: bool,
        target: Position,
        rejoining_as: Member | None,
        process_id: str,
        stored_claim: str,
        target_plan_id: str,
    ) -> list[str]:
        """One atomic attempt to join; see join.lua for the answers."""
        experiment = head.keys
        script_keys = [
            experiment.head,
            experiment.claims,
            experiment.finished,
            experiment.epochs,
            experiment.pins,
            experiment.plan(head.plan_id),
            experiment.runs,
        ]
        at = f"{position.epoch} {position.step}"
        args: list[Any] = [*head.identity(), run_id, rank, world_size, straggler_timeout_ms, at, int(is_given), *target]
        args += ["", ""] if rejoining_as is None else [rejoining_as.generation, rejoining_as.claim]
        target_spec = await self.spec_of_plan(head, target_plan_id) if target_plan_id and head.next_spec else None
        args += [process_id, stored_claim, target_plan_id, b"" if target_spec is None else _bytes_of(target_spec)]
        return [item.decode() for item in await self._run("join", script_keys, args)]

    async def had_run(self, head: Head, run_id: str) -> bool:
        """Whether a run of this run_id has begun, be it the latest or an earlier one."""
        return bool(await cast(Any, self._redis.hexists(head.keys.runs, run_id)))

    async def claim(self, head: Head, rank: int) -> str:
        """The claim of a rank's latest process; empty if there is none."""
        stored = await cast(Any, self._redis.hget(head.keys.claims, str(rank)))
        return "" if stored is None else stored.decode()

    async def unfinished_ranks(self, head: Head) -> list[int]:
        """Ranks that have not finished the current epoch, ascending."""
        return (~await self._finished(head)).nonzero()[0].tolist()

    async def _finished(self, head: Head) -> NDArray[np.bool_]:
        """Which ranks have finished the current epoch: bool [world_size]."""
        num_bytes = -(-head.world_size // 8)
        data = cast(bytes, await self._redis.get(head.keys.finished) or b"")
        bits = np.frombuffer(data[:num_bytes].ljust(num_bytes, b"\0"), np.uint8)  # a later run may have more ranks
        return np.unpackbits(bits, count=head.world_size).astype(np.bool_)

    async def was_skipped(self, head: Head, epoch: int, rank: int) -> bool:
        """Whether a past epoch has ended without a rank, as far as is known; also if it was too long ago to tell."""
        plan_id = await self.plan_of_epoch(head, epoch + 1)
        if plan_id is None:
            return True
        noted = await cast(Any, self._redis.hget(head.keys.plan(plan_id), "skipped_ranks")) or b""
        skipped = noted.decode().split()
        return str(rank) in skipped or len(skipped) == _MAX_SKIPPED_RANKS

    async def finish(self, head: Head, member: Member, *, plan_id: str, epoch: int) -> str:
        """Mark a rank as finished; see finish.lua for the answers."""
        experiment = head.keys
        script_keys = [experiment.head, experiment.claims, experiment.finished]
        answer = await self._run("finish", script_keys, [head.uid, plan_id, *member, epoch])
        return cast(bytes, answer).decode()

    async def seal(self, head: Head, *, at_once: bool) -> bool:
        """End the epoch without the ranks that have not finished it; False if that is not due, or the head has changed.

        It is due once the run's straggler time-out is over or, `at_once`, in any case.
        """
        args = [head.uid, head.epoch, head.plan_id, head.generation, int(at_once)]
        return bool(await self._run("seal", [head.keys.head], args))

    async def pin(self, head: Head, name: str, epoch: int | None) -> str:
        """Keep an epoch under a name, or let go of what it keeps; see pin.lua for the answers."""
        script_keys = [head.keys.head, head.keys.epochs, head.keys.pins]
        args = [head.uid, name, "" if epoch is None else epoch, _MAX_PINS]
        return cast(bytes, await self._run("pin", script_keys, args)).decode()

    async def lock_turn(self, head: Head, token: str, ttl_s: float) -> bool:
        """Take the lock of an experiment's turn. It only saves work: what is correct is up to the commit."""
        return bool(await self._redis.set(head.keys.turn_lock, token, nx=True, px=int(ttl_s * 1000)))

    async def renew_turn_lock(self, head: Head, token: str, ttl_s: float) -> None:
        """Hold the lock for longer, if it is still ours: once it was given back it is not taken again."""
        if await self._redis.get(head.keys.turn_lock) == token.encode():
            await self._redis.pexpire(head.keys.turn_lock, int(ttl_s * 1000))

    async def unlock_turn(self, head: Head, token: str) -> None:
        """Give the lock back, if it is still ours."""
        if await self._redis.get(head.keys.turn_lock) == token.encode():
            await self._redis.delete(head.keys.turn_lock)

    # Plans

    async def register_plan(self, head: Head, plan_id: str, epoch: int) -> bool:
        """Make a plan's columns findable before the first is written; False if the experiment is gone."""
        return bool(await self._run("register", [head.keys.head, head.keys.plans], [head.uid, plan_id, epoch]))

    async def plan_of_epoch(self, head: Head, epoch: int) -> str | None:
        """The plan of a retained epoch."""
        plan_id = await cast(Any, self._redis.hget(head.keys.epochs, str(epoch)))
        return None if plan_id is None else plan_id.decode()

    async def retained_epochs(self, head: Head) -> list[int]:
        """Epochs whose scores are kept, ascending."""
        return sorted(map(int, await cast(Any, self._redis.hkeys(head.keys.epochs))))

    async def plan_info(self, head: Head, plan_id: str) -> PlanInfo:
        """The counts and generations of a plan; zeros for one that is not committed yet."""
        return await self._plan_info(head.keys, plan_id)

    async def _plan_info(self, experiment: ExperimentKeys, plan_id: str) -> PlanInfo:
        fields = await cast(Any, self._redis.hgetall(experiment.plan(plan_id)))
        generations = [
            PlanGeneration(int(field.split(b":")[1]), *map(int, value.split()))
            for field, value in fields.items()
            if field.startswith(b"generation:")
        ]
        counts = RowCounts(*(int(fields.get(field.encode(), 0)) for field in RowCounts._fields))
        return PlanInfo(
            counts,
            tuple(sorted(generations)),
            int(fields.get(b"num_steps", 0)),
            np.frombuffer(fields[b"mixture"], "<f8") if b"mixture" in fields else None,
            fields.get(b"groups_id", b"").decode(),
        )

    async def spec_of_plan(self, head: Head, plan_id: str) -> ExperimentSpec:
        """With which spec a plan was made: of as many samples as there were."""
        if head.next_spec is None:
            return head.spec
        data = await cast(Any, self._redis.hget(head.keys.plan(plan_id), "spec"))
        return head.birth_spec if data is None else _spec(data)

    async def extend(self, head: Head, spec: ExperimentSpec) -> str:
        """Have the next epoch planned with this spec, of more samples; see extend.lua for the answers."""
        before = b"" if head.next_spec is None else _bytes_of(head.next_spec)
        answer = await self._run("extend", [head.keys.head], [head.uid, before, _bytes_of(spec)])
        await self.replicated(head.name)
        return cast(bytes, answer).decode()

    async def is_imported(self, head: Head) -> bool:
        """Whether the scores of the current plan came from outside."""
        return bool(await cast(Any, self._redis.hexists(head.keys.plan(head.plan_id), "imported")))

    async def write(
        self, head: Head, plan_id: str, *, scores: Scores | None = None, table: Table | None = None
    ) -> bool:
        """Write a plan's scores, its table or both; False if it was collected meanwhile, or the store has lost some."""
        columns: dict[str, Any] = {}
        if scores is not None:
            columns |= dict(zip(_SCORE_COLUMNS, scores, strict=False)) | _policy_columns(scores.columns)
        # If it is made here, the next turn reads them. Large ones would drive tables out of the cache until then.
        fits = sum(values.nbytes for values in columns.values()) <= self._cache.max_bytes * _MAX_SCORES_SHARE
        if table is not None:
            columns |= {name: rows for name, rows in zip(_TABLE_COLUMNS, table, strict=True) if rows is not None}
        return await self._write_columns(head, plan_id, columns, is_cached=fits)

    async def write_groups(self, head: Head, groups: Groups) -> None:
        """Make these the groups of an experiment, unless it is gone, or has grown or gone on by epochs meanwhile.

        Their columns are registered like those of a plan, for an epoch to come: until that they are not retired.
        """
        groups_id = secrets.token_hex(8)
        if not await self.register_plan(head, groups_id, head.epoch + 2):
            return
        columns = {column: values for column, values in zip(_GROUP_COLUMNS, groups, strict=True) if values is not None}
        if not await self._write_columns(head, groups_id, columns, is_cached=True):
            return
        args = [head.uid, groups_id, len(groups.ids), _digest(groups), _bytes_of(head.extended_spec)]
        if await self._run("set_groups", [head.keys.head, head.keys.plans, head.keys.doomed], args):
            await self.collect(head)
            await self.replicated(head.name)

    @staticmethod
    def has_groups(head: Head, groups: Groups) -> bool:
        """Whether the experiment has just these groups."""
        return head.groups_digest == _digest(groups)

    async def read_groups(self, head: Head, num_samples: int) -> Groups | None:
        """Groups of the samples [0, num_samples); None if there are none."""
        ids, reference_losses = await self.read_group_rows(head, 0, num_samples), None
        if ids is None:
            return None
        if isinstance(head.spec.mixture, DoReMi):
            dtype, rows = np.float32, (0, num_samples, head.groups_size)
            reference_losses = await self._read(head, head.groups_id, "reference_loss", dtype, *rows)
        return Groups(ids, reference_losses)

    async def read_group_rows(self, head: Head, first: int, count: int) -> NDArray[np.uint16] | None:
        """Groups of the samples [first, first + count), as they are now; None if there are none."""
        if not head.groups_id:
            return None
        return await self._read(head, head.groups_id, "group", np.uint16, first, count, head.groups_size)

    async def _write_columns(
        self, head: Head, plan_id: str, columns: dict[str, NDArray[Any]], *, is_cached: bool
    ) -> bool:
        """Write columns; False if what they belong to was collected meanwhile, or is now, as the store has lost some.

        Blocks are staged with plain commands, as the store copies what a script is given. Those that are not kept then,
        because their writer died, expire.
        """
        experiment = head.keys
        blocks = [
            (experiment.column(plan_id, column, block.number), values[block.number * BLOCK_ROWS :][: block.num_rows])
            for column, values in columns.items()
            for block in _blocks(0, len(values))
        ]
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            written = dict(blocks[first : first + _BLOCKS_AT_ONCE])
            if is_cached:  # a cached view would keep the whole column alive
                copies = {key: np.empty_like(rows) for key, rows in written.items()}
                await in_thread(sum(map(len, written.values())), _copy, written, copies)
                written = copies
            await self._stage({keys.staged(key): rows.data.cast("B") for key, rows in written.items()})
            script_keys = [name for key in written for name in (keys.staged(key), key)]
            if not await self._run("keep", [experiment.head, experiment.plans, *script_keys], [head.uid, plan_id]):
                await self.collect(head, lost_plan=plan_id)
                return False
            if is_cached:
                for key, rows in written.items():
                    self._cache.put(key, rows)
        return True

    async def _stage(self, blocks: dict[str, memoryview]) -> None:
        """Write blocks: small ones in one round trip, large ones one by one, so that others get their turn."""
        if sum(map(len, blocks.values())) > _SMALL_BYTES:
            for key, rows in blocks.items():
                await self._redis.set(key, rows, px=_STAGED_TTL_MS)
            return
        pipeline: Any = self._redis.pipeline(transaction=False)
        for key, rows in blocks.items():
            pipeline.set(key, rows, px=_STAGED_TTL_MS)
        await pipeline.execute()

    async def commit(
        self,
        head: Head,
        *,
        epoch: int,
        plan_id: str,
        state: ExperimentState,
        table_checksum: int,
        spec: ExperimentSpec,
        shape: EpochShape | None,
        row_counts: RowCounts,
        new_rows: int | None,
        mixture: NDArray[np.float64] | None,
        folded: EpochSummary | None,
        is_imported: bool,
        lock_token: str,
    ) -> bool:
        """Move the head to a plan whose columns are complete; False if another got there first.

        Args:
            lock_token: of the turn's lock, which is given back then; empty: there is none.
        """
        experiment = head.keys
        script_keys = [
            experiment.head,
            experiment.plans,
            experiment.epochs,
            experiment.finished,
            experiment.plan(plan_id),
            experiment.history,
            experiment.turn_lock,
        ]
        counts = [item for pair in row_counts._asdict().items() for item in pair]
        if new_rows is not None:
            counts += ["new_rows", new_rows]
        if head.groups_id:
            counts += ["groups_id", head.groups_id]
        if mixture is not None:
            counts += ["mixture", mixture.astype("<f8").tobytes()]
        if is_imported:
            counts += ["imported", 1]
        summary = b""
        if folded is not None:
            now = datetime.datetime.now(datetime.UTC)
            summary = past_epoch_to_proto(PastEpoch(now, folded)).SerializeToString()
        num_steps, num_hidden_steps = (0, 0) if shape is None else (shape.num_steps, shape.num_hidden_steps)
        args: list[Any] = [*head.identity(), epoch, plan_id, state, table_checksum, num_steps, num_hidden_steps]
        made_with = b"" if head.next_spec is None else _bytes_of(spec)
        args += [summary, _num_kept_summaries(spec), made_with, lock_token, *counts]
        is_committed = bool(await self._run("commit", script_keys, args))
        if is_committed:
            await self.replicated(head.name)
        return is_committed

    async def collect(self, head: Head, *, lost_plan: str = "") -> None:
        """Remove what is no longer needed: old epochs, past epochs' tables, plans that lost. Repeatable."""
        experiment = head.keys
        script_keys = [experiment.head, experiment.plans, experiment.epochs, experiment.doomed, experiment.pins]
        for plan_id in await self._run("retire", script_keys, [head.uid, self._retain_epochs, lost_plan]):
            await self._unlink_plan(experiment, head.extended_spec, plan_id.decode())
            await cast(Any, self._redis.hdel(experiment.doomed, plan_id))
        for plan_id in await cast(Any, self._redis.hvals(experiment.epochs)):
            if plan_id.decode() != head.plan_id:
                columns = self._drop(experiment, head.extended_spec, plan_id.decode(), _TABLE_COLUMNS)
                for first in range(0, len(columns), 1000):
                    some = columns[first : first + 1000]
                    await self._run("unlink_table", [experiment.head, *some], [head.uid, plan_id])

    async def _unlink_plan(self, experiment: ExperimentKeys, spec: ExperimentSpec, plan_id: str) -> None:
        info = await self._plan_info(experiment, plan_id)
        columns = [*_TABLE_COLUMNS, *_SCORE_COLUMNS, *_GROUP_COLUMNS, *_policy_columns(spec.policy.columns)]
        await self._unlink(self._column_keys(experiment, spec, plan_id, columns))
        for generation, world_size, _ in info.generations:
            # an upper bound: a table has n rows at most
            num_blocks = -(-spec.num_samples // world_size // BLOCK_ROWS) + 1
            await self._unlink(
                [
                    experiment.reported(plan_id, column, generation, rank, block)
                    for column in ("loss", "chosen", *_policy_columns(spec.policy.reported_columns))
                    for rank in range(world_size)
                    for block in range(num_blocks)
                ]
            )
        await self._redis.unlink(experiment.plan(plan_id))

    def _drop(
        self, experiment: ExperimentKeys, spec: ExperimentSpec, plan_id: str, columns: Iterable[str]
    ) -> list[str]:
        """Let go of the blocks of some columns in memory; returns their keys."""
        names = self._column_keys(experiment, spec, plan_id, columns)
        for name in names:
            self._cache.drop(name)
        return names

    @staticmethod
    def _column_keys(
        experiment: ExperimentKeys, spec: ExperimentSpec, plan_id: str, columns: Iterable[str]
    ) -> list[str]:
        blocks = range(-(-spec.num_samples // BLOCK_ROWS))
        return [experiment.column(plan_id, column, block) for column in columns for block in blocks]

    async def _unlink(self, names: list[str]) -> None:
        for name in names:
            self._cache.drop(name)
        for first in range(0, len(names), 1000):
            await self._redis.unlink(*names[first : first + 1000])

    # Columns

    async def read_scores(self, head: Head, plan_id: str) -> Scores:
        """All samples' scores at the start of a plan's epoch, in arrays of their own; the cache lets go of them."""

        async def whole(column: str, dtype: DTypeLike) -> NDArray[Any]:
            return await self._read_whole(head, plan_id, column, dtype, head.spec.num_samples)

        fixed = [await whole(column, dtype) for column, dtype in _SCORE_COLUMNS.items()]
        own = [await whole(column, np.float32) for column in _policy_columns(head.spec.policy.columns)]
        self._drop(head.keys, head.spec, plan_id, [*_SCORE_COLUMNS, *_policy_columns(head.spec.policy.columns)])
        return Scores._make([*fixed, dict(zip(head.spec.policy.columns, own, strict=True))])

    async def read_score_rows(self, head: Head, plan_id: str, first: int, count: int) -> Scores:
        """Scores of the samples [first, first + count)."""

        async def read(column: str, dtype: DTypeLike) -> NDArray[Any]:
            return await self._read(head, plan_id, column, dtype, first, count, head.spec.num_samples)

        fixed = [await read(column, dtype) for column, dtype in _SCORE_COLUMNS.items()]
        own = [await read(column, np.float32) for column in _policy_columns(head.spec.policy.columns)]
        return Scores._make([*fixed, dict(zip(head.spec.policy.columns, own, strict=True))])

    async def read_part(self, head: Head, rank: int, first_step: int, num_steps: int) -> Table:
        """A rank's rows of consecutive steps of the current epoch's table, [num_steps, part rows] each."""

        async def read(column: str, dtype: DTypeLike) -> NDArray[Any]:
            return await self._read_part(head, column, np.dtype(dtype), rank, first_step, num_steps)

        return Table(
            await read("sample_id", sample_id_dtype(head.spec.num_samples)),
            await read("prior_score", np.float32),
            await read("importance_weight", np.float32) if head.spec.has_set_weights else None,
        )

    async def _read_part(
        self, head: Head, column: str, dtype: np.dtype[Any], rank: int, first_step: int, num_steps: int
    ) -> NDArray[Any]:
        """What `part` would give of the whole column."""
        shape = head.shape
        if head.world_size == 1:
            place = (first_step * shape.step_rows, num_steps * shape.step_rows, shape.num_rows)
            rows = await self._read(head, head.plan_id, column, dtype, *place)
            return rows.reshape(num_steps, shape.step_rows)
        pieces = []
        for stretch in _blocks(first_step, num_steps, _stretch_steps(head)):
            parts = await self._parts(head, column, dtype, stretch.number)
            pieces.append(parts[rank, stretch.start : stretch.start + stretch.num_rows])
        return np.concatenate(pieces)  # a copy in any case: a reader that is slow keeps no more than its own rows

    async def _parts(self, head: Head, column: str, dtype: np.dtype[Any], stretch: int) -> NDArray[Any]:
        """Some steps of a column rank by rank, [world_size, steps, part rows], out of the cache if they are there.

        All ranks want their rows of them, and each would else gather them from here and there.
        """
        shape, world_size = head.shape, head.world_size
        first_step = stretch * _stretch_steps(head)
        num_steps = min(_stretch_steps(head), shape.num_steps - first_step)
        first, count = first_step * shape.step_rows, num_steps * shape.step_rows
        key = head.keys.column(head.plan_id, column, first // BLOCK_ROWS)  # in no block two stretches begin
        parts = self._cached(key, world_size)
        if parts is None:
            async with self._cache.loading(f"{key}:{world_size}"):
                parts = self._cache.get(key, world_size)  # another reader may have made them
                if parts is None:
                    rows = self._pieces(head, head.plan_id, column, dtype, first, count, shape.num_rows)
                    pieces = [piece async for piece in rows]
                    loop = asyncio.get_running_loop()
                    parts = await loop.run_in_executor(self._laying_out, _by_rank, pieces, num_steps, world_size)
                    self._cache.put(key, parts, world_size)
        return parts

    async def take_sample_ids(self, head: Head) -> NDArray[Any]:
        """The whole table's, of a sealed epoch: it is not streamed any more, so the cache lets go of it."""
        dtype = sample_id_dtype(head.spec.num_samples)
        sample_ids = await self._read_whole(head, head.plan_id, "sample_id", dtype, head.shape.num_rows)
        self._drop(head.keys, head.spec, head.plan_id, _TABLE_COLUMNS)
        return sample_ids

    async def _read(
        self, head: Head, plan_id: str, column: str, dtype: Any, first: int, count: int, total: int
    ) -> NDArray[Any]:
        pieces = []
        for block in _blocks(first, count):
            rows = await self._block(head, plan_id, column, np.dtype(dtype), block.number, total)
            pieces.append(rows[block.start : block.start + block.num_rows])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype)

    async def _block(
        self, head: Head, plan_id: str, column: str, dtype: np.dtype[Any], number: int, total: int
    ) -> NDArray[Any]:
        """A block of a column of `total` rows, out of the cache if it is there."""
        key = head.keys.column(plan_id, column, number)
        rows = self._cached(key)
        if rows is None:
            async with self._cache.loading(key):
                rows = self._cache.get(key)  # another reader may have brought it
                if rows is None:
                    rows = await self._read_block(head, plan_id, column, dtype, number, total)
                    self._cache.put(key, rows)
        return rows

    async def _read_whole(self, head: Head, plan_id: str, column: str, dtype: Any, total: int) -> NDArray[Any]:
        """A column in an array of its own."""
        values, done = np.empty(total, dtype), 0
        pieces: list[NDArray[Any]] = []
        async for rows in self._pieces(head, plan_id, column, values.dtype, 0, total, total):
            pieces.append(rows)
            stop = done + sum(map(len, pieces))
            if len(pieces) == _BLOCKS_AT_ONCE or stop == total:
                await in_thread(stop - done, np.concatenate, pieces, out=values[done:stop])
                done, pieces = stop, []
        return values

    async def _pieces(
        self, head: Head, plan_id: str, column: str, dtype: np.dtype[Any], first: int, count: int, total: int
    ) -> AsyncIterator[NDArray[Any]]:
        """Rows of a column, block by block, without driving others out of the cache."""
        for block in _blocks(first, count):
            rows = self._cached(head.keys.column(plan_id, column, block.number))
            if rows is None:
                rows = await self._read_block(head, plan_id, column, dtype, block.number, total)
            yield rows[block.start : block.start + block.num_rows]

    def _cached(self, key: str, world_size: int = 1) -> NDArray[Any] | None:
        rows = self._cache.get(key, world_size)
        (self._metrics.cache_misses if rows is None else self._metrics.cache_hits).inc()
        return rows

    async def _read_block(
        self, head: Head, plan_id: str, column: str, dtype: np.dtype[Any], number: int, total: int
    ) -> NDArray[Any]:
        """A block of a column of `total` rows, out of the store."""
        key = head.keys.column(plan_id, column, number)
        data = await self._redis.get(key)
        expected = min(BLOCK_ROWS, total - number * BLOCK_ROWS) * dtype.itemsize
        if data is None or len(data) != expected:
            if not await self._is_kept(head, plan_id, column):
                raise EpochClosedError("the experiment has gone on meanwhile: this epoch is no longer kept")
            raise DataLossError(
                f"the store has {0 if data is None else len(data):,} of {expected:,} bytes of {key}: "
                "it lost committed data. Restore a backup of Redis, or delete the experiment"
            )
        return np.frombuffer(cast(bytes, data), dtype)

    async def _is_kept(self, head: Head, plan_id: str, column: str) -> bool:
        """Whether a column should be there, by the head as it stands now."""
        current = await self.head(head.name)
        if current is None or current.uid != head.uid:
            return False
        if column in _TABLE_COLUMNS:
            return current.plan_id == plan_id and current.state in ("open", "sealed")
        return plan_id == current.groups_id or plan_id.encode() in await cast(Any, self._redis.hvals(head.keys.epochs))

    # What ranks report

    async def write_report(
        self, head: Head, member: Member, *, plan_id: str, first_step: int, num_steps: int, report: Report
    ) -> str:
        """Record what was reported of consecutive steps of a rank's part; see report.lua for the answers."""
        experiment = head.keys
        losses = report.losses
        part_rows = len(losses) // num_steps
        finite = losses[np.isfinite(losses)]
        mean_loss = repr(float(finite.mean(dtype=np.float64))) if len(finite) else ""
        chosen = np.packbits(report.chosen.reshape(num_steps, part_rows), axis=1, bitorder="little").ravel()
        columns = {"loss": loss_bits(losses).astype("<u4", copy=False), "chosen": chosen}
        columns |= _policy_columns({name: values.astype("<f4", copy=False) for name, values in report.columns.items()})
        script_keys = [experiment.head, experiment.claims, experiment.progress]
        args: list[Any] = [head.uid, plan_id, *member, first_step + num_steps, mean_loss]
        for column, values in columns.items():
            done, num_step_values = 0, len(values) // num_steps
            for block in _blocks(first_step * num_step_values, len(values)):
                script_keys.append(experiment.reported(plan_id, column, member.generation, member.rank, block.number))
                size = min(BLOCK_ROWS, head.num_steps * num_step_values - block.number * BLOCK_ROWS)
                args += [values.itemsize * size, values.itemsize * block.start]
                args.append(values[done : done + block.num_rows].view(np.uint8).data)
                done += block.num_rows
        return cast(bytes, await self._run("report", script_keys, args)).decode()

    async def progress(self, head: Head) -> tuple[RankProgress, ...]:
        """How far the ranks of the latest run are, those that have reported something."""
        now_ms, fields = await self._run("progress", [head.keys.progress], [])
        found = {int(rank): noted.decode().split(" ") for rank, noted in zip(fields[::2], fields[1::2], strict=True)}
        return tuple(
            RankProgress(
                rank, int(epoch), int(step), (int(now_ms) - int(time_ms)) / 1000, float(mean) if mean else None
            )
            for rank, (generation, epoch, step, time_ms, mean) in sorted(found.items())
            if int(generation) == head.generation and rank < head.world_size
        )

    async def past_epochs(self, head: Head, first: int) -> tuple[PastEpoch, ...]:
        """The epochs from `first` on that have ended, as far as they are kept."""
        epochs = range(max(first, head.epoch - _num_kept_summaries(head.spec)), head.epoch)
        found = await cast(Any, self._redis.hmget(head.keys.history, *epochs)) if epochs else ()
        return tuple(
            past_epoch_from_proto(pb.EpochSummary.FromString(summary)) for summary in found if summary is not None
        )

    async def read_part_losses(
        self, head: Head, member: Member, *, first_step: int, num_steps: int
    ) -> NDArray[np.float32]:
        """A rank's losses of consecutive steps of the current epoch, [num_steps, part rows], NaN where not reported."""
        steps = _Steps(head.plan_id, member.generation, member.rank, first_step, num_steps)
        return losses_of_bits(
            await self._read_steps(head, steps, "loss", "<u4", head.shape.step_rows // head.world_size)
        )

    async def _read_steps(self, head: Head, steps: _Steps, column: str, dtype: str, num_values: int) -> NDArray[Any]:
        """A column of what a rank has reported, [num_steps, num_values], zero where it has not."""
        values = np.zeros(steps.num_steps * num_values, dtype)
        done = 0
        for block in _blocks(steps.first_step * num_values, len(values)):
            key = head.keys.reported(steps.plan_id, column, steps.generation, steps.rank, block.number)
            start, stop = (values.itemsize * row for row in (block.start, block.start + block.num_rows))
            found = np.frombuffer(cast(bytes, await self._redis.getrange(key, start, stop - 1)), dtype)
            values[done : done + len(found)] = found
            done += block.num_rows
        return values.reshape(steps.num_steps, num_values)

    async def read_report(self, head: Head, info: PlanInfo) -> Report:
        """All that was reported of the current epoch, in row order.

        What a run reported counts up to the step from which a later run did.

        Args:
            info: of the epoch's plan.
        """
        shape, plan_id = head.shape, head.plan_id
        names = head.spec.policy.reported_columns
        report = await in_thread(shape.num_rows, _nothing_reported, shape.num_rows, names)
        stop = shape.num_steps
        for generation, world_size, first_step in reversed(info.generations):
            part_rows = shape.step_rows // world_size
            own = zip(_policy_columns(names), report.columns.values(), strict=True)
            for column, dtype, num_values, values in (
                ("loss", "<u4", part_rows, report.losses),
                ("chosen", "u1", -(-part_rows // 8), report.chosen),
                *((column, "<f4", part_rows, values) for column, values in own),
            ):
                parts = []
                for rank in range(world_size if first_step < stop else 0):
                    steps = _Steps(plan_id, generation, rank, first_step, stop - first_step)
                    parts.append(await self._read_steps(head, steps, column, dtype, num_values))
                rows = values[first_step * shape.step_rows : stop * shape.step_rows]
                await in_thread(len(rows), _put_together, rows, shape.step_rows, column, parts)
            stop = min(stop, first_step)
        return report


def _nothing_reported(num_rows: int, columns: Iterable[str]) -> Report:
    return Report(
        np.full(num_rows, np.nan, np.float32),
        np.zeros(num_rows, np.bool_),
        {name: np.zeros(num_rows, np.float32) for name in columns},
    )


def _put_together(rows: NDArray[Any], step_rows: int, column: str, parts: list[NDArray[Any]]) -> None:
    """Fill whole steps with what the ranks have reported of their parts, as it is stored."""
    for rank, values in enumerate(parts):
        if column == "loss":
            values = losses_of_bits(values)
        elif column == "chosen":
            values = np.unpackbits(values, axis=1, count=step_rows // len(parts), bitorder="little")
        part(rows, step_rows, rank, len(parts))[:] = values


def _copy(blocks: dict[str, NDArray[Any]], copies: dict[str, NDArray[Any]]) -> None:
    """Fill copies, which then can't be changed. One thread makes all of them: glibc keeps what each has freed."""
    for key, copy in copies.items():
        copy[:] = blocks[key]
        copy.flags.writeable = False


def _digest(groups: Groups) -> str:
    digest = hashlib.sha256(groups.ids.data)
    if groups.reference_losses is not None:
        digest.update(groups.reference_losses.data)
    return digest.hexdigest()


def _stretch_steps(head: Head) -> int:
    """Of how many steps the rows are kept rank by rank: at least a block's, and enough for each rank to have many."""
    return -(-BLOCK_ROWS * min(head.world_size, _MAX_STRETCH_BLOCKS) // head.shape.step_rows)


def _by_rank(pieces: list[NDArray[Any]], num_steps: int, world_size: int) -> NDArray[Any]:
    """The rows of consecutive steps, piece by piece, as [world_size, num_steps, part rows]."""
    rows = np.concatenate(pieces)
    part_rows = len(rows) // (num_steps * world_size)
    piece = np.dtype((np.void, part_rows * rows.itemsize))  # a rank's of a step, which so is copied as one
    by_rank = np.ascontiguousarray(rows.view(piece).reshape(num_steps, world_size).T)
    return by_rank.view(rows.dtype).reshape(world_size, num_steps, part_rows)


def _num_kept_summaries(spec: ExperimentSpec) -> int:
    return min(_KEPT_SUMMARIES, _KEPT_GROUP_SUMMARIES // max(spec.num_groups, 1))


def _policy_columns(columns: Iterable[str]) -> dict[str, Any]:
    """A policy's columns by the names that they have in the store, apart from all others."""
    values = columns if isinstance(columns, Mapping) else dict.fromkeys(columns)
    return {f"policy:{name}": value for name, value in values.items()}


class _BlockCache:
    """Blocks of columns by key, least recently used out first. A block never changes, so it can't be stale.

    Under a block's key are its rows as they stand in the table (for a world size of 1) and, for others, those of the
    stretch of steps that begins in it, rank by rank.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self.max_bytes = max_bytes
        self._blocks: OrderedDict[str, dict[int, NDArray[Any]]] = OrderedDict()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def get(self, key: str, world_size: int = 1) -> NDArray[Any] | None:
        if key not in self._blocks:
            return None
        self._blocks.move_to_end(key)
        return self._blocks[key].get(world_size)

    def put(self, key: str, rows: NDArray[Any], world_size: int = 1) -> None:
        layouts = self._blocks.setdefault(key, {})
        before = layouts.get(world_size)
        layouts[world_size] = rows
        self._blocks.move_to_end(key)
        self.num_bytes += rows.nbytes - (0 if before is None else before.nbytes)
        while self.num_bytes > self.max_bytes:
            self.drop(next(iter(self._blocks)))

    def drop(self, key: str) -> None:
        self.num_bytes -= sum(rows.nbytes for rows in self._blocks.pop(key, {}).values())

    def loading(self, key: str) -> asyncio.Lock:
        """A lock under which one reader at a time fetches a block."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock
