"""Answers as typed values. Fields that a newer server adds are kept in `raw`, the JSON as it came."""

# ruff: noqa: RUF009 - `_as` makes dataclass fields
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from service.wire.errors import ProtocolError


def _as(read: Callable[[Any], Any], default: Any = dataclasses.MISSING) -> Any:
    """A field whose JSON goes through `read`."""
    return field(metadata={"read": read}, default=default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, data: Any) -> Self:
        """Raises ProtocolError for JSON that lacks a field, or is none of the API's."""
        if not isinstance(data, dict):
            raise ProtocolError(f"the server answered {str(data)[:100]!r} in place of a {cls.__name__}")
        values: dict[str, Any] = {"raw": data}
        for known in dataclasses.fields(cls):
            if known.name in data and known.name != "raw":
                value, read = data[known.name], known.metadata.get("read")
                values[known.name] = value if read is None or value is None else read(value)
        try:
            return cls(**values)
        except TypeError as exc:
            raise ProtocolError(f"the server's {cls.__name__} cannot be read: {exc}") from None


def _all(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def items(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ProtocolError(f"the server answered {str(value)[:100]!r} in place of a list")
        return tuple(map(read, value))

    return items


def _text_or_all(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _all(str)(value)


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(Record):
    """What an adapter is: `bytes` and `sha256` are those of all its files together."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = _as(_all(str))
    parameters: int
    bytes: int
    sha256: str
    max_rank: int | None = None
    use_rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(Record):
    """An adapter; `spec` and `residency` ("device", "host", "disk", ...) are its default version's. `etag` can be
    given as `if_match` to whatever changes it. `id`: what you call it, `owner/name` if it is another tenant's.
    `visibility`: "private", "public", or the tenants that it is shared with; None on a server without tenants."""

    name: str
    id: str = ""
    default_version: int
    versions: tuple[int, ...] = _as(_all(int))
    aliases: Mapping[str, int]
    spec: Spec = _as(Spec.read)
    owner: str | None = None
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    pinned: bool = False
    visibility: str | tuple[str, ...] | None = _as(_text_or_all, None)
    residency: str | None = None
    compatible: bool | None = None
    state: str | None = None
    created: float | None = None
    updated: float | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile(Record):
    filename: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion(Record):
    """One version, which never changes."""

    id: str
    adapter: str
    version: int
    aliases: tuple[str, ...] = _as(_all(str))
    spec: Spec = _as(Spec.read)
    files: tuple[StoredFile, ...] = _as(_all(StoredFile.read))
    residency: str | None = None
    compatible: bool | None = None
    base_fingerprint: str | None = None
    created: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded(Record):
    """What an upload led to. `created` is False where the name had these very bytes already."""

    adapter: Adapter
    version: int
    created: bool

    @property
    def id(self) -> str:
        """`name@version`"""
        return f"{self.adapter.name}@{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed(Record):
    files: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed(Record):
    """What a deletion took away, and what becomes free."""

    id: str
    versions: tuple[int, ...] = _as(_all(int), ())
    adapter_deleted: bool = False
    freed: Freed = _as(Freed.read, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias(Record):
    id: str
    alias: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency(Record):
    id: str
    name: str
    version: int
    residency: str


# ---------------------------------------------------------------- inference


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Record):
    """`parent` is None for the base model."""

    id: str
    parent: str | None = None
    created: int | None = None
    owned_by: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Record):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Record):
    """`message` is a chat's, with the role; `logprobs` is OpenAI's JSON."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None
    message: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Record):
    """A whole answer, of a completion or of a chat. `adapter` says which versions answered (`name@version`, several
    separated by commas); None: the base."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    adapter: str | None = None

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(Record):
    """A piece of a streamed answer. `usage` is in the last one, where it was asked for."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None
    usage: Usage | None = None


def _choices(data: Any, part: str) -> list[dict[str, Any]]:
    """The choices with `text`, wherever the shape at hand keeps it: in `message`, in `delta` or beside them."""
    try:
        found = []
        for choice in data["choices"]:
            inner = choice.get(part)
            text = choice.get("text") if inner is None else inner.get("content")
            found.append({**choice, "text": text or ""})
        return found
    except (TypeError, KeyError, AttributeError):
        raise ProtocolError(f"the server answered {str(data)[:100]!r} in place of an answer") from None


def read_answer(data: Any, adapter: str | None) -> Answer:
    choices = tuple(Choice.read(choice) for choice in _choices(data, "message"))
    usage = data.get("usage")
    try:
        return Answer(
            id=data["id"], model=data["model"], choices=choices, raw=data, adapter=adapter,
            usage=None if usage is None else Usage.read(usage),
        )  # fmt: skip
    except KeyError as exc:
        raise ProtocolError(f"the server's answer lacks {exc}") from None


def read_chunk(data: Any) -> Chunk:
    choices = _choices(data, "delta")
    usage = data.get("usage")
    first = choices[0] if choices else {}
    return Chunk(
        index=first.get("index", 0), text=first.get("text", ""), finish_reason=first.get("finish_reason"),
        logprobs=first.get("logprobs"), usage=None if usage is None else Usage.read(usage), raw=data,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Record):
    tokens: tuple[int, ...] = _as(_all(int))
    count: int
    max_model_len: int | None = None
    token_strs: tuple[str, ...] | None = _as(_all(str), None)


# ---------------------------------------------------------------- merges

MergeState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSource(Record):
    adapter: str
    weight: float
    version: int | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFile(Record):
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge(Record):
    """A merge job. `progress` goes from 0 to 1. Its result is `adapter` (`name@version`) or `files`."""

    id: str
    name: str
    into: str
    method: str
    state: MergeState
    sources: tuple[MergeSource, ...] = _as(_all(MergeSource.read), ())
    progress: float = 0.0
    phase: str | None = None
    error: str | None = None
    adapter: str | None = None
    files: tuple[MergeFile, ...] | None = _as(_all(MergeFile.read), None)
    created_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def finished(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")


# ---------------------------------------------------------------- operation


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerVersion(Record):
    """What is running; `engine` is None while the engine starts."""

    version: str
    python: str | None = None
    model: str | None = None
    engine: Mapping[str, Any] | None = None
