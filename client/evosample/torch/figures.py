"""What selection costs and saves, as measured in the training loop."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evosample.sampling import EpochShape

_NUM_TIMED_STEPS = 5


@dataclass
class EpochFigures:
    """How one epoch went, on this process.

    Attributes:
        epoch: from 0.
        num_steps: steps trained on.
        seconds: from when it is planned to the last step's end.
        loading_s: of these, waiting for the dataset.
        scoring_s: of these, in scoring passes.
        waiting_s: before the epoch, waiting for it to be planned: for the other ranks' losses, and the turn.
        num_not_loaded: samples that the dataset gave None for.
        new_share: share of the epoch's samples that the epoch before had left out.
        effective_sample_share: mean over the steps of (sum w)^2 / (m * sum w^2), of the m chosen rows' importance
            weights w: 1 where all count alike.
        predicted_saving: where steps score: share of the time of training on every sample that they load that the epoch
            is expected to do without, from the costs measured at warm-up (`predict_saving`; see `Costs`). Time for
            loading doesn't count.
        realised_saving: the same as measured; None before an epoch that trains on all it loads was.
    """

    epoch: int
    num_steps: int = 0
    seconds: float = 0.0
    loading_s: float = 0.0
    scoring_s: float = 0.0
    waiting_s: float = 0.0
    num_not_loaded: int = 0
    new_share: float | None = None
    effective_sample_share: float | None = None
    predicted_saving: float | None = None
    realised_saving: float | None = None

    @property
    def scoring_share(self) -> float:
        """The scoring pass's share of the time of the steps, loading not counted.

        On a GPU the pass's time includes what is left of the step before: it waits for that.
        """
        computing_s = self.seconds - self.loading_s
        return self.scoring_s / computing_s if computing_s > 0 else 0.0

    def __str__(self) -> str:
        said = [f"epoch {self.epoch}: {self.num_steps:,} steps in {self.seconds:.1f} s, waited {self.waiting_s:.1f} s"]
        if self.scoring_s:
            said.append(f"{self.scoring_share:.0%} scoring")
        if self.loading_s and self.seconds:
            said.append(f"{self.loading_s / self.seconds:.0%} waiting for data")
        if self.new_share:
            said.append(f"{self.new_share:.1%} of its samples were left out before")
        if self.effective_sample_share is not None:
            said.append(f"effective sample size {self.effective_sample_share:.0%}")
        if self.num_not_loaded:
            said.append(f"{self.num_not_loaded:,} samples not loaded")
        if self.realised_saving is not None:
            predicted = "" if self.predicted_saving is None else f" (predicted: {self.predicted_saving:.1%})"
            said.append(f"{self.realised_saving:.1%} of the time saved{predicted}")
        return ", ".join(said)


@dataclass
class Costs:
    """Seconds of the parts of a step, measured in the first steps of an epoch that trains on every sample.

    A step that selects is predicted to take

        score(B) + train(B) * score(b) / score(B),

    score(m) a scoring pass over m samples, and train(B) an ordinary step on all of them: a backward pass and the
    optimizer are taken to shrink with the number of samples as a forward pass does.
    """

    score_meta_batch_s: list[float] = field(default_factory=list)
    score_mini_batch_s: list[float] = field(default_factory=list)
    train_meta_batch_s: list[float] = field(default_factory=list)

    @property
    def want_more(self) -> bool:
        """Whether there are too few measurements for a median."""
        return len(self.score_meta_batch_s) < _NUM_TIMED_STEPS

    def full_epoch_s(self, shape: EpochShape) -> float | None:
        """Seconds of an epoch of as many steps that train on all they load; None before they were measured."""
        return shape.num_steps * statistics.median(self.train_meta_batch_s) if self.train_meta_batch_s else None

    def predicted_s(self, shape: EpochShape) -> float | None:
        """Seconds that an epoch is expected to take; None before the costs were measured."""
        if not self.train_meta_batch_s or not self.score_meta_batch_s:
            return None
        num_selecting = shape.num_selecting_steps
        train_s = statistics.median(self.train_meta_batch_s)
        full_s = (shape.num_training_steps - num_selecting) * train_s
        score_s = statistics.median(self.score_meta_batch_s)
        selecting_s = num_selecting * train_s * statistics.median(self.score_mini_batch_s) / score_s
        return full_s + selecting_s + (num_selecting + shape.num_hidden_steps) * score_s


class Stopwatch:
    """Measures an epoch: where its time goes, step by step."""

    def __init__(self, figures: EpochFigures, shape: EpochShape, costs: Costs) -> None:
        self.figures = figures
        self._shape = shape
        self._costs = costs
        self._epoch_began_s = time.perf_counter()
        self._step_began_s: float | None = None
        self._loading_s = 0.0
        self._trains_all = False
        self._steps_s: list[float] = []
        self._effective_shares: list[float] = []

    def begin_step(self, *, trains_all: bool) -> None:
        """A step begins, with its samples loaded; it trains on all of them, or not."""
        self._trains_all = trains_all
        self._step_began_s = time.perf_counter()
        self._loading_s = self.figures.loading_s
        self.figures.num_steps += 1

    def end_step(self) -> None:
        """The step that began last, if any did, is over: what has passed since, but for loading, is its time."""
        if self._step_began_s is None:
            return
        figures, now_s = self.figures, time.perf_counter()
        step_s = now_s - self._step_began_s - (figures.loading_s - self._loading_s)
        self._step_began_s = None
        figures.seconds = now_s - self._epoch_began_s
        self._steps_s.append(step_s)
        if self._trains_all:
            self._costs.train_meta_batch_s.append(step_s)

    def chose(self, importance_weights: NDArray[np.float32]) -> None:
        """The rows to train on were drawn."""
        squares = float(np.square(importance_weights).sum())
        if squares:
            self._effective_shares.append(float(importance_weights.sum()) ** 2 / (len(importance_weights) * squares))

    def end_epoch(self) -> None:
        """All losses are there: work out what became of the epoch."""
        figures, costs = self.figures, self._costs
        figures.seconds = time.perf_counter() - self._epoch_began_s
        if self._effective_shares:
            figures.effective_sample_share = statistics.fmean(self._effective_shares)
        full_s, predicted_s = costs.full_epoch_s(self._shape), costs.predicted_s(self._shape)
        if full_s and self._steps_s and (self._shape.num_selecting_steps or self._shape.num_hidden_steps):
            # Where steps differ from each other there is no middle one that stands for all.
            is_mixed = self._shape.num_selecting_steps not in (0, self._shape.num_steps) or self._shape.num_hidden_steps
            step_s = statistics.fmean(self._steps_s) if is_mixed else statistics.median(self._steps_s)
            figures.realised_saving = 1 - self._shape.num_steps * step_s / full_s
            figures.predicted_saving = None if predicted_s is None else 1 - predicted_s / full_s
