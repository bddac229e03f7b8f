"""Commands for what has become of each sample: export, import, inspect."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from evosample import Client, EvosampleError, ExportedScores, InvalidArgumentError
from evosample.cli.options import AsJson, Name, Project, console, echo_json, with_client

app = typer.Typer()

_OWN = "policy."  # before the names of columns that only some policies keep


# What fits a terminal of 80 columns; --json and files have all.
_SHOWN = {
    "scores": "score",
    "last_losses": "last loss",
    "num_visits": "visits",
    "staleness": "ago",
    "num_chosen": "chosen",
    "chosen_staleness": "ago",
    "groups": "group",
}


def _cell(value: Any) -> str:
    return str(value) if np.issubdtype(type(value), np.integer) else f"{value:.4g}"


def _columns(exported: ExportedScores) -> dict[str, NDArray[Any]]:
    """All columns by the names that they have in files."""
    named = exported._asdict()
    own = named.pop("columns")
    del named["epoch"]
    return {name: values for name, values in named.items() if values is not None} | {
        f"{_OWN}{name}": values for name, values in own.items()
    }


@app.command()
@with_client
def export(
    client: Client,
    name: Name,
    output: Annotated[Path, typer.Argument(help="The file to write: NumPy's .npz or, if its name ends so, .parquet.")],
    epoch: Annotated[int | None, typer.Option(help="At the start of which epoch. Default: the latest.")] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Write what is known of each sample to a file, by sample id.

    Columns: scores, sampling_weights, last_losses; num_visits and staleness
    (how often it had a finite loss, and how many epochs have ended since),
    num_chosen and chosen_staleness (the same of being back-propagated);
    groups, if there are any; and policy.NAME, what only this policy keeps.
    """
    exported = client.get_experiment(name, project=project).export_scores(epoch=epoch)
    try:
        if output.suffix not in (".npz", ".parquet"):
            raise InvalidArgumentError(f"{output}: expected a name that ends with .npz or .parquet", field="output")
        if output.suffix == ".parquet":
            _write_parquet(output, exported)
        else:
            with output.open("wb") as file:
                np.savez(file, **{"epoch": np.array(exported.epoch), **_columns(exported)})  # type: ignore[arg-type]
    except OSError as error:
        raise EvosampleError(f"can't write {output}: {error.strerror or error}") from error
    if as_json:
        echo_json({"file": str(output), "num_samples": len(exported.scores), "epoch": exported.epoch})
        return
    typer.echo(f"{output}: {len(exported.scores):,} samples at the start of epoch {exported.epoch}")


def _write_parquet(output: Path, exported: ExportedScores) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise EvosampleError("pyarrow is not installed: pip install 'evosample[parquet]', or write .npz") from error
    columns = {"sample_id": np.arange(len(exported.scores)), **_columns(exported)}
    table = pyarrow.table(columns).replace_schema_metadata({"evosample.epoch": str(exported.epoch)})
    parquet.write_table(table, output)


@app.command("import")
@with_client
def import_scores(
    client: Client,
    name: Name,
    file: Annotated[Path, typer.Argument(help="An .npz file as `evosample export` writes it; scores suffices.")],
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Start an experiment from the scores in a NumPy file, before its first run joins."""
    if file.suffix == ".parquet":
        raise InvalidArgumentError(f"{file}: Parquet is for analysis; import what was exported as .npz", field="file")
    experiment = client.get_experiment(name, project=project)
    own = {f"{_OWN}{column}": column for column in experiment.spec.policy.columns}
    try:
        with file.open("rb") as opened, np.load(opened) as columns:  # numpy leaves open what it can't read
            wanted = ("scores", "sampling_weights", "num_visits", *own)
            found = {field: columns[field] for field in wanted if field in columns}
    except OSError as error:
        raise InvalidArgumentError(f"can't read {file}: {error.strerror}") from error
    except (EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # or a .npy file
        raise InvalidArgumentError(
            f"{file} is no .npz file, or is damaged: expected what `evosample export` writes"
        ) from error
    if "scores" not in found:
        raise InvalidArgumentError(f"{file} has no array `scores`: expected what `evosample export` writes")
    of_policy = {column: found.pop(field) for field, column in own.items() if field in found}
    experiment.import_scores(found.pop("scores"), columns=of_policy, **found)
    if as_json:
        echo_json(experiment.status())
        return
    typer.echo(f"{experiment.project}/{name} starts from the scores in {file}")


@app.command()
@with_client
def inspect(
    client: Client,
    name: Name,
    top: Annotated[int, typer.Option(help="How many samples of each kind to show.", min=1)] = 10,
    epoch: Annotated[int | None, typer.Option(help="At the start of which epoch. Default: the latest.")] = None,
    project: Project = None,
    as_json: AsJson = False,
) -> None:
    """Show the samples of the highest scores, those without a loss so far, and those that had none for longest.

    The hardest samples are often wrongly labelled ones: look at them. What is
    not shown here `evosample export` writes to a file.
    """
    exported = client.get_experiment(name, project=project).export_scores(epoch=epoch)
    assert exported.staleness is not None
    visited = exported.num_visits > 0
    stale = np.flatnonzero(visited & (exported.staleness > 0))
    never = np.flatnonzero(~visited)
    kinds = {
        "hardest": np.argsort(-exported.scores, kind="stable"),
        "never_visited": never,
        "most_stale": stale[np.argsort(-exported.staleness[stale].astype(int), kind="stable")],
    }
    counts = {"hardest": len(exported.scores), "never_visited": len(never), "most_stale": len(stale)}
    columns = _columns(exported)
    if as_json:
        columns = {"sample_id": np.arange(len(exported.scores)), **columns}
        shown = {
            kind: [{column: values[i].item() for column, values in columns.items()} for i in ids[:top]]
            for kind, ids in kinds.items()
        }
        echo_json({"epoch": exported.epoch, "counts": counts, **shown})
        return
    typer.echo(f"{name}, at the start of epoch {exported.epoch}")
    titles = {
        "hardest": "hardest: the highest scores",
        "never_visited": f"never visited: {counts['never_visited']:,} without a finite loss so far",
        "most_stale": f"most stale: of {counts['most_stale']:,} without a loss in the last epoch",
    }
    for kind, ids in kinds.items():
        table = Table("sample", *_SHOWN.values(), title=titles[kind], title_justify="left")
        for i in ids[:top]:
            table.add_row(str(i), *(_cell(columns[column][i]) for column in _SHOWN if column in columns))
        console().print(table)
