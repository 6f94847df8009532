"""merge, and merges: list, show, download, delete."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.connect import Json, Key, Tenant, Url, complete_adapters, talks
from service.commands.inference import weighted
from service.commands.output import facts, line, merging, note, size, table, transfer, write_json

if TYPE_CHECKING:
    from service.client import Loraplex, Merge

app = typer.Typer(rich_markup_mode=None)


class Into(enum.StrEnum):
    adapter = "adapter"
    checkpoint = "checkpoint"


class Majority(enum.StrEnum):
    total = "total"
    frequency = "frequency"


Id = Annotated[str, typer.Argument(metavar="ID", help="The merge.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")]


@app.command()
@talks
def merge(
    client: Loraplex,
    name: Annotated[str, typer.Argument(help="What the result is called.", show_default=False)],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE[=WEIGHT]...",
            autocompletion=complete_adapters,
            show_default=False,
            help="NAME, NAME@3 or NAME@ALIAS; weight 1 unless given, negative ones too.",
        ),
    ],
    method: Annotated[str, typer.Option(help="linear, cat, svd, ties, dare_linear, ... as in PEFT.")] = "linear",
    into: Annotated[
        Into, typer.Option(help="A new adapter, or the base model with the adapters in it.")
    ] = Into.adapter,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --into checkpoint: download it there.", show_default=False)
    ] = None,
    force: Force = False,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="For ties, dare, magnitude_prune.", show_default=False)
    ] = None,
    majority_sign_method: Annotated[Majority | None, typer.Option(help="For ties.", show_default=False)] = None,
    svd_rank: Annotated[int | None, typer.Option(min=1, help="For svd.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="For dare.", show_default=False)] = None,
    description: Annotated[str | None, typer.Option(help="Of the new adapter.", show_default=False)] = None,
    max_shard_bytes: Annotated[int | None, typer.Option(min=1, help="For checkpoints.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option(help="Until it is done. --no-wait prints its id.")] = True,
    json: Json = False,
) -> None:
    """Merge adapters into a new one, or into the base model."""
    if output is not None and (into is Into.adapter or not wait):
        raise typer.BadParameter("goes with --into checkpoint and without --no-wait", param_hint="--output")
    job = client.merges.create(
        name, weighted(sources, "SOURCE"), method=method, into=into.value, density=density,
        majority_sign_method=None if majority_sign_method is None else majority_sign_method.value, svd_rank=svd_rank,
        seed=seed, description=description, max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    if wait:
        job = _wait(client, job)
    paths = _download(client, job.id, output, force) if output is not None else []
    if json:
        write_json(dict(job.raw))
    elif not wait:
        line(job.id)
    elif paths:
        for path in paths:
            line(str(path))
    elif job.into == "checkpoint":
        total = size(sum(file.bytes for file in job.files or ()))
        line(f"{job.id}  {job.name}: {total} in {len(job.files or ())} files; `loraplex merges download {job.id} DIR`")
    else:
        line(f"{job.adapter}  merged")


def _wait(client: Loraplex, job: Merge) -> Merge:
    try:
        with merging() as progress:
            return client.merges.wait(job.id, progress=progress)
    except KeyboardInterrupt:
        note(f"the merge goes on; `loraplex merges delete {job.id}` cancels it")
        raise


def _download(client: Loraplex, id: str, folder: Path, force: bool) -> list[Path]:
    with transfer(f"downloading {id}") as progress:
        return client.merges.download(id, folder, overwrite=force, progress=progress)


merges = typer.Typer(rich_markup_mode=None)
app.add_typer(merges, name="merges")


@talks
def _list(client: Loraplex, json: Json = False) -> None:
    jobs = client.merges.list()
    if json:
        write_json([dict(job.raw) for job in jobs])
        return
    table(("id", "name", "state", "done", "into", "method", "sources"), _rows(jobs))


@merges.callback(invoke_without_command=True)
def list_(ctx: typer.Context, json: Json = False, url: Url = None, key: Key = None, tenant: Tenant = None) -> None:
    """List the merges; or, by a command, show, download or delete one."""
    if ctx.invoked_subcommand is None:
        _list(ctx, url=url, key=key, tenant=tenant, json=json)


@merges.command()
@talks
def show(client: Loraplex, id: Id, json: Json = False) -> None:
    """Show a merge."""
    job = client.merges.get(id)
    if json:
        write_json(dict(job.raw))
        return
    facts(
        {
            "id": job.id,
            "name": job.name,
            "into": job.into,
            "method": job.method,
            "sources": _sources(job),
            "state": job.state,
            "progress": f"{job.progress:.0%}",
            "phase": job.phase,
            "error": job.error,
            "adapter": job.adapter,
        }
    )
    for file in job.files or ():
        line(f"file: {file.name}  {size(file.bytes)}")


@merges.command()
@talks
def download(
    client: Loraplex,
    id: Id,
    folder: Annotated[Path, typer.Argument(help="Where to.", show_default=False)],
    force: Force = False,
) -> None:
    """Download a merged checkpoint (a Hugging Face folder). Files that were cut are completed."""
    for path in _download(client, id, folder, force):
        line(str(path))


@merges.command()
@talks
def delete(client: Loraplex, id: Id) -> None:
    """Cancel a merge that is not done; of one that is, delete its record and its files. Its adapter stays."""
    cancelled = client.merges.delete(id)
    line(f"{id}  {'deleted' if cancelled is None else cancelled.state}")


def _rows(jobs: Iterator[Merge]) -> Iterator[tuple[str, ...]]:
    for job in jobs:
        yield job.id, job.name, job.state, f"{job.progress:.0%}", job.into, job.method, _sources(job)


def _sources(job: Merge) -> str:
    return ", ".join(
        f"{source.adapter}{'' if source.version is None else f'@{source.version}'}={source.weight:g}"
        for source in job.sources
    )
