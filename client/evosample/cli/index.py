"""The command that indexes WebDataset shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from evosample import EvosampleError, InvalidArgumentError
from evosample.cli.options import console

app = typer.Typer()


@app.command()
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
    header: Annotated[
        list[str] | None, typer.Option(help="Sent to HTTP servers: 'Authorization: Bearer ...'. May be repeated.")
    ] = None,
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

    headers = {}
    for each in header or []:
        field, colon, value = each.partition(":")
        if not colon:
            raise InvalidArgumentError(f"--header={each!r}: expected 'NAME: VALUE'")
        headers[field.strip()] = value.strip()
    try:
        urls = [url for pattern in shards for url in expand_urls(pattern)]
    except ValueError as error:  # unbalanced braces
        raise InvalidArgumentError(str(error)) from error
    with Progress(
        *Progress.get_default_columns(), "{task.completed} of {task.total} shards", console=console()
    ) as progress:
        task = progress.add_task("indexing", total=len(urls))

        def show(shard: IndexedShard) -> None:
            if shard.outcome == "mended":
                progress.console.print(f"the index {shard.path} was damaged; it is made anew")
            progress.advance(task)

        indexed = index_shards(urls, output, force=force, headers=headers, on_shard=show)
    num_kept = sum(shard.outcome == "kept" for shard in indexed)
    num_samples = sum(shard.num_samples for shard in indexed)
    typer.echo(f"{num_samples:,} samples in {len(indexed):,} shards; {num_kept:,} indexes were up to date")
