"""/v1/adapters. `adapter` arguments that take a version are `name`, `name@3` or `name@alias`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from service.wire import downloads
from service.wire.files import Progress, Remote, Upload, peft_folder
from service.wire.flows import Flow, PageOf, Reply, Request, json_of, pages, run, send
from service.wire.records import Adapter, AdapterVersion, Alias, Removed, Residency, StoredFile, Uploaded

PAGE = 100
_ROOT = "/v1/adapters"


def at(*parts: object, root: str = _ROOT) -> str:
    """The path of a resource; what a caller gives as a name cannot become another path."""
    # httpx resolves . and .. as a browser does, so they have to be escaped as well.
    quoted = (quote(str(part), safe="").replace(".", "%2E") if str(part) in (".", "..") else quote(str(part), safe="")
              for part in parts)  # fmt: skip
    return "/".join((root, *quoted))


def split(adapter: str) -> tuple[str, str | None]:
    """`name@version` as name and version (number or alias)."""
    name, _, version = adapter.partition("@")
    return name, version or None


def upload(
    name: str,
    folder: str | Path,
    *,
    description: str | None = None,
    labels: Mapping[str, str] | None = None,
    default: bool | None = None,
    if_match: str | None = None,
    progress: Progress | None = None,
) -> Flow[Uploaded]:
    """Uploads what PEFT's save_pretrained wrote (shards with their index too) as a new version of `name`, or as a new
    adapter; the new version becomes the default unless `default` is False. The same bytes again change nothing.
    The files are read as they are sent, in constant memory; `progress(bytes sent, bytes in all)`."""
    headers = {} if if_match is None else {"If-Match": if_match}
    return (yield from _upload(folder, description, labels, progress, {}, "PUT", at(name), headers, default))


def create(
    name: str,
    folder: str | Path,
    *,
    description: str | None = None,
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Flow[Uploaded]:
    """Like upload, but for a new adapter only: Conflict if `name` has other content already."""
    return (yield from _upload(folder, description, labels, progress, {"name": name}, "POST", _ROOT, {}, None))


def _upload(
    folder: str | Path,
    description: str | None,
    labels: Mapping[str, str] | None,
    progress: Progress | None,
    fields: dict[str, str],
    method: str,
    path: str,
    headers: Mapping[str, str],
    default: bool | None,
) -> Flow[Uploaded]:
    parts = yield from run(lambda: peft_folder(Path(folder)))
    if description is not None:
        fields["description"] = description
    if labels is not None:
        fields["labels"] = json.dumps(dict(labels))
    # Adapters are content-addressed: the same bytes sent twice are one version, so this may be tried again.
    reply = yield from send(
        Request(
            method=method, path=path, headers=headers, params={"default": default},
            upload=Upload(parts, fields, progress),
        )
    )  # fmt: skip
    body = reply.json()
    adapter = _adapter(reply)
    number = body.get("version", adapter.default_version)
    return Uploaded(adapter=adapter, version=number, created=reply.status == 201, raw=body)


def _adapter(reply: Reply) -> Adapter:
    return dataclasses.replace(Adapter.read(reply.json()), etag=reply.headers.get("etag"))


def every(
    *, label: str | None = None, state: str | None = None, owner: str | None = None, after: str | None = None
) -> PageOf[Adapter]:
    """All adapters by name. `label`: `key` or `key=value`; `state`: "ready" or "incompatible"; `after`: only those
    whose names come later."""
    return pages(_ROOT, Adapter.read, limit=PAGE, label=label, state=state, owner=owner, first=after)


def get(name: str) -> Flow[Adapter]:
    """One adapter with its `etag`. Raises NotFound."""
    return _adapter((yield from send(Request(path=at(name)))))


def versions(name: str) -> PageOf[AdapterVersion]:
    """The versions of an adapter, by number."""
    return pages(at(name, "versions"), AdapterVersion.read, limit=PAGE)


def version(adapter: str) -> Flow[AdapterVersion]:
    """One version: of `name@3` or `name@alias`; of `name`, the default one."""
    name, number = split(adapter)
    if number is None:
        number = str((yield from get(name)).default_version)
    return AdapterVersion.read((yield from json_of("GET", at(name, "versions", number))))


def files(adapter: str) -> Flow[tuple[StoredFile, ...]]:
    """The files of a version, as they were uploaded."""
    return (yield from version(adapter)).files


def download(
    adapter: str, folder: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Flow[list[Path]]:
    """The uploaded files of a version, unchanged, into `folder`, checked by their sha256. Files that are there already
    are not fetched again, half ones go on where they were; LocalFileError for one with other content, unless
    `overwrite`."""
    found = yield from version(adapter)
    root = at(found.adapter, "versions", found.version, "files")
    remotes = [Remote(file.filename, file.bytes, file.sha256) for file in found.files]
    return (yield from downloads.fetch_all(root, remotes, Path(folder), overwrite, progress))


def update(
    name: str,
    *,
    description: str | None = None,
    labels: Mapping[str, str] | None = None,
    default_version: int | None = None,
    pinned: bool | None = None,
    if_match: str | None = None,
) -> Flow[Adapter]:
    """Changes what is given. `labels` replaces all labels. `if_match`: only if the adapter still has this etag."""
    given: dict[str, Any] = {
        "description": description,
        "labels": None if labels is None else dict(labels),
        "default_version": default_version,
        "pinned": pinned,
    }
    reply = yield from send(
        Request(
            method="PATCH", path=at(name), json={key: value for key, value in given.items() if value is not None},
            headers={} if if_match is None else {"If-Match": if_match},
        )
    )  # fmt: skip
    return _adapter(reply)


def set_alias(name: str, alias: str, version: int) -> Flow[Alias]:
    """`name@alias` means this version from now on."""
    return Alias.read((yield from json_of("PUT", at(name, "aliases", alias), json={"version": version})))


def delete_alias(name: str, alias: str) -> Flow[None]:
    """The version that it names stays."""
    yield from send(Request(method="DELETE", path=at(name, "aliases", alias)))


def delete(name: str, *, if_match: str | None = None) -> Flow[Removed]:
    """An adapter with all its versions. Running requests finish."""
    headers = {} if if_match is None else {"If-Match": if_match}
    return Removed.read((yield from json_of("DELETE", at(name), headers=headers)))


def delete_version(name: str, version: int) -> Flow[Removed]:
    """One version. Conflict for the default one while there are others, and for one with aliases."""
    return Removed.read((yield from json_of("DELETE", at(name, "versions", version))))


def load(adapter: str, *, wait: bool = True) -> Flow[Residency]:
    """Brings a version to the device; with `wait`, returns when it is there."""
    return (yield from _move(adapter, "load", wait))


def unload(adapter: str, *, wait: bool = True) -> Flow[Residency]:
    """Drops a version from the device's and the host's memory, when no request uses it any more."""
    return (yield from _move(adapter, "unload", wait))


def _move(adapter: str, verb: str, wait: bool) -> Flow[Residency]:
    name, number = split(adapter)
    params = {"version": number, "wait": wait}
    return Residency.read((yield from json_of("POST", at(name, verb), params=params)))
