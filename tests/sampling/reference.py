"""The algorithm once more, as plain loops over samples: what evosample.sampling's arrays are checked against.

Written from the docstrings and the papers. Shared with the product are the random bits and the permutations made of
them, nothing else. np.float32 stands where a value is stored or computed as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from evosample.sampling import (
    UCB,
    EvolvedSampling,
    ExperimentSpec,
    InfoBatch,
    Kakurenbo,
    OrderedSGD,
    Policy,
    Purpose,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
    permutation,
    random_bits,
)

F = np.float32
Drawn = list[tuple[int, float]]
"""Rows, ascending, each with its inclusion probability."""


def uniform(bits: int) -> float:
    return ((bits >> 12) + 0.5) / 2**52


def exponential(bits: int) -> float:
    return -math.log(uniform(bits))


def successive(weights: Sequence[Any], k: int, bits: Sequence[int]) -> Drawn:
    """The k smallest of Exp(1) / w; pi = 1 - exp(-w * tau), tau the next one."""
    race = sorted((exponential(bits[i]) / float(w), i) for i, w in enumerate(weights) if w > 0)
    idle = sorted((exponential(bits[i]), i) for i, w in enumerate(weights) if w == 0)
    if len(race) > k:
        tau = race[k][0]
        return sorted((i, 1 - math.exp(-float(weights[i]) * tau)) for _, i in race[:k])
    num_missing = k - len(race)
    return sorted([(i, 1.0) for _, i in race] + [(i, num_missing / len(idle)) for _, i in idle[:num_missing]])


def systematic(weights: Sequence[Any], k: int, bits: Sequence[int]) -> Drawn:
    """pi = min(1, c w), in rational numbers; a mark at every u + j of the cumulated pi takes the row it falls on."""
    exact = [Fraction(float(w)) for w in weights]
    num_positive = sum(w > 0 for w in exact)
    if num_positive <= k:
        share = Fraction(k - num_positive, max(len(exact) - num_positive, 1))
        probabilities = [Fraction(1) if w > 0 else share for w in exact]
    else:
        descending = sorted(exact, reverse=True)
        for num_certain in range(k):
            c = (k - num_certain) / sum(descending[num_certain:], Fraction(0))
            if c * descending[num_certain] < 1:
                break
        probabilities = [min(Fraction(1), c * w) for w in exact]
    drawn, cumulated, mark = [], Fraction(0), Fraction(uniform(bits[0])) if k else Fraction(1)
    for i, p in enumerate(probabilities):
        if p == 1:
            drawn.append((i, 1.0))
            continue
        cumulated += p
        if mark <= cumulated:
            drawn.append((i, float(p)))
            mark += 1
    return drawn


def top_k(weights: Sequence[Any], k: int, bits: Sequence[int]) -> Drawn:
    best = sorted(range(len(weights)), key=lambda i: (-weights[i], bits[i]))[:k]
    return [(i, 1.0) for i in sorted(best)]


def with_replacement(weights: Sequence[Any], k: int, bits: Sequence[int]) -> Drawn:
    exact = [Fraction(float(w)) for w in weights]
    if not any(exact):
        exact = [Fraction(1)] * len(exact)
    total, drawn = sum(exact), []
    for row_bits in bits[:k]:
        goal, row = Fraction(uniform(row_bits)) * total, 0
        while goal >= exact[row]:
            goal -= exact[row]
            row += 1
        drawn.append((row, float(k * exact[row] / total)))
    return sorted(drawn)


DRAWS: dict[str, Callable[[Sequence[Any], int, Sequence[int]], Drawn]] = {
    "successive": successive,
    "systematic": systematic,
    "top_k": top_k,
    "with_replacement": with_replacement,
}


@dataclass
class Kept:
    """Samples that an epoch keeps, with their inclusion probabilities and a policy's own weights, and hidden ones."""

    ids: list[int]
    probabilities: dict[int, float]
    own_weights: dict[int, float] = field(default_factory=dict)
    hidden: list[int] = field(default_factory=list)
    floor: list[int] = field(default_factory=list)  # what keeps groups at their floors


