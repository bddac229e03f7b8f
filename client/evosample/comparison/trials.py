"""Trials: a user's training function under several methods and seeds, with what it came to kept in a file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evosample.client import Client, Experiment, connect
from evosample.comparison.figures import Comparison
from evosample.comparison.page import write_page
from evosample.errors import EvosampleError, InvalidArgumentError, UsageError
from evosample.figures import progress_share
from evosample.sampling import (
    UCB,
    EvolvedSampling,
    InfoBatch,
    OrderedSGD,
    Policy,
    RandomSubset,
    SelectiveBackprop,
    Uniform,
)

Clock = Literal["wall", "cpu"]
Method = Policy | Mapping[str, Any]
Train = Callable[["Trial"], float | Mapping[str, float]]

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "Uniform": Uniform(),
        "ES without scoring": {"policy": EvolvedSampling(), "meta_batch_size": None},
        "ES": EvolvedSampling(),
        "ESWP": EvolvedSampling(prune_ratio=0.2),
        "InfoBatch": InfoBatch(),
        "OrderedSGD": OrderedSGD(),
        "UCB": UCB(),
        "SelectiveBackprop": SelectiveBackprop(),
    }
)
"""What is compared by default: the methods that need nothing but losses. Some need a meta-batch to select from."""

BASELINE = "RandomSubset"
RESULTS_FILE = "comparison.json"
_LOOK_S = 1.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        method: its name.
        settings: of the method, in words: a trial is not run again as long as these are the same.
        num_epochs, seed: of the trial.
        metrics: what the training function returned.
        train_seconds: by the clock on the wall, within `Trial.training`.
        cpu_seconds: processor time of this process meanwhile, over all its threads.
        num_trained: samples that were back-propagated.
    """

    method: str
    settings: str
    num_epochs: int
    seed: int
    metrics: dict[str, float]
    train_seconds: float
    cpu_seconds: float
    num_trained: int

    def seconds(self, clock: Clock) -> float:
        """Training time by one of the two clocks."""
        return self.train_seconds if clock == "wall" else self.cpu_seconds


