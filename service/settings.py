"""What the operator may set: LORAPLEX_* variables and command-line flags, read once at start.

`Settings.load(**flags)` is the only way in. A wrong value is reported as one line that names key and value. The values
are frozen afterwards; `environment()` hands them on to other processes of the service.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import ipaddress
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from adapters.blobs import Blobs, open_blobs
from service.engine.config import EngineConfig
from service.store.names import NAME_RULE, valid_name

PREFIX = "LORAPLEX_"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
# Where the client and the command line find a server; whoever has set them may start one in the same shell.
_CLIENTS = {"LORAPLEX_URL", "LORAPLEX_KEY"}
# sun_path holds 108 bytes on Linux, 104 on macOS; ZeroMQ needs a few of its own.
_SOCKET_PATH_LIMIT = 100
MIN_ADMIN_KEY = 16
SECRETS = frozenset({"admin_key", "database_url", "blobs_url"})
"""Settings that have no flag and that no message shows."""


class SettingsError(ValueError):
    """Settings that cannot be used. `problems`: one line for each wrong key, with its value; str() joins them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def parse_size(value: Any) -> Any:
    """Bytes of "512", "8GiB", "1.5G" (case and the B do not matter). Anything else is left for pydantic to refuse."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return value


Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Settings(BaseSettings):
    """Every setting with its default. Sizes are bytes ("8GiB" is understood); 0 means "measure and choose"."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = ""
    """The base model: hub id, local folder or .gguf file; empty: the embedded default model. The API processes are
    given the local folder that the supervisor resolved it to."""
    served_name: str = ""
    """The name that the base model answers to; empty: the name of the model's folder."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    admin_key: SecretStr = SecretStr("")
    """Given: many tenants, every request needs a key, and this one may do everything. Empty: one user, no keys. It has
    no flag, since every user of the machine can read the command lines of its processes."""
    allow_public: bool = False
    """Without an admin key: listen on an address that others can reach all the same."""
    cors_origins: str = ""
    """Origins, separated by commas, whose pages may call the API from a browser ("*": all); empty: none."""
    data_dir: Path = Path("data")
    database_url: SecretStr = SecretStr("")
    """Catalogue and tenants: postgresql://user:password@host/database; empty: SQLite in the data folder. No flag
    either, because of the password."""
    blobs_url: SecretStr = SecretStr("")
    """Files of adapters: s3://bucket/prefix (adapters/s3.py; credentials by AWS_*); empty: the data folder."""
    blob_cache_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] = 16 * 2**30
    """What local copies of files in S3 may take in the data folder's cache."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    api_workers: int = Field(1, ge=1, le=256)
    merge_priority: Literal["idle", "low", "normal"] = "low"
    """low: of processors that others want a merge has 2% of one, besides all that nobody wants. idle: only what nobody
    wants, so that it stands still while the machine is fully busy. normal: like everything else."""
    merge_memory_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=1)] = 6_000_000_000
    """A merge that would need more for one module (adapters/merge_memory.py) is refused."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "console"
    max_positions: Count = 0
    """Longest sequence, prompt and answer; 0: the model's own limit."""
    kv_pages: Count = 0
    max_sequences: int = Field(256, ge=1)
    max_tokens_per_step: Count = 0
    max_prefill_tokens_per_step: Count = 0
    """Of those, tokens of prompts while other sequences decode: bounds the time between two tokens of a stream."""
    max_queue: int = Field(1024, ge=1)
    """Sequences that may wait; above it requests get 429."""
    arena_bytes: Bytes = 0
    host_cache_bytes: Bytes = 0
    max_resident_adapters: int = Field(4096, ge=1)
    max_upload_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=1)] = 16 * 2**30
    max_body_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=1024)] = 8 * 2**20
    """Largest body of any request but an upload."""
    max_uploads: int = Field(16, ge=1)
    """Uploads that one API process receives at once; above it a tenant that has its share of them gets 429."""
    max_connections: int = Field(4096, ge=1)
    """Connections of one API process, also limited by its open files; above it requests get 503."""
    keep_alive_s: int = Field(30, ge=1)
    """A connection without a request is closed after so long. Longer than clients keep theirs (5 s is usual), so that
    none sends a request into a connection that is just being closed."""
    header_timeout_s: float = Field(20.0, gt=0)
    """What the head of a request may take to arrive."""
    body_timeout_s: float = Field(30.0, gt=0)
    """A body that gains less than 500 bytes a second for so long, and is not complete, gets 408."""
    write_timeout_s: float = Field(60.0, gt=0)
    """A client that takes nothing of what is written to it for so long is disconnected."""
    traces_url: str = ""
    """Where OpenTelemetry spans go, as OTLP over HTTP (needs the extra `traces`); empty: none are made. Headers, as
    for a key, come from OTEL_EXPORTER_OTLP_HEADERS."""
    traces_ratio: float = Field(1.0, ge=0, le=1)
    """Of the traces that begin here, the share that is kept; who sends a traceparent decides for its own requests."""
    metrics_top_adapters: int = Field(0, ge=0, le=1000)
    """Adapters that have figures of their own in /metrics (service/top.py); all others are added up."""
    metrics_top_tenants: int = Field(0, ge=0, le=1000)
    """The same for tenants."""
    usage_days: int = Field(400, ge=1)
    """How long the sums of GET /v1/usage are kept."""
    audit_days: int = Field(400, ge=1)
    """And the lines of GET /v1/audit."""
    threads: Count = 0
    """CPU threads of the engine; 0: all cores."""
    deterministic: bool = False
    """CUDA: the same bits for a request whoever else is in the batch (docs/performance.md says at what cost). On CPU
    float32 is so anyway."""
    eager: bool = False
    prefix_caching: bool = True

    @field_validator("log_level", "log_format", "device", "dtype", "merge_priority", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("admin_key")
    @classmethod
    def _unguessable(cls, value: SecretStr) -> SecretStr:
        key = value.get_secret_value()
        if key and (len(key) < MIN_ADMIN_KEY or not all("!" <= char <= "~" for char in key)):
            raise ValueError(f"should be at least {MIN_ADMIN_KEY} printable ASCII characters without spaces")
        return value

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if url:
            from sqlalchemy.engine import make_url
            from sqlalchemy.exc import ArgumentError

            if not url.startswith(("postgresql://", "postgresql+asyncpg://", "postgres://")):
                raise ValueError("should be postgresql://user:password@host:port/database")
            try:
                make_url(url)
            except (ArgumentError, ValueError):
                raise ValueError("is no URL; are special characters of the password written as %XX?") from None
        return value

    @field_validator("blobs_url")
    @classmethod
    def _blobs(cls, value: SecretStr) -> SecretStr:
        if url := value.get_secret_value():
            from adapters.s3 import parse_url

            parse_url(url)
        return value

    @field_validator("traces_url")
    @classmethod
    def _collector(cls, value: str) -> str:
        if value:
            url = urlsplit(value)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError("should be http://host:port or https://host:port, with a path or without")
            if url.username or url.password:
                raise ValueError("should hold no password: set OTEL_EXPORTER_OTLP_HEADERS")
        return value

    @field_validator("served_name")
    @classmethod
    def _servable(cls, value: str) -> str:
        if value and not valid_name(value):
            raise ValueError(f"should be {NAME_RULE}")
        return value

    @field_validator("data_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        path = value.expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise ValueError("should be a folder")
        return path

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Settings from `overrides` (None: not given), then the environment, then the defaults.

        Raises SettingsError with one line for each wrong key.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as exc:
            raise SettingsError([_problem(error, given) for error in exc.errors()]) from None

    @staticmethod
    def unknown_variables() -> list[str]:
        """LORAPLEX_* variables of the environment that mean nothing here: most likely misspelt."""
        known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | _CLIENTS
        return sorted(key for key in os.environ if key.upper().startswith(PREFIX) and key.upper() not in known)

    def environment(self) -> dict[str, str]:
        """The settings that differ from their defaults, as variables for another process of the service."""
        return {
            f"{PREFIX}{name}".upper(): value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, field in type(self).model_fields.items()
            if (value := getattr(self, name)) != field.default
        }

    @property
    def multi_tenant(self) -> bool:
        """Whether there are tenants with keys, rather than one user without."""
        return bool(self.admin_key.get_secret_value())

    @property
    def origins(self) -> list[str]:
        return [origin.strip().rstrip("/") for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def traces_endpoint(self) -> str:
        """The collector's address for spans: a URL without a path means the usual one."""
        bare = self.traces_url and urlsplit(self.traces_url).path in ("", "/")
        return self.traces_url.rstrip("/") + "/v1/traces" if bare else self.traces_url

    def database_address(self) -> str:
        """URL for Catalogue.open, password included."""
        return self.database_url.get_secret_value() or f"sqlite+aiosqlite:///{self.catalogue_path}"

    @property
    def private_catalogue(self) -> bool:
        """Whether the catalogue is the SQLite file in the data folder, which nobody else has."""
        return not self.database_url.get_secret_value()

    def open_blobs(self) -> Blobs:
        """Where the files of adapters lie."""
        return open_blobs(self.blobs_dir, self.cache_dir, self.blob_cache_bytes, self.blobs_url.get_secret_value())

    @property
    def blobs_dir(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def catalogue_path(self) -> Path:
        return self.data_dir / "catalogue.sqlite3"

    @property
    def cache_dir(self) -> Path:
        return self.data_dir / "cache"

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def metrics_dir(self) -> Path:
        """What several API processes have counted since the start (service/metrics.py)."""
        return self.run_dir / "metrics"

    @property
    def uploads_dir(self) -> Path:
        return self.data_dir / "uploads"

    @property
    def merges_dir(self) -> Path:
        """Of results (<id>/) and of what is being made (work/)."""
        return self.data_dir / "merges"

    @property
    def engine_socket(self) -> str:
        """The ipc:// address of the engine, the same in every process that has this data folder. Whoever binds it
        creates the folder, readable by its owner alone."""
        path = self.run_dir / "engine.ipc"
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
            key = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
            path = Path(tempfile.gettempdir()) / f"loraplex-{os.getuid()}-{key}" / "engine.ipc"
        return f"ipc://{path}"

    def base_name(self) -> str:
        """The name that the base model answers to. `model` has to be the resolved local folder by now."""
        if self.served_name:
            return self.served_name
        path = Path(self.model)
        # The hub's cache calls its folders models--org--name/snapshots/<commit>.
        name = path.parts[-3].rpartition("--")[2] if path.parts[-2:-1] == ("snapshots",) else path.name
        name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:96]
        return name or "base"

    def engine_config(self, model_path: str | Path) -> EngineConfig:
        """The engine's share of the settings, for a model that lies in the local folder `model_path`."""
        return EngineConfig(
            model_path=str(model_path),
            blobs_dir=str(self.blobs_dir),
            cache_dir=str(self.cache_dir),
            blob_cache_bytes=self.blob_cache_bytes,
            socket=self.engine_socket,
            device=detect_device() if self.device == "auto" else self.device,
            dtype=self.dtype,
            threads=self.threads,
            kv_pages=self.kv_pages,
            max_positions=self.max_positions,
            max_sequences=self.max_sequences,
            max_tokens_per_step=self.max_tokens_per_step,
            max_prefill_tokens_per_step=self.max_prefill_tokens_per_step,
            max_queue=self.max_queue,
            arena_bytes=self.arena_bytes,
            max_resident_adapters=self.max_resident_adapters,
            host_cache_bytes=self.host_cache_bytes,
            prefix_caching=self.prefix_caching,
            deterministic=self.deterministic,
            eager=self.eager,
            traces_url=self.traces_endpoint,
            log_level=self.log_level,
            log_format=self.log_format,
        )


def detect_device() -> Literal["cpu", "cuda"]:
    """cuda where torch was built for it and the driver reports a device. Asks the driver, because this process must not
    import torch."""
    import ctypes

    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return "cpu"
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return "cuda"
    except (OSError, AttributeError, importlib.metadata.PackageNotFoundError):
        pass
    return "cpu"


def _problem(error: Any, given: dict[str, Any]) -> str:
    """`LORAPLEX_PORT=70000: should be ...` (or `port=70000` where it came from a flag), on one line."""
    key = str(error["loc"][0]) if error["loc"] else "settings"
    # A variable's loc may be the variable's own name or the field's, depending on where pydantic-settings found it.
    field = key.lower().removeprefix(PREFIX.lower())
    label = field if field in given or key in given else f"{PREFIX}{field}".upper()
    if error["type"] == "extra_forbidden":
        return f"{label}: there is no such setting"
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{label}={'(secret)' if field in SECRETS else _shown(error['input'])}: {text}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
