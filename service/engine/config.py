"""The engine's configuration, handed over once at start (JSON on the command line of the engine process)."""

from __future__ import annotations

from typing import Literal

import msgspec

EXIT_CANNOT_START = 2
"""Exit code of the engine process: starting it again will not help."""
CANNOT_START = "cannot-start.json"
"""File in the cache folder, [what is wrong, a hint], written before that exit."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Values are validated by service/settings.py; sizes in bytes, 0 means "measure and choose"."""

    model_path: str
    """A local Hugging Face folder (hub ids and .gguf files are resolved before the engine starts)."""
    blobs_dir: str
    """Content-addressed blob store (adapters/blobs.py)."""
    cache_dir: str
    """Rebuildable files: packed blocks, compile caches."""
    blob_cache_bytes: int = 16 * 2**30
    """Local copies of blobs that lie in S3; then LORAPLEX_BLOBS_URL, which may hold credentials, says where."""
    socket: str
    """ipc:// address to bind."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on CPU, the checkpoint's own (bfloat16 or float16) on CUDA."""
    threads: int = 0
    """CPU threads of torch; 0: all cores of the machine."""
    page_size: int = 16
    kv_pages: int = 0
    max_positions: int = 0
    """Longest sequence; 0: the model's own limit."""
    max_sequences: int = 256
    max_tokens_per_step: int = 0
    """Token budget of a step (chunked prefill); 0: 2048 on CUDA, 512 on CPU."""
    max_prefill_tokens_per_step: int = 0
    """Of those, tokens of prompts while other sequences decode; 0: chosen by model and device (build.py)."""
    max_queue: int = 1024
    """Sequences that may wait; above it requests are refused with queue_full, but for tenants with less than their
    share (permits.py)."""
    arena_bytes: int = 0
    max_resident_adapters: int = 4096
    """Rows of the arena's table."""
    host_cache_bytes: int = 0
    prefix_caching: bool = True
    deterministic: bool = False
    eager: bool = False
    """CUDA: neither compile layers nor capture graphs. Starts sooner, decodes several times slower."""
    ahead: bool | None = None
    """Prepare each step while the device runs the one before it; None: on CUDA (core.Engine.step)."""
    integrity_interval_s: float = 30.0
    """Between two integrity checks of an idle engine. Tests that drive a whole service choose 0: one whenever it has
    become idle."""
    traces_url: str = ""
    """Where spans go, as OTLP over HTTP (tracing.py); empty: none are made."""
    log_level: str = "info"
    log_format: Literal["json", "console"] = "console"
