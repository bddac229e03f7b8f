"""The command that compares selection methods."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from evosample import EvosampleError, InvalidArgumentError, RandomSubset
from evosample.cli.options import console, echo_json
from evosample.cli.policies import POLICY_HELP, policy_of
from evosample.sampling import InvalidValue

if TYPE_CHECKING:
    from evosample.comparison import Comparison, MethodFigures
    from evosample.comparison.trials import Train

app = typer.Typer()


@app.command()
def compare(
    function: Annotated[
        str,
        typer.Argument(
            help="What trains and tests a model: FILE.py:FUNCTION or MODULE:FUNCTION. It takes an "
            "evosample.comparison.Trial; see examples/mnist/compare.py."
        ),
    ],
    epochs: Annotated[int, typer.Option(help="Epochs of each method's run.", min=1)],
    output: Annotated[Path, typer.Option(help="A folder for the figures; made if need be.", file_okay=False)],
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"{POLICY_HELP} May be repeated. Default: all that need nothing but losses."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method, with the seeds 0, 1, ...", min=1)] = 3,
    baseline_prune_ratio: Annotated[
        float, typer.Option(help="Share of the dataset that an epoch of RandomSubset leaves out.", min=0, max=1)
    ] = RandomSubset().prune_ratio,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="The metric is a loss.")] = False,
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(
            help="What training time is: by the clock, or processor time, which other work disturbs less. Training on "
            "a GPU does not show in that."
        ),
    ] = "wall",
    as_json: Annotated[bool, typer.Option("--json", help="For programs: the figures as a line of JSON.")] = False,
) -> None:
    """Compare selection methods on your own training function.

    Each method is set beside RandomSubset, which needs no scoring pass: for
    as many epochs, and for as much training time as the method took. The
    folder gets comparison.json and comparison.html. Called again it goes on
    where it stopped.

    A private server runs meanwhile, or the one of EVOSAMPLE_ADDRESS is used.
    """
    try:
        from evosample import comparison
    except ImportError as error:
        raise EvosampleError(f"{error.name} is not installed: pip install 'evosample[compare]'") from error
    methods = comparison.METHODS if policy is None else {text: policy_of(text) for text in policy}
    try:
        baseline = RandomSubset(prune_ratio=baseline_prune_ratio)
    except InvalidValue as error:
        raise InvalidArgumentError(f"--baseline-prune-ratio: {error}", field="baseline_prune_ratio") from error
    try:
        found = comparison.compare(
            _function(function),
            methods,
            num_epochs=epochs,
            output=output,
            seeds=range(seeds),
            baseline=baseline,
            higher_is_better=not lower_is_better,
            clock=clock,
        )
    except KeyboardInterrupt:
        console(stderr=True).print(f"Stopped. What has run is kept in {output}: call it again to go on.")
        raise
    if as_json:
        echo_json(dataclasses.asdict(found))
        return
    terminal = console()
    terminal.print(_table(found))
    for sentence in (*found.sentences(), found.caveat()):
        terminal.print(sentence)
    terminal.print(f"The figures are in {output / comparison.RESULTS_FILE}, plots in {output / 'comparison.html'}.")


def _function(name: str) -> Train:
    """The training function, imported as running its file would have it."""
    place, _, attribute = name.rpartition(":")
    path = Path(place)
    if path.suffix == ".py":
        if not path.is_file():
            raise InvalidArgumentError(f"{name}: there is no file {place}", field="function")
        if not path.stem.isidentifier():
            raise InvalidArgumentError(f"{name}: {path.name} can't be imported: give it a name like my_training.py")
        sys.path.insert(0, str(path.resolve().parent))
        place = path.stem
    else:
        sys.path.insert(0, "")
    expected = "expected FILE.py:FUNCTION or MODULE:FUNCTION"
    if not place or not attribute:
        raise InvalidArgumentError(f"{name}: {expected}", field="function")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name not in (place, place.partition(".")[0]):
            raise
        raise InvalidArgumentError(f"{name}: there is no module {place}; {expected}", field="function") from error
    if path.suffix == ".py" and Path(module.__file__ or "").resolve() != path.resolve():
        raise InvalidArgumentError(
            f"{name}: {path.name} has the name of another module, {module.__name__}: call it something else",
            field="function",
        )
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        raise InvalidArgumentError(f"{name}: there is no such function in {place}; {expected}", field="function")
    return found  # type: ignore[no-any-return]


def _table(found: Comparison) -> Table:
    table = Table(
        "method", "epochs", found.metric, "seconds", "back-propagated", "for as many epochs", "for as much time"
    )
    for figures in (*found.baselines, *found.methods):
        table.add_row(*_row(figures))
    return table


def _row(figures: MethodFigures) -> tuple[str, ...]:
    equal_time = "" if figures.equal_time is None else f"{figures.equal_time} ({figures.equal_time_epochs})"
    return (
        figures.name,
        str(figures.num_epochs),
        str(figures.metric),
        f"{figures.seconds.mean:.1f}",
        f"{figures.num_trained.mean:,.0f}",
        str(figures.equal_epochs or ""),
        equal_time,
    )
