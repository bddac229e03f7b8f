"""The `evosample` command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from evosample import Client, EvosampleError, ExperimentStatus, connect
from evosample.wire import DEFAULT_PROJECT

_app = typer.Typer(
    help="Look at the experiments of a selection server (start one with `evosample-server`), and index datasets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_Address = Annotated[
    str, typer.Option(envvar="EVOSAMPLE_ADDRESS", help="The server: HOST:PORT or unix:/PATH; or several, with commas.")
]
_Project = Annotated[str, typer.Option(envvar="EVOSAMPLE_PROJECT", help="The project that the experiment belongs to.")]
_Name = Annotated[str, typer.Argument(help="The experiment's name.")]
_DEFAULT_ADDRESS = "127.0.0.1:50051"


def main() -> None:
    """Run the command; errors go to stderr, with exit code 1."""
    try:
        _app()
    except EvosampleError as error:
        Console(stderr=True).print(f"[red]evosample:[/red] {error}", highlight=False)
        raise SystemExit(1) from None


def _connect(address: str) -> Client:
    return connect(address, connect_timeout_s=3)


@_app.command("list")
def list_experiments(address: _Address = _DEFAULT_ADDRESS, project: _Project = DEFAULT_PROJECT) -> None:
    """List a project's experiments and where they stand."""
    with _connect(address) as client:
        table = Table("name", "state", "epoch", "samples", "policy")
        for status in client.list_experiments(project=project):
            spec = status.spec
            epoch = f"{status.epoch} of {spec.num_epochs}"
            table.add_row(status.name, status.state, epoch, f"{spec.num_samples:,}", str(spec.policy))
    Console().print(table)


@_app.command()
def show(name: _Name, address: _Address = _DEFAULT_ADDRESS, project: _Project = DEFAULT_PROJECT) -> None:
    """Show all that is known of an experiment."""
    with _connect(address) as client:
        status = client.get_experiment(name, project=project).status()
    table = Table(show_header=False)
    for field, value in _shown(status).items():
        table.add_row(field, value)
    Console().print(table)


def _shown(status: ExperimentStatus) -> dict[str, str]:
    spec = status.spec
    missing = sorted(set(range(status.world_size)) - set(status.finished_ranks))
    shown = {
        "experiment": f"{status.project}/{status.name}",
        "uid": status.uid,
        "created": f"{status.create_time:%Y-%m-%d %H:%M:%S} UTC",
        "state": status.state,
        "epoch": f"{status.epoch} of {spec.num_epochs}",
        "samples": f"{spec.num_samples:,}",
        "meta-batch, mini-batch": f"{spec.meta_batch_size:,}, {spec.mini_batch_size:,}",
        "policy": str(spec.policy),
        "importance weight": spec.importance_weight,
        "seed": str(spec.seed),
        "run": f"{status.generation}, with {status.world_size} ranks" if status.generation else "none yet",
        "losses": f"{status.visited_rows:,} learned from, {status.non_finite_rows:,} not finite, "
        f"{status.unreported_rows:,} not reported",
    }
    if status.state == "open" and status.generation:
        shown["ranks still in this epoch"] = _listed(missing)
    shown["can go back to epochs"] = ", ".join(map(str, status.retained_epochs))
    if status.pins:
        shown["pins"] = ", ".join(f"{pin}: epoch {epoch}" for pin, epoch in status.pins.items())
    return shown


@_app.command()
def export(
    name: _Name,
    output: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    address: _Address = _DEFAULT_ADDRESS,
    project: _Project = DEFAULT_PROJECT,
) -> None:
    """Write an experiment's scores to a NumPy file: scores, sampling_weights and num_visits, by sample id."""
    with _connect(address) as client:
        exported = client.get_experiment(name, project=project).export_scores()
    try:
        with output.open("wb") as file:  # a name that numpy were given would grow an ending
            np.savez(file, **exported._asdict())
    except OSError as error:
        raise EvosampleError(f"can't write {output}: {error.strerror}") from error
    typer.echo(f"{output}: scores of {len(exported.scores):,} samples at the start of epoch {exported.epoch}")


