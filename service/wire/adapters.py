"""/v1/adapters. `adapter` arguments that take a version are `name`, `name@3` or `name@alias`; another tenant's
adapter is `owner/name` everywhere. A `name` is without a version: BadRequest, before anything is sent, for one that
has it, as for names and versions that are empty."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from service.wire import downloads
from service.wire.errors import BadRequest, NotFound
from service.wire.files import Progress, Remote, Upload, peft_folder
from service.wire.flows import Flow, PageOf, Reply, Request, json_of, pages, run, send
from service.wire.records import Adapter, AdapterVersion, Alias, Removed, Residency, StoredFile, Uploaded

PAGE = 100
_ROOT = "/v1/adapters"
_NUMBERED = "the server gives a new version its number"


def at(*parts: object, root: str = _ROOT) -> str:
    """The path of a resource; what a caller gives as a name cannot become another path. Raises BadRequest for an empty
    one, which would be the path of the list."""
    if "" in parts:
        raise BadRequest(400, f"A name or id that {root}/ needs is empty.", code="invalid_name")
    return "/".join((root, *(segment(str(part)) for part in parts)))


def segment(text: str) -> str:
    """A text as one segment of a path."""
    # httpx resolves . and .. as a browser does, so they have to be escaped as well.
    return text.replace(".", "%2E") if text in (".", "..") else quote(text, safe="")


def split(adapter: str) -> tuple[dict[str, str | None], str, str | None]:
    """`owner/name@version` as the parameter that says whose, the name, and the version (number or alias). Raises
    BadRequest for a part that is empty: without it another adapter or version would be meant."""
    full, at_sign, version = adapter.partition("@")
    owner, slash, name = full.rpartition("/")
    for part, there, value in (("name", True, name), ("owner", slash, owner), ("version", at_sign, version)):
        if there and not value:
            raise BadRequest(400, f"The {part} is empty in {adapter!r}.", code=f"invalid_{part}", param=part)
    return {"tenant": owner} if slash else {}, name, version if at_sign else None


def _whole(name: str, instead: str) -> str:
    """The name, of what is about an adapter with all its versions. A version in it would be dropped silently, and
    `delete` take every other one too: BadRequest, which says what is called `instead`."""
    if "@" in name:
        raise BadRequest(400, f"{name!r} names a version where a name alone is wanted: {instead}.", code="invalid_name",
                         param="name")  # fmt: skip
    return name


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
    owner, name, _ = split(_whole(name, _NUMBERED))
    params = {**owner, "default": default}
    return (yield from _upload(folder, description, labels, progress, {}, "PUT", at(name), headers, params))


def create(
    name: str,
    folder: str | Path,
    *,
    description: str | None = None,
    labels: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Flow[Uploaded]:
    """Like upload, but for a new adapter only: Conflict if `name` has other content already."""
    owner, name, _ = split(_whole(name, _NUMBERED))
    return (yield from _upload(folder, description, labels, progress, {"name": name}, "POST", _ROOT, {}, owner))


def _upload(
    folder: str | Path,
    description: str | None,
    labels: Mapping[str, str] | None,
    progress: Progress | None,
    fields: dict[str, str],
    method: str,
    path: str,
    headers: Mapping[str, str],
    params: Mapping[str, str | bool | None],
) -> Flow[Uploaded]:
    parts = yield from run(lambda: peft_folder(Path(folder)))
    if description is not None:
        fields["description"] = description
    if labels is not None:
        fields["labels"] = json.dumps(dict(labels))
    # Adapters are content-addressed: the same bytes sent twice are one version, so this may be tried again.
    reply = yield from send(
        Request(
            method=method, path=path, headers=headers, params=params, upload=Upload(parts, fields, progress)
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
    """All adapters that you may use: your own by name, then others' by owner and name. `label`: `key` or `key=value`;
    `state`: "ready" or "incompatible"; `owner`: that tenant's alone; `after`: only those that come later."""
    return pages(_ROOT, Adapter.read, limit=PAGE, label=label, state=state, owner=owner, first=after)


