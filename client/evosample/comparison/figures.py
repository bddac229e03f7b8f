"""What trials come to: means with their standard errors, differences seed by seed, and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from evosample.comparison.trials import Clock, Outcome

_CONFIDENCE = 0.95

Verdict = Literal["better", "worse", "not better", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds, and its standard error; None where there is but one seed."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Of one value a seed."""
        found = np.array(list(values), np.float64)
        error = float(stats.sem(found)) if len(found) > 1 else None
        return cls(float(found.mean()), error)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.standard_error is None else f"{self.mean:.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True)
class Difference:
    """A method minus a baseline, paired by seed.

    Attributes:
        mean: over seeds.
        interval: the 95 % confidence interval by Student's t; None where there is but one seed, or where all seeds have
            the same difference, which says nothing of chance.
    """

    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Of one difference a seed."""
        estimate = Estimate.of(values)
        if estimate.standard_error is None or (not estimate.standard_error and estimate.mean):
            return cls(estimate.mean, None)
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * estimate.standard_error
        return cls(estimate.mean, (estimate.mean - half, estimate.mean + half))

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" [{self.interval[0]:+.4f}, {self.interval[1]:+.4f}]"
        return f"{self.mean:+.4f}{interval}"


@dataclass(frozen=True)
class MethodFigures:
    """A method's figures over all seeds.

    Attributes:
        name: the method, or the baseline.
        settings: what it ran with.
        num_epochs: of each run.
        metric: the judged one.
        other_metrics: the others, by name.
        seconds: training time by the comparison's clock.
        num_trained: samples that were back-propagated.
        equal_epochs: against the baseline for as many epochs; None for the baseline itself.
        equal_time: against the baseline for as much training time; None for the baseline itself.
        equal_time_epochs: for how many epochs the baseline trained in that time.
        verdict: by `equal_time`: "better" or "worse" if the interval is on one side of 0, else "not better"; "unknown"
            if there is no interval.
    """

    name: str
    settings: str
    num_epochs: int
    metric: Estimate
    other_metrics: dict[str, Estimate]
    seconds: Estimate
    num_trained: Estimate
    equal_epochs: Difference | None = None
    equal_time: Difference | None = None
    equal_time_epochs: int | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Comparison:
    """Methods beside random subsets.

    Attributes:
        metric: name of the metric that is judged.
        higher_is_better: of that metric.
        clock: what seconds are by, "wall" or "cpu".
        seeds: of the trials.
        methods: in the order in which they were given.
        baselines: random subsets by their number of epochs, ascending: as many as the methods', and as many as take as
            much time as one of them.
    """

    metric: str
    higher_is_better: bool
    clock: Clock
    seeds: tuple[int, ...]
    methods: tuple[MethodFigures, ...]
    baselines: tuple[MethodFigures, ...]

    @classmethod
    def of(
        cls,
        outcomes: Sequence[Outcome],
        equal_time_epochs: Mapping[str, int],
        *,
        clock: Clock,
        higher_is_better: bool,
    ) -> Comparison:
        """From the trials' outcomes, the baseline for as many epochs first."""
        runs: dict[tuple[str, int], dict[int, Outcome]] = {}
        for outcome in outcomes:
            runs.setdefault((outcome.method, outcome.num_epochs), {})[outcome.seed] = outcome
        first = outcomes[0]
        baseline, num_epochs, metric = first.method, first.num_epochs, next(iter(first.metrics))

        def figures(name: str, epochs: int) -> MethodFigures:
            run = list(runs[name, epochs].values())
            return MethodFigures(
                name,
                run[0].settings,
                epochs,
                Estimate.of(outcome.metrics[metric] for outcome in run),
                {other: Estimate.of(outcome.metrics[other] for outcome in run) for other in list(first.metrics)[1:]},
                Estimate.of(outcome.seconds(clock) for outcome in run),
                Estimate.of(outcome.num_trained for outcome in run),
            )

        def difference(name: str, baseline_epochs: int) -> Difference:
            beside = runs[baseline, baseline_epochs]
            return Difference.of(
                [
                    outcome.metrics[metric] - beside[seed].metrics[metric]
                    for seed, outcome in runs[name, num_epochs].items()
                ]
            )

        methods = []
        for name, epochs in equal_time_epochs.items():
            found, equal_time = figures(name, num_epochs), difference(name, epochs)
            methods.append(
                replace(
                    found,
                    equal_epochs=difference(name, num_epochs),
                    equal_time=equal_time,
                    equal_time_epochs=epochs,
                    verdict=_verdict(equal_time, higher_is_better=higher_is_better),
                )
            )
        baselines = [figures(name, epochs) for name, epochs in sorted(runs) if name == baseline]
        return cls(metric, higher_is_better, clock, tuple(runs[baseline, num_epochs]), tuple(methods), tuple(baselines))

    def sentences(self) -> list[str]:
        """The verdicts in words, a sentence or two a method."""
        return [self._sentence(method) for method in self.methods]

    def caveat(self) -> str:
        """How far verdicts on several methods can be trusted."""
        count = len(self.methods)
        chance = 100 * (1 - ((1 + _CONFIDENCE) / 2) ** count)
        return (
            f"Were all {count} methods just as good as {self.baselines[0].name}, chance alone would call one of them "
            f"better in about {chance:.0f} of 100 such comparisons."
        )

    def _sentence(self, method: MethodFigures) -> str:
        beside = next(each for each in self.baselines if each.num_epochs == method.equal_time_epochs)
        said = (
            f"{method.name} against {self.baselines[0].name} for as much training time "
            f"({method.equal_time_epochs} epochs, {beside.seconds.mean:.3g} s against {method.seconds.mean:.3g} s): "
            f"{self.metric} {method.equal_time}"
        )
        match method.verdict:
            case "unknown":
                if len(self.seeds) == 1:
                    return f"{said}. One seed says nothing of chance: take three or more."
                return f"{said} with every seed, which says nothing of chance: does the function go by it?"
            case "better":
                return f"{said}: better."
            case "worse":
                return f"{said}: not better than {self.baselines[0].name}, but worse."
        return f"{said}: not better than {self.baselines[0].name}, as far as {len(self.seeds)} seeds can tell."


def _verdict(difference: Difference, *, higher_is_better: bool) -> Verdict:
    if difference.interval is None:
        return "unknown"
    low, high = difference.interval if higher_is_better else (-difference.interval[1], -difference.interval[0])
    return "better" if low > 0 else "worse" if high < 0 else "not better"