@_app.command("import")
def import_scores(
    name: _Name,
    file: Annotated[Path, typer.Argument(help="An .npz file as `evosample export` writes it; scores suffices.")],
    address: _Address = _DEFAULT_ADDRESS,
    project: _Project = DEFAULT_PROJECT,
) -> None:
    """Start an experiment from the scores in a NumPy file, before its first run joins."""
    try:
        with np.load(file) as columns:
            found = {
                field: columns[field] for field in ("scores", "sampling_weights", "num_visits") if field in columns
            }
    except OSError as error:
        raise EvosampleError(f"can't read {file}: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise EvosampleError(f"{file} is no .npz file: expected what `evosample export` writes") from error
    if "scores" not in found:
        raise EvosampleError(f"{file} has no array `scores`: expected what `evosample export` writes")
    with _connect(address) as client:
        client.get_experiment(name, project=project).import_scores(found.pop("scores"), **found)
    typer.echo(f"{project}/{name} starts from the scores in {file}")


@_app.command()
def finish_epoch(
    name: _Name,
    address: _Address = _DEFAULT_ADDRESS,
    project: _Project = DEFAULT_PROJECT,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """End the current epoch without the ranks that have yet to finish it. What they have reported counts."""
    with _connect(address) as client:
        experiment = client.get_experiment(name, project=project)
        status = experiment.status()
        if status.state == "finished":
            raise EvosampleError(f"{project}/{name} has finished: there is no epoch to end")
        missing = sorted(set(range(status.world_size)) - set(status.finished_ranks))
        if not yes:
            question = f"End epoch {status.epoch} of {project}/{name} without the ranks {_listed(missing)}?"
            typer.confirm(question, abort=True)
        skipped = experiment.force_finish(status.epoch)
    typer.echo(f"epoch {status.epoch} of {project}/{name} has ended without the ranks {_listed(skipped)}")


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks)) or "(none is missing)"


@_app.command()
def delete(
    name: _Name,
    address: _Address = _DEFAULT_ADDRESS,
    project: _Project = DEFAULT_PROJECT,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Delete an experiment with its scores."""
    with _connect(address) as client:
        client.get_experiment(name, project=project)  # before the question: there may be nothing to delete
        if not yes:
            typer.confirm(f"Delete experiment {project}/{name} with all its scores?", abort=True)
        client.delete_experiment(name, project=project)
    typer.echo(f"deleted {project}/{name}")


@_app.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Tar files as webdataset takes them: paths, http(s):// or pipe: URLs, 'train-{000..029}.tar'."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where the indexes go. Default: beside the shards; remote ones need it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Index shards again whose index is there and fits.")] = False,
) -> None:
    """Note where each sample of WebDataset shards lies, so that evosample.webdataset can read it by its id.

    Every shard is read once and gets an index, SHARD.idx.npy, of 20 bytes
    and a key for each sample. The shards stay as they are. What is up to
    date is left alone, so repeat the command when shards were added; several
    may run at once on different shards.

    Examples:

        evosample index 'data/train-{000..029}.tar'

        evosample index 'https://host/train-{000..029}.tar' --output indexes

        evosample index 'pipe:aws s3 cp s3://bucket/000.tar -' --output indexes
    """
    try:
        from webdataset.shardlists import expand_urls  # not everyone has these, and they take seconds

        from evosample.webdataset import IndexedShard, index_shards
    except ModuleNotFoundError as error:
        raise EvosampleError(f"{error}: install it with pip install 'evosample[webdataset]'") from error

    urls = [url for pattern in shards for url in expand_urls(pattern)]
    with Progress(*Progress.get_default_columns(), "{task.completed} of {task.total} shards") as progress:
        task = progress.add_task("indexing", total=len(urls))

        def show(shard: IndexedShard) -> None:
            if shard.outcome == "mended":
                progress.console.print(f"the index {shard.path} was damaged; it is made anew", highlight=False)
            progress.advance(task)

        indexed = index_shards(urls, output, force=force, on_shard=show)
    num_kept = sum(shard.outcome == "kept" for shard in indexed)
    num_samples = sum(shard.num_samples for shard in indexed)
    typer.echo(f"{num_samples:,} samples in {len(indexed):,} shards; {num_kept:,} indexes were up to date")
