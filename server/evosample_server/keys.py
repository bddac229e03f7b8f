"""The names of all Redis keys; nowhere else is one spelled.

Every key of an experiment carries the hash tag {project/name}, so that all of them lie in one cluster slot and a script
may touch several; all but the head carry its uid, so that an experiment created again under the name shares none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from evosample.wire import ExperimentName

# Rows of a column in one string key: 1 MiB of float32, just inside an allocator class, and whole steps of all
# meta-batches of up to 1,024 rows that are powers of two. While the store takes in a larger one, everybody waits.
BLOCK_ROWS = 2**18 - 2**10

# Channel: uids of experiments whose head has just changed.
CHANGES = "evosample:changes"

# String: written now and then by every server, to see whether the store takes writes.
PROBE = "evosample:probe"


# Hash: id of a token -> what is known of it, as JSON.
TOKENS = "evosample:{tokens}"

# String: what is written to see whether replicas have a token; gone in a moment.
TOKENS_REPLICATED = "evosample:{tokens}:replicated"


def names(project: str) -> str:
    """Sorted set: the names of a project's experiments."""
    return f"evosample:{{{project}}}:experiments"


def samples(project: str) -> str:
    """Hash: name -> num_samples of a project's experiments; "num_samples time_s" of one that was to be made then."""
    return f"evosample:{{{project}}}:samples"


def head(name: ExperimentName) -> str:
    """Hash: an experiment's head."""
    return f"evosample:{{{name.project}/{name.name}}}:head"


def replicated(name: ExperimentName) -> str:
    """String: what is written to see how far replicas are; gone in a moment."""
    return f"evosample:{{{name.project}/{name.name}}}:replicated"


def staged(key: str) -> str:
    """String: a block that is being written; it expires unless it is given this key."""
    return f"{key}:staged"


@dataclass(frozen=True)
class ExperimentKeys:
    """The keys of one experiment."""

    name: ExperimentName
    uid: str

    @cached_property
    def _prefix(self) -> str:
        return f"evosample:{{{self.name.project}/{self.name.name}}}:{self.uid}"

    def _key(self, *parts: object) -> str:
        return ":".join([self._prefix, *map(str, parts)])

    @property
    def head(self) -> str:
        """Hash: uid (none: it was deleted), birth_uid, spec, state, epoch, plan_id, table_checksum, num_steps,
        num_hidden_steps, new_rows, skipped_ranks, generation, run_id, world_size, run_position, first_step,
        straggler_timeout_ms, finish_began_ms (when the first rank finished the epoch; 0: none has) and create_time.
        """
        return head(self.name)

    @property
    def claims(self) -> str:
        """Hash: rank -> claim of its latest process in the current generation; process:<id> -> claim of any process."""
        return self._key("claims")

    @property
    def runs(self) -> str:
        """Hash: run_id -> generation of all runs so far."""
        return self._key("runs")

    @property
    def finished(self) -> str:
        """String: a bit for each rank, set once it has finished the current epoch."""
        return self._key("finished")

    @property
    def plans(self) -> str:
        """Hash: plan_id -> epoch of everything that has columns; written before the first of them."""
        return self._key("plans")

    @property
    def doomed(self) -> str:
        """Hash: plan_id -> epoch of plans whose columns are being removed."""
        return self._key("doomed")

    @property
    def epochs(self) -> str:
        """Hash: epoch -> plan_id of the retained epochs."""
        return self._key("epochs")

    @property
    def pins(self) -> str:
        """Hash: name -> epoch that is kept under it, beside the retained ones."""
        return self._key("pins")

    @property
    def progress(self) -> str:
        """Hash: rank -> generation, epoch, step, time in milliseconds and mean loss of its latest report."""
        return self._key("progress")

    @property
    def history(self) -> str:
        """Hash: epoch -> summary of what it has come to, an `EpochSummary` message; of the latest ones."""
        return self._key("history")

    @property
    def turn_lock(self) -> str:
        """String: the token of whoever is planning the next epoch."""
        return self._key("turn")

    def plan(self, plan_id: str) -> str:
        """Hash of a plan: generation:<g> -> "world_size first_step", row counts so far, new_rows ..."""
        return self._key(plan_id)

    def column(self, plan_id: str, column: str, block: int) -> str:
        """String: one block of a column of a plan."""
        return self._key(plan_id, column, block)

    def reported(self, plan_id: str, column: str, generation: int, rank: int, block: int) -> str:
        """String: one block of a column that a rank of a generation reported, in its part's order."""
        return self._key(plan_id, column, f"g{generation}", f"r{rank}", block)