class Experiment:
    """One experiment under the base rules; a subclass for each policy says what it does otherwise."""

    beta1, beta2 = 0.2, 0.9
    prefers_unvisited = False
    columns: dict[str, float] = {}  # noqa: RUF012
    weighs = False
    scores_batches = False

    def __init__(self, spec: ExperimentSpec, world_size: int, groups: Sequence[int] = ()) -> None:
        self.spec, self.world_size, self.n, self.groups = spec, world_size, spec.num_samples, groups
        self.policy: Any = spec.policy
        n = self.n
        self.scores = [F(1 / n)] * n
        self.sampling_weights = [F(1 / n)] * n
        self.visits, self.staleness, self.chosen, self.chosen_staleness = [0] * n, [0] * n, [0] * n, [0] * n
        self.own = {name: [F(value)] * n for name, value in self.columns.items()}

    # What a policy decides.

    def trains_on_everything(self, epoch: int) -> bool:
        return False

    def keep(self, free: list[int], num_owed: int, epoch: int, bits: Sequence[int]) -> Kept:
        num_places = self.num_places() - num_owed
        drawn = DRAWS[self.policy.set_draw]([self.prune_weight(i) for i in free], num_places, [bits[i] for i in free])
        return Kept([free[row] for row, _ in drawn], {free[row]: p for row, p in drawn})

    def prune_weight(self, i: int) -> Any:
        return F(0)

    def row_weights(self, priors: list[Any], losses: list[Any], num_chosen: int) -> list[Any]:
        return [F(self.beta1) * s + F(1 - self.beta1) * loss for s, loss in zip(priors, losses, strict=True)]

    def selects_in(self, step: int) -> bool:
        return self.scores_batches

    def visit(self, i: int, loss: Any, reported: dict[str, Any]) -> None:
        s = self.scores[i]
        self.sampling_weights[i] = F(self.beta1) * s + F(1 - self.beta1) * loss
        self.scores[i] = F(self.beta2) * s + F(1 - self.beta2) * loss

    # What holds for all.

    def num_places(self) -> int:
        return max(self.n - math.floor(Fraction(str(self.policy.prune_ratio)) * self.n), self.spec.meta_batch_size)

    def extend(self, spec: ExperimentSpec, groups: Sequence[int] = ()) -> None:
        """Samples are added at the end."""
        start = F(1 / spec.num_samples)
        values: tuple[list[Any], ...] = (self.visits, self.staleness, self.chosen, self.chosen_staleness)
        for column, value in ((self.scores, start), (self.sampling_weights, start), *((each, 0) for each in values)):
            column += [value] * (spec.num_samples - self.n)
        self.spec, self.n, self.groups = spec, spec.num_samples, groups

    def weigh_unvisited(self) -> None:
        """Samples without a loss weigh as much as the others in the mean."""
        visited = [float(self.sampling_weights[i]) for i in range(self.n) if self.visits[i]]
        for i in range(self.n):
            if visited and not self.visits[i]:
                self.sampling_weights[i] = F(math.fsum(visited) / len(visited))

    def floor_of(self, epoch: int) -> list[int]:
        """Of each group those without a loss, then the highest weights; of equal ones those with the smallest bits."""
        ties = random_bits(self.spec.seed, Purpose.FLOORS, epoch, 0, 0, self.n)
        found = []
        for group in range(self.spec.num_groups):
            members = [i for i in range(self.n) if self.groups[i] == group]
            members.sort(key=lambda i: (self.visits[i] > 0, -self.sampling_weights[i], ties[i]))
            found += members[: math.ceil(Fraction(str(self.spec.group_floor)) * len(members))]
        return found

    def kept(self, epoch: int) -> Kept:
        n, everything = self.n, Kept(list(range(self.n)), dict.fromkeys(range(self.n), 1.0))
        everything.floor = self.floor_of(epoch)
        if self.trains_on_everything(epoch):
            return everything
        bits = [int(b) for b in random_bits(self.spec.seed, Purpose.PRUNE, epoch, 0, 0, n)]
        owed = [i for i in range(n) if self.visits[i] == 0 and self.prefers_unvisited]
        owed = sorted({*owed, *everything.floor})
        num_places = self.num_places()
        if len(owed) > num_places:
            drawn = successive([0] * len(owed), num_places, [bits[i] for i in owed])
            return Kept([owed[row] for row, _ in drawn], {owed[row]: p for row, p in drawn})
        kept = self.keep([i for i in range(n) if i not in set(owed)], len(owed), epoch, bits)
        kept.floor = everything.floor
        kept.ids = sorted(kept.ids + owed)
        kept.probabilities |= dict.fromkeys(owed, 1.0)
        if len(kept.ids) < self.spec.meta_batch_size or 0 < len(kept.hidden) < self.spec.meta_batch_size:
            return everything
        return kept

    def table(self, epoch: int, kept: Kept) -> tuple[list[int], list[float] | None, int]:
        """Sample ids in their order, the set level's importance weights, and how many steps are hidden."""
        num_rows, seed = len(kept.ids) // self.spec.meta_batch_size * self.spec.meta_batch_size, self.spec.seed
        order = permutation(random_bits(seed, Purpose.SHUFFLE, epoch, 0, 0, len(kept.ids)))
        ids = [kept.ids[int(row)] for row in order]
        probabilities = kept.probabilities
        if kept.floor:  # what fills no step is none of them
            others = [i for i in ids if i not in kept.floor]
            num_left = len(others) - (len(ids) - num_rows)
            ids = [i for i in ids if i in kept.floor or i in others[:num_left]]
            order = permutation(random_bits(seed, Purpose.SHUFFLE_GUARDED, epoch, 0, 0, num_rows))
            ids = [ids[int(row)] for row in order]
            share = {i: 1.0 if i in kept.floor else num_left / max(len(others), 1) for i in ids}
            probabilities = {i: probabilities[i] * share[i] * len(kept.ids) / num_rows for i in ids}
        ids = ids[:num_rows]
        hidden_steps = len(kept.hidden) // self.spec.meta_batch_size
        order = permutation(random_bits(seed, Purpose.SHUFFLE_HIDDEN, epoch, 0, 0, len(kept.hidden)))
        hidden = sorted(kept.hidden[int(order[row])] for row in range(hidden_steps * self.spec.meta_batch_size))
        weights = None
        if self.spec.importance_weight != "none":
            weights = [len(kept.ids) / (self.n * probabilities[i]) for i in ids]
        elif self.weighs:
            weights = [kept.own_weights.get(i, 1.0) for i in ids]
        if weights is not None:
            weights += [0.0] * len(hidden)
        return ids + hidden, weights, hidden_steps

    def select(
        self, epoch: int, step: int, rank: int, ids: list[int], losses: list[Any], weights: list[float] | None
    ) -> tuple[list[int], list[float]]:
        """The chosen rows of a rank's part of a training step, and their importance weights."""
        num_rows = len(ids)
        drawn = [(row, 1.0) for row in range(num_rows)]
        fraction = 1.0
        if self.selects_in(step) and not self.trains_on_everything(epoch):
            num_chosen = self.spec.mini_batch_size // self.world_size
            fraction = num_chosen / num_rows
            bits = [int(b) for b in random_bits(self.spec.seed, Purpose.SELECT, epoch, step, rank * num_rows, num_rows)]
            rows = [row for row in range(num_rows) if math.isfinite(losses[row])]
            row_weights = [F(math.isfinite(loss)) for loss in losses]
            if len(rows) < num_chosen:
                rows = list(range(num_rows))
            else:
                row_weights = self.row_weights(
                    [self.scores[ids[row]] for row in rows], [losses[row] for row in rows], num_chosen
                )
            if num_chosen < len(rows) or self.policy.batch_draw == "with_replacement":
                found = DRAWS[self.policy.batch_draw](row_weights, num_chosen, [bits[row] for row in rows])
                drawn = [(rows[at], p) for at, p in found]
            else:
                drawn = [(row, 1.0) for row in rows]
        result = []
        for row, p in drawn:
            weight = 1.0 if self.spec.importance_weight == "none" else fraction / p
            result.append(weight if weights is None else weight * weights[row])
        if self.spec.importance_weight == "self_normalized":
            mean = sum(result) / len(result)
            result = [weight / mean for weight in result]
        return [row for row, _ in drawn], result

    def fold(
        self, ids: list[int], losses: list[Any], chosen: list[bool], reported: dict[str, list[Any]]
    ) -> tuple[int, int, int]:
        """How many rows were visited, not finite and not reported."""
        self.staleness = [min(s + 1, 255) for s in self.staleness]
        self.chosen_staleness = [min(s + 1, 255) for s in self.chosen_staleness]
        visited = non_finite = unreported = 0
        for row, i in enumerate(ids):
            if chosen[row]:
                self.chosen[i] += 1
                self.chosen_staleness[i] = 0
            columns = {name: column[row] for name, column in reported.items()}
            if math.isnan(losses[row]):
                unreported += 1
            elif not all(math.isfinite(value) for value in [losses[row], *columns.values()]):
                non_finite += 1
            else:
                visited += 1
                self.visits[i] += 1
                self.staleness[i] = 0
                self.visit(i, losses[row], columns)
        return visited, non_finite, unreported