class Trial:
    """One run of a training function: which method, which seed, for how many epochs.

    Attributes:
        method: the method's name.
        policy: what selects.
        num_epochs: of the run.
        seed: what the function is to seed its model, and all its other chance, with. The experiment has it, too.
    """

    def __init__(self, client: Client, method: str, settings: Mapping[str, Any], num_epochs: int, seed: int) -> None:
        self.method = method
        self.policy: Policy = settings["policy"]
        self.num_epochs = num_epochs
        self.seed = seed
        self.experiment: Experiment | None = None
        self.train_seconds = 0.0
        self.cpu_seconds = 0.0
        self._client = client
        self._settings = settings

    def create_experiment(
        self,
        *,
        num_samples: int,
        mini_batch_size: int | None = None,
        meta_batch_size: int | None = None,
        **settings: Any,
    ) -> Experiment:
        """Create the trial's experiment, to be trained on once, through all its epochs.

        Args:
            num_samples, mini_batch_size, meta_batch_size, **settings: as `Client.create_experiment` takes them; what
                the method sets itself goes first. Name, policy, epochs and seed are the trial's.
        """
        if self.experiment is not None:
            raise UsageError("a trial has one experiment, and this one has it already")
        own = {"name", "num_epochs", "policy", "seed"} & settings.keys()
        if own:
            raise UsageError(f"{', '.join(sorted(own))}: up to the trial; leave it out, and take it from there")
        is_unscored = meta_batch_size is None and "meta_batch_size" not in self._settings
        if is_unscored and self.method in METHODS and self.policy.batch_level == "scored":
            raise UsageError(
                f"{self.method} draws mini-batches from meta-batches: pass meta_batch_size as well, such as four times "
                "mini_batch_size (the other methods ignore it); or leave the method out"
            )
        sizes = {"num_samples": num_samples, "mini_batch_size": mini_batch_size, "meta_batch_size": meta_batch_size}
        self.experiment = self._client.create_experiment(
            f"compare-{secrets.token_hex(8)}",
            num_epochs=self.num_epochs,
            seed=self.seed,
            **{**sizes, **settings, **self._settings},
        )
        return self.experiment

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """What is timed: all of training, and neither preparing data nor testing the model. May be used repeatedly."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        yield
        self.train_seconds += time.perf_counter() - began_s
        self.cpu_seconds += time.process_time() - began_cpu_s


def compare(
    train: Train,
    methods: Mapping[str, Method] = METHODS,
    *,
    num_epochs: int,
    output: str | os.PathLike[str],
    seeds: Sequence[int] = (0, 1, 2),
    baseline: Method = RandomSubset(),  # noqa: B008  # frozen
    higher_is_better: bool = True,
    clock: Clock = "wall",
    client: Client | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Run a training function under several methods and seeds, and set each beside random subsets.

    The baseline always runs for as many epochs as the methods, and for as many as take as much training time as each
    method did: the verdict goes by these. The folder `output` gets comparison.json (all trials, written after each, and
    the figures) and, at the end, comparison.html to look at. Called again, the trials that it has are not run again,
    and the figures are those of this call's methods and seeds. What it can't know is whether the function has changed:
    then choose another folder. One epoch of the baseline is trained first that does not count.

    Args:
        train: trains a model from scratch by a `Trial`, and returns what its test came to: a number or several by name,
            of which the first is judged.
        methods: by name: a policy, or what to create the experiment with, such as {"policy": OrderedSGD(),
            "mini_batch_size": 128}.
        num_epochs: of each method's run.
        output: a folder, made if need be.
        seeds: differences are taken seed by seed; three at least tell anything about chance.
        baseline: what RandomSubset is here. By default an epoch of it is a quarter of the dataset.
        higher_is_better: whether the first metric is an accuracy (True) or a loss (False).
        clock: "wall", or "cpu": processor time, which other work on the machine disturbs less. Training on a GPU does
            not show in that.
        client: where the experiments are made (and deleted after it). Default: `connect()`.
        show_progress: on stderr.

    Raises:
        InvalidArgumentError: a value that can't be, or `output` has the comparison of another function.
        UsageError: `train` did not go through all epochs, or returned no finite number.
    """
    _check(methods, seeds, num_epochs, clock)
    all_methods = {BASELINE: _settings(BASELINE, baseline)}
    all_methods |= {name: _settings(name, method) for name, method in methods.items()}
    with contextlib.ExitStack() as stack:
        if client is None:
            client = stack.enter_context(connect())
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[state]}"),
                console=Console(stderr=True),
                disable=not show_progress,
            )
        )
        trials = _Trials(train, client, Path(output), clock, progress, higher_is_better=higher_is_better)
        names = list(all_methods)
        # Each seed begins with another method: what slows the first is no method's own.
        rotated = [
            (seed, [*names[turn % len(names) :], *names[: turn % len(names)]]) for turn, seed in enumerate(seeds)
        ]
        jobs = [(name, num_epochs, seed) for seed, order in rotated for name in order]
        trials.warm_up(jobs, all_methods[BASELINE])
        outcomes = trials.run("as many epochs", jobs, all_methods)
        epochs = _equal_time_epochs(outcomes, num_epochs, clock)
        jobs = [
            (BASELINE, count, seed) for seed in seeds for count in sorted(set(epochs.values())) if count != num_epochs
        ]
        outcomes += trials.run("as much time", jobs, all_methods)
        return trials.written(outcomes, epochs)


def _settings(name: str, method: Method) -> dict[str, Any]:
    settings = dict(method) if isinstance(method, Mapping) else {"policy": method}
    if not isinstance(settings.get("policy"), Policy):
        raise InvalidArgumentError(
            f"methods[{name!r}]={method!r}: expected a policy such as evosample.EvolvedSampling(), or what to create "
            'an experiment with, such as {"policy": evosample.OrderedSGD(), "mini_batch_size": 128}',
            field="methods",
        )
    for own in ("name", "num_epochs", "seed"):
        if own in settings:
            raise InvalidArgumentError(
                f"methods[{name!r}]: {own} is up to the comparison; leave it out", field="methods"
            )
    return settings