def get(name: str) -> Flow[Adapter]:
    """One adapter with its `etag`; `version` is for one version. Raises NotFound."""
    owner, plain, _ = split(_whole(name, "`version` is for one version"))
    found = _adapter((yield from send(Request(path=at(plain), params=owner))))
    if owner and found.owner != owner["tenant"]:
        raise NotFound(404, f"There is no adapter named {name!r}.", code="adapter_not_found")
    return found


def versions(name: str) -> PageOf[AdapterVersion]:
    """The versions of an adapter, by number."""
    owner, name, _ = split(_whole(name, "`version` is for one version"))
    return pages(at(name, "versions"), AdapterVersion.read, limit=PAGE, **owner)


def version(adapter: str) -> Flow[AdapterVersion]:
    """One version: of `name@3` or `name@alias`; of `name`, the default one."""
    owner, name, number = split(adapter)
    if number is None or owner:
        found = yield from get(adapter.partition("@")[0])
        number = number or str(found.default_version)
    return AdapterVersion.read((yield from json_of("GET", at(name, "versions", number), params=owner)))


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
    owner, _, _ = split(adapter)
    root = at(found.adapter, "versions", found.version, "files")
    remotes = [Remote(file.filename, file.bytes, file.sha256) for file in found.files]
    return (yield from downloads.fetch_all(root, remotes, Path(folder), overwrite, progress, owner))


def update(
    name: str,
    *,
    description: str | None = None,
    labels: Mapping[str, str] | None = None,
    default_version: int | None = None,
    pinned: bool | None = None,
    visibility: Literal["private", "public"] | Sequence[str] | None = None,
    if_match: str | None = None,
) -> Flow[Adapter]:
    """Changes what is given. `labels` replaces all labels. `visibility`: "private", "public" (every tenant may see and
    use it), or the tenants who may. `if_match`: only if the adapter still has this etag."""
    owner, name, _ = split(_whole(name, "all versions share what is changed; `default_version` chooses one"))
    given: dict[str, Any] = {
        "description": description,
        "labels": None if labels is None else dict(labels),
        "default_version": default_version,
        "pinned": pinned,
        "visibility": visibility if visibility is None or isinstance(visibility, str) else list(visibility),
    }
    reply = yield from send(
        Request(
            method="PATCH", path=at(name), json={key: value for key, value in given.items() if value is not None},
            headers={} if if_match is None else {"If-Match": if_match}, params=owner,
        )
    )  # fmt: skip
    return _adapter(reply)


def set_alias(name: str, alias: str, version: int) -> Flow[Alias]:
    """`name@alias` means this version from now on."""
    owner, name, _ = split(_whole(name, "the version is an argument of its own"))
    body = {"version": version}
    return Alias.read((yield from json_of("PUT", at(name, "aliases", alias), json=body, params=owner)))


def delete_alias(name: str, alias: str) -> Flow[None]:
    """The version that it names stays."""
    owner, name, _ = split(_whole(name, "the alias is an argument of its own"))
    yield from send(Request(method="DELETE", path=at(name, "aliases", alias), params=owner))


def delete(name: str, *, if_match: str | None = None) -> Flow[Removed]:
    """An adapter with all its versions; `delete_version` is for one. Running requests finish."""
    headers = {} if if_match is None else {"If-Match": if_match}
    owner, name, _ = split(_whole(name, "`delete_version` is for one version, this deletes all"))
    return Removed.read((yield from json_of("DELETE", at(name), headers=headers, params=owner)))


def delete_version(name: str, version: int) -> Flow[Removed]:
    """One version. Conflict for the default one while there are others, and for one with aliases."""
    owner, name, _ = split(_whole(name, "the version is an argument of its own"))
    return Removed.read((yield from json_of("DELETE", at(name, "versions", version), params=owner)))


def load(adapter: str, *, wait: bool = True) -> Flow[Residency]:
    """Brings a version to the device; with `wait`, returns when it is there."""
    return (yield from _move(adapter, "load", wait))


def unload(adapter: str, *, wait: bool = True) -> Flow[Residency]:
    """Drops a version from the device's and the host's memory, when no request uses it any more."""
    return (yield from _move(adapter, "unload", wait))


def _move(adapter: str, verb: str, wait: bool) -> Flow[Residency]:
    owner, name, number = split(adapter)
    params = {**owner, "version": number, "wait": wait}
    return Residency.read((yield from json_of("POST", at(name, verb), params=params)))
