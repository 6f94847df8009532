"""upload, list, show, share, download, delete, load, unload."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.connect import Json, complete_adapters, talks
from service.commands.output import facts, line, moment, size, table, transfer, write_json

if TYPE_CHECKING:
    from service.client import Adapter, Loraplex

app = typer.Typer(rich_markup_mode=None)


def _whole(name: str) -> str:
    if "@" in name:
        raise typer.BadParameter(f"{name!r} names a version, this takes an adapter's name alone")
    return name


def _versioned(adapter: str) -> str:
    if adapter.endswith("@"):
        raise typer.BadParameter(f"{adapter!r} has no version behind its @")
    return adapter


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The adapter.", autocompletion=complete_adapters, show_default=False, callback=_whole
    ),
]
Versioned = Annotated[
    str,
    typer.Argument(
        metavar="NAME[@VERSION]", help="The adapter; a version's number or alias.", autocompletion=complete_adapters,
        show_default=False, callback=_versioned,
    ),
]  # fmt: skip


@app.command()
@talks
def upload(
    client: Loraplex,
    name: Name,
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote.", show_default=False)],
    description: Annotated[str | None, typer.Option(help="What it is for.", show_default=False)] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be given again.")] = None,
    default: Annotated[bool, typer.Option(help="Whether NAME means the new version from now on.")] = True,
    create: Annotated[bool, typer.Option("--create", help="Only as a new adapter, not as a version of one.")] = False,
    json: Json = False,
) -> None:
    """Upload an adapter, or a new version of one."""
    labels = None if label is None else dict(_label(text) for text in label)
    if create and not default:
        raise typer.BadParameter("a new adapter's version is its default one", param_hint="--no-default with --create")
    with transfer(f"uploading {name}", "checking") as progress:
        if create:
            done = client.adapters.create(name, folder, description=description, labels=labels, progress=progress)
        else:
            done = client.adapters.upload(
                name,
                folder,
                description=description,
                labels=labels,
                progress=progress,
                default=None if default else False,
            )
    if json:
        write_json(done.raw)
        return
    spec = done.adapter.spec
    what = (
        f"rank {spec.rank}, {size(spec.bytes)}" if done.adapter.default_version == done.version else "not the default"
    )
    line(f"{done.id}  {'uploaded' if done.created else 'unchanged, the server has it already'} ({what})")


def _label(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
    return key, value


@app.command("list")
@talks
def list_(
    client: Loraplex,
    label: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]", help="Only those.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """List the adapters. Piped: name, default version, versions, rank, bytes, residency, state, description."""
    adapters = client.adapters.list(label=label)
    if json:
        write_json([dict(adapter.raw) for adapter in adapters])
        return
    head = ("name", "default", "versions", "rank", "size", "where", "state", "description")
    table(head, _rows(adapters))


def _rows(adapters: Iterator[Adapter]) -> Iterator[tuple[str, ...]]:
    human = sys.stdout.isatty()
    for adapter in adapters:
        spec = adapter.spec
        nbytes = size(spec.bytes) if human else str(spec.bytes)
        yield (
            adapter.id or adapter.name, str(adapter.default_version), str(len(adapter.versions)), str(spec.rank),
            nbytes, adapter.residency or "", adapter.state or "", adapter.description,
        )  # fmt: skip


@app.command()
@talks
def show(client: Loraplex, adapter: Versioned, json: Json = False) -> None:
    """Show an adapter, or one version of it."""
    if "@" in adapter:
        version = client.adapters.version(adapter)
        if json:
            write_json(dict(version.raw))
            return
        spec, about = version.spec, {"version": version.id, "aliases": ", ".join(version.aliases)}
        files = "".join(f"\n  {file.filename}  {size(file.bytes)}" for file in version.files)
        where, compatible, created = version.residency, version.compatible, version.created
    else:
        found = client.adapters.get(adapter)
        if json:
            write_json(dict(found.raw))
            return
        spec = found.spec
        about = {
            "name": found.name,
            "owner": found.owner or "",
            "visibility": _visibility(found),
            "description": found.description,
            "labels": ", ".join(f"{key}={value}" for key, value in found.labels.items()),
            "versions": ", ".join(map(str, found.versions)),
            "default": str(found.default_version),
            "aliases": ", ".join(f"{alias} -> {number}" for alias, number in found.aliases.items()),
            "pinned": "yes" if found.pinned else "",
        }
        files = ""
        where, compatible, created = found.residency, found.compatible, found.created
    facts(
        about
        | {
            "rank": spec.rank,
            "alpha": f"{spec.alpha:g}",
            "targets": ", ".join(spec.targets),
            "parameters": f"{spec.parameters:,}",
            "size": size(spec.bytes),
            "sha256": spec.sha256,
            "where": where,
            "fits the base": {True: "yes", False: "no", None: "unknown"}[compatible],
            "created": moment(created),
        }
    )
    for entry in files.splitlines()[1:]:
        line(f"file: {entry.strip()}")


@app.command()
@talks
def share(
    client: Loraplex,
    name: Name,
    tenants: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="TENANT", help="These alone may see and use it too. May be given again."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Every tenant may see and use it.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Nobody else may.")] = False,
    json: Json = False,
) -> None:
    """Share an adapter with tenants, or with none. What is given replaces what was; nothing given: shows what is."""
    if (tenants is not None) + public + private > 1:
        raise typer.BadParameter("only one of them", param_hint="--with, --public, --private")
    if tenants is not None:
        found = client.adapters.update(name, visibility=tenants)
    elif public or private:
        found = client.adapters.update(name, visibility="public" if public else "private")
    else:
        found = client.adapters.get(name)
    if json:
        write_json(dict(found.raw))
        return
    line(f"{found.id or found.name}  {_visibility(found) or 'this server has one user'}")


def _visibility(adapter: Adapter) -> str:
    if adapter.visibility is None or isinstance(adapter.visibility, str):
        return adapter.visibility or ""
    return f"shared with {', '.join(adapter.visibility) or 'nobody'}"


@app.command()
@talks
def download(
    client: Loraplex,
    adapter: Versioned,
    folder: Annotated[
        Path | None, typer.Argument(help="Where to. Default: a folder with the adapter's name.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files with other content.")] = False,
) -> None:
    """Download an adapter's files, as they were uploaded. Files that were cut are completed."""
    target = folder or Path(adapter.partition("@")[0].rpartition("/")[2])
    with transfer(f"downloading {adapter}") as progress:
        paths = client.adapters.download(adapter, target, overwrite=force, progress=progress)
    for path in paths:
        line(str(path))