def _check(methods: Mapping[str, Method], seeds: Sequence[int], num_epochs: int, clock: Clock) -> None:
    if not methods or BASELINE in methods:
        raise InvalidArgumentError(
            f"methods={list(methods)}: expected one or more beside {BASELINE}, which always runs, as `baseline` says; "
            "give others of the kind another name",
            field="methods",
        )
    if not isinstance(seeds, Sequence) or not seeds or len(set(seeds)) < len(seeds):
        raise InvalidArgumentError(f"seeds={seeds!r}: expected one or more in a list, each once", field="seeds")
    if num_epochs < 1:
        raise InvalidArgumentError(f"num_epochs={num_epochs}: expected at least 1", field="num_epochs")
    if clock not in ("wall", "cpu"):
        raise InvalidArgumentError(f"clock={clock!r}: expected wall or cpu", field="clock")


def _equal_time_epochs(outcomes: Sequence[Outcome], num_epochs: int, clock: Clock) -> dict[str, int]:
    """For each method, for how many epochs the baseline trains in the time that the method has taken."""
    seconds: dict[str, float] = {}
    for outcome in outcomes:
        seconds[outcome.method] = seconds.get(outcome.method, 0.0) + outcome.seconds(clock)
    of_baseline = seconds.pop(BASELINE)
    # Rounded up, but for a twentieth of an epoch: so that the baseline has no noticeably less time.
    return {name: max(math.ceil(num_epochs * taken / of_baseline - 0.05), 1) for name, taken in seconds.items()}


