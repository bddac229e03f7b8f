"""Comparisons of methods: which trials run, what they come to, and what is said of it."""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evosample
from evosample.comparison import METHODS as METHODS_BY_DEFAULT
from evosample.comparison import Comparison, Difference, Outcome, Trial, compare
from evosample.comparison.page import write_page
from evosample.comparison.trials import _name_of, _shown
from support import process

METHODS: dict[str, Any] = {
    "ES": evosample.EvolvedSampling(),
    "half": {"policy": evosample.OrderedSGD(), "mini_batch_size": 8},
}


SECONDS_OF_AN_EPOCH = {"RandomSubset": 1.0, "ES": 2.4, "half": 1.0}


class Learner:
    """What stands for a training: learns numbers, and counts how often it is called."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.trials: list[tuple[str, int, int]] = []
        self.num_warm_ups = 0
        self.batch_sizes: dict[str, tuple[int, int]] = {}
        self._fails_at = fails_at

    def __call__(self, trial: Trial) -> Mapping[str, float]:
        if len(self.trials) == self._fails_at:
            raise KeyboardInterrupt
        self.num_warm_ups += trial.num_epochs == 1
        experiment = trial.create_experiment(num_samples=160, meta_batch_size=16, mini_batch_size=4)
        spec = experiment.spec
        policy = trial.policy.with_defaults(selects=spec.selects)
        assert (spec.num_epochs, spec.seed, spec.policy) == (trial.num_epochs, trial.seed, policy)
        if trial.num_epochs > 1:
            self.trials.append((trial.method, trial.num_epochs, trial.seed))
        self.batch_sizes[trial.method] = spec.meta_batch_size, spec.mini_batch_size
        known = np.zeros(160)
        with trial.training():
            for epoch in experiment.epochs():
                for batch in epoch:
                    rows = batch.select(np.exp(-known[batch.sample_ids])).positions if batch.selects else slice(None)
                    if not batch.selects:
                        batch.report(np.exp(-known[batch.sample_ids]))
                    known[batch.sample_ids[rows]] += 1
        # As if it had taken so long: what is counted from it is the same on every machine.
        trial.train_seconds = trial.num_epochs * SECONDS_OF_AN_EPOCH[trial.method]
        return {"known": float(known.mean()), "least": float(known.min())}


def of_folder(folder: Path) -> Any:
    return json.loads((folder / "comparison.json").read_text())


def test_each_method_runs_beside_random_subsets_for_as_many_epochs_and_for_as_much_time(
    client: evosample.Client, tmp_path: Path
) -> None:
    learner = Learner()
    found = compare(learner, METHODS, num_epochs=4, output=tmp_path, client=client, show_progress=False)
    kept = [Outcome(**outcome) for outcome in of_folder(tmp_path)["trials"]]
    assert [(each.method, each.num_epochs, each.seed) for each in kept] == learner.trials
    names = ("RandomSubset", "ES", "half")
    assert learner.trials[:9] == [(names[(seed + turn) % 3], 4, seed) for seed in range(3) for turn in range(3)]
    epochs = {"ES": 10, "half": 4}  # 9.6, rounded up; and as many
    assert set(learner.trials[9:]) == {("RandomSubset", 10, seed) for seed in range(3)}
    assert learner.batch_sizes == {"RandomSubset": (4, 4), "ES": (16, 4), "half": (16, 8)}
    for method in found.methods:
        of = {(each.num_epochs, each.seed): each.metrics["known"] for each in kept if each.method == "RandomSubset"}
        mine = {each.seed: each.metrics["known"] for each in kept if each.method == method.name}
        assert method.equal_time_epochs == epochs[method.name]
        for difference, beside in ((method.equal_epochs, 4), (method.equal_time, epochs[method.name])):
            assert difference is not None
            assert difference.mean == pytest.approx(np.mean([mine[seed] - of[beside, seed] for seed in range(3)]))
        assert method.metric.mean == pytest.approx(np.mean(list(mine.values())))
        assert set(method.other_metrics) == {"least"}
    spec = {"ES": (10 * 16 * 2 + 10 * 4 * 2), "half": 10 * 8 * 4}
    assert {each.method: each.num_trained for each in kept if each.method in spec} == spec
    assert not [found for found in client.list_experiments() if found.name.startswith("compare-")], (
        "trials leave no experiments behind"
    )
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<svg") == 2
    for method in found.methods:
        assert f'class="{(method.verdict or "").replace(" ", "-")}"' in page
    assert found.caveat() in page
    assert all(sentence in page for sentence in found.sentences())


def test_a_comparison_goes_on_where_it_stopped(client: evosample.Client, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_epochs": 3, "output": tmp_path, "client": client, "show_progress": False}
    first = Learner(fails_at=4)
    with pytest.raises(KeyboardInterrupt):
        compare(first, METHODS, **arguments)
    second = Learner()
    whole = compare(second, METHODS, **arguments)
    assert not set(first.trials) & set(second.trials)
    third = Learner()
    assert compare(third, METHODS, **arguments) == whole
    assert not third.trials
    assert (first.num_warm_ups, second.num_warm_ups, third.num_warm_ups) == (1, 1, 0)
    changed = METHODS | {"ES": evosample.EvolvedSampling(beta1=0.5)}
    compare(third, changed, **arguments)
    assert ("ES", 3, 0) in third.trials, "another setting is another method"
    assert ("half", 3, 0) not in third.trials

    def other(trial: Trial) -> float:
        return 0.0

    with pytest.raises(evosample.InvalidArgumentError, match=r"has the comparison of .*Learner.*, not of .*other"):
        compare(other, METHODS, **arguments)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(evosample.InvalidArgumentError, match="is damaged, or no comparison"):
        compare(third, METHODS, **arguments)


def test_a_method_that_draws_from_meta_batches_needs_them(client: evosample.Client, tmp_path: Path) -> None:
    def train(trial: Trial) -> float:
        experiment = trial.create_experiment(num_samples=80, mini_batch_size=8)
        with trial.training():
            for epoch in experiment.epochs():
                for batch in epoch:
                    batch.report(np.ones(8))
        return 0.0

    options: dict[str, Any] = {"num_epochs": 3, "output": tmp_path, "client": client, "show_progress": False}
    with pytest.raises(evosample.UsageError, match="OrderedSGD draws mini-batches from meta-batches: pass meta_batch"):
        compare(train, {"OrderedSGD": METHODS_BY_DEFAULT["OrderedSGD"]}, **options)


def outcomes(name: str, num_epochs: int, metrics: list[float], seconds: float) -> list[Outcome]:
    return [
        Outcome(name, "", num_epochs, seed, {"accuracy": metric}, seconds, seconds, 100)
        for seed, metric in enumerate(metrics)
    ]


@pytest.mark.parametrize(
    ("differences", "higher_is_better", "verdict", "said"),
    [
        ([0.02, 0.03, 0.025], True, "better", ": better."),
        ([0.02, 0.03, 0.025], False, "worse", ": not better than RandomSubset, but worse."),
        ([-0.02, -0.03, -0.025], True, "worse", ": not better than RandomSubset, but worse."),
        ([-0.02, 0.03, 0.025], True, "not better", ": not better than RandomSubset, as far as 3 seeds can tell."),
        ([0.02], True, "unknown", ". One seed says nothing of chance: take three or more."),
        (
            [0.25] * 3,
            True,
            "unknown",
            " with every seed, which says nothing of chance: does the function go by it?",
        ),
    ],
)
def test_the_verdict_goes_by_the_interval_at_equal_time(
    differences: list[float], higher_is_better: bool, verdict: str, said: str
) -> None:
    baseline = [0.75, 0.5, 0.25][: len(differences)]
    metrics = [before + difference for before, difference in zip(baseline, differences, strict=True)]
    found = Comparison.of(
        [
            *outcomes("RandomSubset", 4, [0.1] * len(differences), 1.0),
            *outcomes("M", 4, metrics, 2.0),
            *outcomes("RandomSubset", 8, baseline, 2.0),
        ],
        {"M": 8},
        clock="wall",
        higher_is_better=higher_is_better,
    )
    (method,) = found.methods
    assert method.verdict == verdict
    (sentence,) = found.sentences()
    assert sentence.startswith(
        "M against RandomSubset for as much training time (8 epochs, 2 s against 2 s): accuracy "
    )
    assert sentence.endswith(said)
    if len(set(differences)) == 3:
        assert method.equal_time is not None
        assert method.equal_time.interval is not None
        half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)  # Student's t, two degrees of freedom
        low, high = method.equal_time.interval
        assert (low, high) == pytest.approx((np.mean(differences) - half, np.mean(differences) + half))


def test_trials_of_other_settings_are_other_trials() -> None:
    arrays = [np.zeros(5_000), np.ones(5_000), np.zeros(5_000, np.int8), np.zeros(4_999)]
    told = {_shown({"policy": evosample.UCB(), "groups": array}) for array in arrays}
    assert len(told) == 4
    scores = [evosample.ExportedScores(0, array, array, array) for array in arrays[:2]]  # type: ignore[arg-type]
    assert len({_shown({"initial_scores": each}) for each in scores}) == 2
    partials = [functools.partial(_shown, settings={"a": 1}), functools.partial(_shown, settings={"a": 2}), _shown]
    assert len({_name_of(each) for each in partials}) == 3


def test_what_looks_like_a_formula_is_shown_as_it_is(tmp_path: Path) -> None:
    found = Comparison.of(
        outcomes("RandomSubset", 4, [0.1, 0.2], 1.0) + outcomes(r"$\frac$ <b>", 4, [0.3, 0.2], 1.0),
        {r"$\frac$ <b>": 4},
        clock="wall",
        higher_is_better=True,
    )
    write_page(found, "<script>", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "<b>" not in page


def test_one_seed_has_no_interval() -> None:
    assert Difference.of([0.5]) == Difference(0.5, None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": []}, "one or more in a list, each once"),
        ({"seeds": [1, 1]}, "one or more in a list, each once"),
        ({"seeds": 3}, "seeds=3: expected one or more in a list, each once"),
        ({"num_epochs": 0}, "at least 1"),
        ({"clock": "sun"}, "expected wall or cpu"),
        ({"methods": {}}, "expected one or more beside RandomSubset"),
        ({"methods": {"RandomSubset": evosample.RandomSubset(prune_ratio=0.5)}}, "which always runs, as `baseline`"),
        ({"methods": {"x": "ES"}}, "expected a policy such as"),
        ({"methods": {"x": {"mini_batch_size": 8}}}, "expected a policy such as"),
        ({"methods": {"x": {"policy": evosample.Uniform(), "seed": 1}}}, "seed is up to the comparison"),
    ],
)
def test_what_can_t_be_compared_is_refused(
    client: evosample.Client, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    arguments: dict[str, Any] = {"methods": METHODS, "num_epochs": 3, "output": tmp_path, "client": client} | changed
    with pytest.raises(evosample.InvalidArgumentError, match=said):
        compare(Learner(), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1.0", "has made no experiment"),
        ("make(); return 1.0", "has returned in epoch 0 of"),
        ("go(make()); return 1.0", "nothing was timed"),
        ("timed(make()); return float('nan')", "returned nan: expected a finite number"),
        ("timed(make()); return None", "returned None: expected a finite number"),
        ("make(); make()", "has one experiment"),
        ("make(seed=1)", "seed: up to the trial"),
        ("timed(make()); return {trial.method: 1.0}", "has returned ..ES.., and before that ..RandomSubset"),
    ],
)
def test_a_function_that_is_no_training_is_told_so(
    client: evosample.Client, tmp_path: Path, body: str, said: str
) -> None:
    def train(trial: Trial) -> Any:
        def make(**settings: Any) -> evosample.Experiment:
            return trial.create_experiment(num_samples=8, meta_batch_size=4, mini_batch_size=2, **settings)

        def go(experiment: evosample.Experiment) -> None:
            for epoch in experiment.epochs():
                for batch in epoch:
                    batch.report(np.ones(len(batch.sample_ids)))

        def timed(experiment: evosample.Experiment) -> None:
            with trial.training():
                go(experiment)

        scope: dict[str, Any] = {"trial": trial, "make": make, "go": go, "timed": timed}
        exec(f"def function():\n {body}", scope)
        return scope["function"]()

    with pytest.raises(evosample.UsageError, match=said):
        compare(
            train,
            {"ES": evosample.EvolvedSampling()},
            num_epochs=3,
            output=tmp_path,
            seeds=[0],
            client=client,
            show_progress=False,
        )
    assert not [found for found in client.list_experiments() if found.name.startswith("compare-")]


def test_the_command_compares_a_function_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import numpy as np

            def train(trial):
                experiment = trial.create_experiment(num_samples=80, meta_batch_size=16, mini_batch_size=8)
                with trial.training():
                    for epoch in experiment.epochs():
                        for batch in epoch:
                            batch.report(np.ones(len(batch.sample_ids)))
                return {"accuracy": trial.seed}

            number = 1
            """
        )
    )
    for other in ("json.py", "my.train.py"):
        (tmp_path / other).write_text("def train(trial): ...")
    where = f"{tmp_path}/mine.py"
    output = tmp_path / "out"
    options = ["--epochs=3", f"--output={output}", "--seeds=2"]
    policies = ["--policy=ucb,prune_ratio=0.2", "--policy=info-batch"]
    code, out, said = process("compare", f"{where}:train", *options, *policies)
    assert code == 0, said
    assert "info-batch against RandomSubset for as much training time" in " ".join(out.split())
    assert {trial["method"] for trial in of_folder(output)["trials"]} == {
        "RandomSubset",
        "ucb,prune_ratio=0.2",
        "info-batch",
    }
    code, out, said = process("compare", f"{where}:train", *options, *policies, "--json")
    assert code == 0, said
    assert json.loads(out)["metric"] == "accuracy"
    for function, expected in [
        (f"{where}:no_such", "there is no such function in mine"),
        (f"{where}:number", "there is no such function in mine"),
        (f"{tmp_path}/no.py:train", "there is no file"),
        (f"{tmp_path}/json.py:train", "json.py has the name of another module"),
        (f"{tmp_path}/my.train.py:train", "my.train.py can't be imported"),
        ("no.such.module:train", "there is no module no.such.module"),
        ("train", "expected FILE.py:FUNCTION"),
    ]:
        code, _, said = process("compare", function, *options)
        assert code == 2
        assert expected in said
    code, _, said = process("compare", f"{where}:train", *options, "--policy=best")
    assert code == 2
    assert "there is no policy 'best'" in said


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "scipy.py").write_text("raise ModuleNotFoundError('No module named scipy', name='scipy')")
    paths = [str(tmp_path), *filter(None, sys.path)]
    code, _, said = process("compare", "x:y", "--epochs=1", f"--output={tmp_path}/out", PYTHONPATH=":".join(paths))
    assert code == 1
    assert "scipy is not installed: pip install 'evosample[compare]'" in said