def share_of(share: float, num_epochs: int) -> int:
    """ceil(share * num_epochs), of the decimal number that was meant."""
    return math.ceil(Fraction(str(share)) * num_epochs)


class EvolvedSamplingReference(Experiment):
    def __init__(self, spec: ExperimentSpec, world_size: int, groups: Sequence[int] = ()) -> None:
        super().__init__(spec, world_size, groups)
        self.beta1, self.beta2 = self.policy.beta1, self.policy.beta2
        self.scores_batches = spec.mini_batch_size < spec.meta_batch_size

    def trains_on_everything(self, epoch: int) -> bool:
        ends = share_of(self.policy.annealing, self.spec.num_epochs)
        return epoch < ends or epoch >= self.spec.num_epochs - ends

    def prune_weight(self, i: int) -> Any:
        return self.sampling_weights[i]


class UniformReference(Experiment):
    def trains_on_everything(self, epoch: int) -> bool:
        return True


class RandomSubsetReference(Experiment):
    pass


class LatestLosses(Experiment):
    """Scores and sampling weights are the latest losses."""

    prefers_unvisited = True
    beta1 = beta2 = 0.0

    def visit(self, i: int, loss: Any, reported: dict[str, Any]) -> None:
        self.scores[i] = self.sampling_weights[i] = loss
        for name, value in reported.items():
            self.own[name][i] = value

    def row_weights(self, priors: list[Any], losses: list[Any], num_chosen: int) -> list[Any]:
        return losses

    def trains_on_everything(self, epoch: int) -> bool:
        return epoch == 0