class _Trials:
    """Runs trials that have not run yet, and keeps what they came to."""

    def __init__(
        self,
        train: Train,
        client: Client,
        output: Path,
        clock: Clock,
        progress: Progress,
        *,
        higher_is_better: bool,
    ) -> None:
        self._train = train
        self._client = client
        self._output = output
        self._clock: Clock = clock
        self._progress = progress
        self._higher_is_better = higher_is_better
        self._function = _name_of(train)
        self._kept = self._read()

    def _read(self) -> list[Outcome]:
        file = self._output / RESULTS_FILE
        try:
            found = json.loads(file.read_text())
            function, kept = found["function"], [Outcome(**outcome) for outcome in found["trials"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(
                f"{file} is damaged, or no comparison: move it away, or choose another folder", field="output"
            ) from error
        if function != self._function:
            raise InvalidArgumentError(
                f"{file} has the comparison of {function}, not of {self._function}: choose another folder",
                field="output",
            )
        return kept

    def run(
        self, title: str, jobs: Sequence[tuple[str, int, int]], methods: Mapping[str, Mapping[str, Any]]
    ) -> list[Outcome]:
        """What came of trials (method, epochs, seed), in their order; runs those that have not run yet."""
        task = self._progress.add_task(title, total=len(jobs), state="")
        outcomes = []
        for method, num_epochs, seed in jobs:
            key = (method, _shown(methods[method]), num_epochs, seed)
            outcome = next((kept for kept in self._kept if _key(kept) == key), None)
            if outcome is None:
                trial = Trial(self._client, method, methods[method], num_epochs, seed)
                outcome = self._outcome(trial, key[1])
                self._kept.append(outcome)
                self._write({"trials": [asdict(kept) for kept in self._kept]})
            outcomes.append(outcome)
            self._progress.update(task, advance=1)
        return outcomes

    def warm_up(self, jobs: Sequence[tuple[str, int, int]], settings: Mapping[str, Any]) -> None:
        """Train for an epoch that does not count, if there is anything to run: the first one is the slowest."""
        kept = {(outcome.method, outcome.num_epochs, outcome.seed) for outcome in self._kept}
        if not kept.issuperset(jobs):
            self._outcome(Trial(self._client, BASELINE, settings, 1, jobs[0][2]), "")

    def _outcome(self, trial: Trial, settings: str) -> Outcome:
        title = f"  {trial.method}, {trial.num_epochs} epochs, seed {trial.seed}"
        task = self._progress.add_task(title, total=trial.num_epochs, state="")
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(trial, task, ended), daemon=True)
        watcher.start()
        try:
            metrics = _metrics(self._train(trial))
            known = self._kept[0].metrics if self._kept else metrics
            if list(known) != list(metrics):
                raise UsageError(f"the training function has returned {list(metrics)}, and before that {list(known)}")
            if trial.experiment is None:
                raise UsageError("the training function has made no experiment: it is to call trial.create_experiment")
            while (status := trial.experiment.status()).state in ("sealed", "unplanned"):
                time.sleep(_POLL_S)  # the last epoch's losses are on their way into the scores
            if status.state != "finished":
                raise UsageError(
                    f"the training function has returned in epoch {status.epoch} of {trial.num_epochs}: it is to go "
                    "through all epochs of the trial's experiment"
                )
            if not trial.train_seconds:
                raise UsageError("nothing was timed: train within `with trial.training():`")
        except EvosampleError as error:
            error.add_note(f"in the trial of {trial.method}, {trial.num_epochs} epochs, seed {trial.seed}")
            raise
        finally:
            ended.set()
            watcher.join()
            self._progress.remove_task(task)
            if trial.experiment is not None:
                self._client.delete_experiment(trial.experiment.name, project=trial.experiment.project)
        return Outcome(
            trial.method,
            settings,
            trial.num_epochs,
            trial.seed,
            metrics,
            trial.train_seconds,
            trial.cpu_seconds,
            status.trained_rows,
        )

    def _watch(self, trial: Trial, task: Any, ended: threading.Event) -> None:
        """Show how far a trial is, until it has ended."""
        while not ended.wait(_LOOK_S):
            if trial.experiment is None:
                continue
            with contextlib.suppress(EvosampleError), contextlib.closing(trial.experiment.watch()) as looks:
                self._progress.update(task, completed=trial.num_epochs * progress_share(next(looks)))

    def written(self, outcomes: Sequence[Outcome], equal_time_epochs: Mapping[str, int]) -> Comparison:
        """The figures of all trials, in the folder's files."""
        comparison = Comparison.of(
            outcomes, equal_time_epochs, clock=self._clock, higher_is_better=self._higher_is_better
        )
        self._write({"trials": [asdict(kept) for kept in self._kept], "figures": asdict(comparison)})
        write_page(comparison, self._function, self._output / "comparison.html")
        return comparison

    def _write(self, results: Mapping[str, Any]) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        part = self._output / f"{RESULTS_FILE}.part"
        part.write_text(json.dumps({"function": self._function, **results}, indent=1) + "\n")
        part.replace(self._output / RESULTS_FILE)


def _key(outcome: Outcome) -> tuple[str, str, int, int]:
    return outcome.method, outcome.settings, outcome.num_epochs, outcome.seed


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_told(settings[name])}" for name in sorted(settings))


def _told(value: Any) -> str:
    """A setting in words that tell it from any other."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # known scores
        return f"({_shown(value._asdict())})"
    if isinstance(value, (list, np.ndarray)):
        array = np.ascontiguousarray(value)
        return f"{array.dtype} {list(array.shape)} {hashlib.sha256(array.data).hexdigest()[:16]}"
    return str(value)


def _name_of(train: Any) -> str:
    if isinstance(train, functools.partial):
        arguments = [_told(each) for each in train.args] + [_shown(train.keywords)] * bool(train.keywords)
        return f"{_name_of(train.func)}({', '.join(arguments)})"
    named = train if hasattr(train, "__qualname__") else type(train)
    return f"{named.__module__}.{named.__qualname__}"


def _metrics(returned: float | Mapping[str, float]) -> dict[str, float]:
    named = returned if isinstance(returned, Mapping) else {"metric": returned}
    try:
        metrics = {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError):
        metrics = {}
    if not metrics or not all(map(math.isfinite, metrics.values())):
        raise UsageError(
            f"the training function has returned {returned!r}: expected a finite number, or several by name (also of a "
            "training that has diverged)"
        )
    return metrics