@app.command()
@talks
def delete(
    client: Loraplex,
    adapter: Versioned,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete an adapter with all its versions, or one version. Asks on a terminal."""
    name = adapter.partition("@")[0]
    if name != adapter:
        number = client.adapters.version(adapter).version
        question = f"Delete version {number} of {name}?"
    else:
        number = None
        question = f"Delete {name} with all its versions?"
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm(question, abort=True, err=True)
    removed = client.adapters.delete(name) if number is None else client.adapters.delete_version(name, number)
    if json:
        write_json(dict(removed.raw))
        return
    line(f"{removed.id}  deleted ({size(removed.freed.bytes if removed.freed else 0)} freed)")


@app.command()
@talks
def load(
    client: Loraplex,
    adapter: Versioned,
    wait: Annotated[bool, typer.Option(help="Until it is there.")] = True,
) -> None:
    """Bring an adapter to the device ahead of its first request."""
    moved = client.adapters.load(adapter, wait=wait)
    line(f"{moved.id}  {moved.residency}")


@app.command()
@talks
def unload(
    client: Loraplex,
    adapter: Versioned,
    wait: Annotated[bool, typer.Option(help="Until no request uses it and it is gone.")] = True,
) -> None:
    """Drop an adapter from the device's and the host's memory; its next request brings it back."""
    moved = client.adapters.unload(adapter, wait=wait)
    line(f"{moved.id}  {moved.residency}")