class InfoBatchReference(LatestLosses):
    weighs = True

    def trains_on_everything(self, epoch: int) -> bool:
        return epoch == 0 or epoch >= share_of(self.policy.delta, self.spec.num_epochs)

    def keep(self, free: list[int], num_owed: int, epoch: int, bits: Sequence[int]) -> Kept:
        mean = F(math.fsum(float(self.scores[i]) for i in free) / max(len(free), 1))
        kept, ratio = Kept([], {}), self.policy.ratio
        for i in free:
            is_easy = self.scores[i] < mean
            if is_easy and uniform(bits[i]) < ratio:
                continue
            kept.ids.append(i)
            kept.probabilities[i] = 1 - ratio if is_easy else 1.0
            kept.own_weights[i] = 1 / (1 - ratio) if is_easy else 1.0
        return kept


class KakurenboReference(LatestLosses):
    columns = {"correct": 0.0, "confidence": 0.0}  # noqa: RUF012

    def keep(self, free: list[int], num_owed: int, epoch: int, bits: Sequence[int]) -> Kept:
        tenths = Fraction(10 * epoch, self.spec.num_epochs)
        stage = Fraction(10 if tenths < 6 else 8 if tenths < 8 else 6, 10)
        num_lowest = math.floor(Fraction(str(self.policy.max_ratio)) * stage * len(free))
        lowest = sorted(free, key=lambda i: (self.scores[i], bits[i]))[:num_lowest]
        hidden = sorted(
            i
            for i in lowest
            if self.own["correct"][i] == 1 and self.own["confidence"][i] >= F(self.policy.min_confidence)
        )
        ids = [i for i in free if i not in hidden]
        return Kept(ids, dict.fromkeys(ids, 1.0), hidden=hidden)


class OrderedSGDReference(LatestLosses):
    prefers_unvisited = False
    scores_batches = True

    def trains_on_everything(self, epoch: int) -> bool:
        return False


class UCBReference(LatestLosses):
    columns = {"variance": 0.0, "last_loss": 0.0}  # noqa: RUF012

    def visit(self, i: int, loss: Any, reported: dict[str, Any]) -> None:
        old, new, mean = F(1) - F(self.policy.alpha), F(self.policy.alpha), self.scores[i]
        self.own["variance"][i] = old * self.own["variance"][i] + new * (loss - mean) ** 2
        self.own["last_loss"][i] = loss
        self.scores[i] = old * mean + new * loss
        self.sampling_weights[i] = self.scores[i] + F(self.policy.c) * self.own["variance"][i]

    def prune_weight(self, i: int) -> Any:
        return self.sampling_weights[i]


class SelectiveBackpropReference(LatestLosses):
    prefers_unvisited = False
    scores_batches = True

    def trains_on_everything(self, epoch: int) -> bool:
        ends = [share_of(share, self.spec.num_epochs) for share in (self.policy.begin, self.policy.end)]
        return not ends[0] <= epoch < ends[1]

    def selects_in(self, step: int) -> bool:
        return bool(step % self.policy.selecting_interval == 0)

    def row_weights(self, priors: list[Any], losses: list[Any], num_chosen: int) -> list[Any]:
        weights = [F(0)] * len(losses)
        for rank, row in enumerate(sorted(range(len(losses)), key=lambda row: (losses[row], row))):
            weights[row] = F(((rank + 0.5) / len(losses)) ** (len(losses) / num_chosen - 1))
        return weights


REFERENCES: dict[type[Policy], type[Experiment]] = {
    EvolvedSampling: EvolvedSamplingReference,
    Uniform: UniformReference,
    RandomSubset: RandomSubsetReference,
    InfoBatch: InfoBatchReference,
    Kakurenbo: KakurenboReference,
    OrderedSGD: OrderedSGDReference,
    UCB: UCBReference,
    SelectiveBackprop: SelectiveBackpropReference,
}
