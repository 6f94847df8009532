"""Puts the real engine together: model, KV cache, arena, loader, scheduler. Decides how memory is shared out."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import transformers

from adapters.arena import Arena
from adapters.blobs import open_blobs
from adapters.kernels import tail
from adapters.kernels.tuning import FEW
from adapters.layers import sites
from adapters.loader import BlockLoader
from adapters.manifest import Manifest
from adapters.residency import Residency
from adapters.slab import Slab
from service.engine import attention, compiled, draw
from service.engine.attention import Attention, LayerShape, PagedAttention, StepLayout
from service.engine.budgets import STEP_SIZES, Filling, prefill_tokens_per_step, tokens_per_step
from service.engine.config import EngineConfig
from service.engine.core import Engine, is_out_of_memory
from service.engine.draw import Draw
from service.engine.errors import CannotStart, UnsupportedModel
from service.engine.kv_cache import PagePool
from service.engine.messages import FromEngine, Limits
from service.engine.model import LoadedModel, load_model
from service.engine.runner import LoraKernels, ReferenceKernels, Runner

log = logging.getLogger(__name__)

MAX_ADAPTERS_PER_REQUEST = 8
MAX_RANK = 512
CPU_KV_BYTES = 1 << 30
CPU_ARENA_BYTES = 512 << 20
CUDA_HEADROOM = 0.06
"""Share of the device left alone: fragmentation, library workspaces, other small users."""
CUDA_ARENA_SHARE = 0.4
"""Of what the model leaves free. The rest is KV cache."""
CUDA_HOST_CACHE_BYTES = 8 << 30
TRIED = 16
"""Tokens of the step that shows whether a model works with LoRA layers in it."""


def build_engine(
    config: EngineConfig, send: Callable[[bytes, FromEngine], None], wake: Callable[[], None] = lambda: None
) -> tuple[Engine, dict[str, str]]:
    """The engine around the real model, and the versions to report. `wake` is called, on a loader thread, when an
    adapter has got further.

    Raises CannotStart: the device cannot be used, memory does not suffice, or the model cannot be served exactly."""
    if config.threads:
        torch.set_num_threads(config.threads)
    # Its records go the way of all others, and no bar is drawn across them.
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()
    cuda = config.device == "cuda"
    if cuda:
        # Otherwise what steps of many sizes leave behind cannot be put together again.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        compiled.use_cache_folder(Path(config.cache_dir) / "compiled")
    check_machine(config)
    if cuda and not config.deterministic:
        prefer_cublaslt()
    budget = config.max_tokens_per_step or tokens_per_step(config.device, deterministic=config.deterministic)
    graphs = cuda and not config.eager
    # Pinning 8 GiB takes 2 to 3 s and no processor. Copying weights takes none either, so the compiler's modules, some
    # seconds of it, are imported meanwhile.
    with ThreadPoolExecutor(2) as beside:
        slab = beside.submit(Slab, _host_bytes(config), pinned=cuda)
        if graphs:
            beside.submit(import_module, "service.engine.prepare")
        begin = time.perf_counter()
        try:
            loaded = load_model(config)
        except Exception as error:
            if is_out_of_memory(error):
                raise _no_memory(config) from error
            raise
        loading, end = time.perf_counter() - begin, time.perf_counter()
    waited = time.perf_counter() - end
    log.info("base model loaded in %.1f s, then %.1f s waited for what is done beside", loading, waited)
    pages, arena_bytes = share_memory(config, loaded, budget)
    manifest = loaded.manifest

    arena = Arena.for_manifest(manifest, device=loaded.device, nbytes=arena_bytes, rows=config.max_resident_adapters)
    loader = BlockLoader(
        open_blobs(
            Path(config.blobs_dir),
            Path(config.cache_dir),
            config.blob_cache_bytes,
            os.environ.get("LORAPLEX_BLOBS_URL", ""),
        ),
        manifest,
        Path(config.cache_dir),
        arena,
        host=slab.result(),
        notify=wake,
    )
    backend, kernels, drawing = _kernels(config, loaded, pages, arena)
    limits = Limits(
        max_positions=min(manifest.max_positions, pages * config.page_size),
        max_sequences=config.max_sequences,
        max_queue=config.max_queue,
        page_size=config.page_size,
        pages=pages,
        max_adapters_per_request=MAX_ADAPTERS_PER_REQUEST,
        max_rank=MAX_RANK,
        arena_bytes=arena.capacity,
    )
    runner = Runner(loaded, backend, kernels, config.page_size, draw=drawing, ahead=config.ahead)
    if graphs:
        from service.engine.prepare import prepare  # Triton comes with torch for CUDA only

        prepare(config, loaded, runner, backend, kernels, arena, budget, limits.max_positions)
    else:
        _try_out(runner, manifest, pages * config.page_size)
    multiprocessors = torch.cuda.get_device_properties(loaded.device).multi_processor_count if cuda else 0
    engine = Engine(
        config,
        manifest,
        limits,
        runner,
        PagePool(pages, config.page_size, prefix_caching=config.prefix_caching),
        Residency(arena, loader),
        send,
        max_tokens_per_step=budget,
        max_prefill_tokens_per_step=config.max_prefill_tokens_per_step
        or prefill_tokens_per_step(config.device, manifest, multiprocessors),
        filling=Filling(runner.graphs.seconds if runner.graphs else {}),
        # On a CPU a step takes long as it is, and gains nothing by being longer; and who sets a bound means it.
        backlog=cuda and not config.max_prefill_tokens_per_step,
        on_close=loader.close,
    )
    log.info(
        "%s in %s on %s: KV cache %d pages of %d tokens (%.1f GiB), arena %.1f GiB for up to %d adapters",
        manifest.architecture,
        manifest.dtype,
        config.device,
        pages,
        config.page_size,
        pages * page_bytes(loaded.shapes, config.page_size, loaded.dtype) / 2**30,
        arena.capacity / 2**30,
        config.max_resident_adapters,
    )
    return engine, {"torch": str(torch.__version__), "transformers": transformers.__version__}


def prefer_cublaslt() -> None:
    """Of torch's two ways to cuBLAS the one that chooses better for few rows: 64 decoding sequences of an 8B model
    6.1 ms instead of 6.4, 96 7.2 instead of 7.6, larger and smaller steps as before (H200). The engine's process has
    asked torch for it already, by its environment."""
    if torch.backends.cuda.preferred_blas_library() != torch._C._BlasBackend.Cublaslt:
        torch.backends.cuda.preferred_blas_library("cublaslt")


def check_machine(config: EngineConfig) -> None:
    """What would otherwise end in a stack trace minutes later. Raises CannotStart."""
    if config.device == "cuda":
        if config.deterministic and config.eager:
            raise CannotStart(
                "LORAPLEX_DETERMINISTIC=true and LORAPLEX_EAGER=true: on CUDA steps give the same bits in any batch "
                "only as CUDA graphs of one shape",
                "leave LORAPLEX_EAGER=true out, or LORAPLEX_DETERMINISTIC",
            )
        budget = config.max_tokens_per_step
        # Kernels of plans of few entries are launched otherwise, and each adapter of a mix is an entry of its own.
        if config.deterministic and 0 < budget <= FEW < budget * MAX_ADAPTERS_PER_REQUEST:
            raise CannotStart(
                f"LORAPLEX_DETERMINISTIC=true and LORAPLEX_MAX_TOKENS_PER_STEP={budget}: steps with mixes would divide "
                "the LoRA products otherwise than steps without",
                f"set LORAPLEX_MAX_TOKENS_PER_STEP to more than {FEW}",
            )
        if torch.version.cuda is None:
            raise CannotStart(
                "LORAPLEX_DEVICE=cuda, but the installed torch is built for CPU only",
                "install a CUDA build of torch, or choose --device cpu",
            )
        try:
            torch.cuda.init()
        except RuntimeError as error:
            raise CannotStart(
                f"LORAPLEX_DEVICE=cuda, but the GPU cannot be used: {str(error).splitlines()[0]}",
                f"torch needs a driver for CUDA {torch.version.cuda}; nvidia-smi shows yours. Or choose --device cpu",
            ) from error
        available = torch.cuda.mem_get_info()[0]
    else:
        available = host_memory_available()
    if needed_bytes(config) > available:
        raise _no_memory(config, available)


def needed_bytes(config: EngineConfig) -> int:
    """Bytes of the weights in the compute dtype, by the sizes of the files and the dtype that the checkpoint names."""
    folder = Path(config.model_path)
    stored = json.loads((folder / "config.json").read_text())
    own = str(stored.get("dtype") or stored.get("torch_dtype") or "bfloat16")
    wanted = config.dtype if config.dtype != "auto" else "float32" if config.device == "cpu" else own
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes = {"float32": 4, "float64": 8}
    return files * sizes.get(wanted, 2) // sizes.get(own, 2)


def host_memory_available() -> int:
    """Host memory that can still be had, in bytes (MemAvailable)."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _no_memory(config: EngineConfig, available: int | None = None) -> CannotStart:
    has = "" if available is None else f", and {available / 2**30:.1f} GiB are free"
    return CannotStart(
        f"not enough memory on {config.device}: the weights of {Path(config.model_path).name} "
        f"take about {needed_bytes(config) / 2**30:.1f} GiB{has}",
        "choose a smaller model (--model), a smaller --dtype, or free some memory",
    )


def _kernels(
    config: EngineConfig, loaded: LoadedModel, pages: int, arena: Arena
) -> tuple[Attention, LoraKernels, Draw]:
    """Triton on CUDA; plain torch on CPU."""
    size = (loaded.shapes, pages, config.page_size, loaded.dtype, loaded.device)
    if config.device == "cuda":
        from adapters.kernels.backend import TritonKernels  # Triton comes with torch for CUDA only
        from service.engine import draw_triton
        from service.engine.attention_triton import TritonPagedAttention, check_heads

        try:
            for shape in loaded.shapes:
                check_heads(shape.query_heads, shape.kv_heads, shape.head_dim)
        except ValueError as error:
            raise UnsupportedModel(f"{loaded.manifest.architecture}: {error}") from error
        attention = TritonPagedAttention(*size, uniform=config.deterministic)
        lora = TritonKernels(arena, tails=_tails(config, loaded), uniform=config.deterministic)
        return attention, lora, draw_triton.draw
    linears = loaded.manifest.linears
    kernels = ReferenceKernels(
        arena, [module.in_features for module in linears], [module.out_features for module in linears]
    )
    return PagedAttention(*size), kernels, draw.draw


def _tails(config: EngineConfig, loaded: LoadedModel) -> bool:
    """Whether base weights have spare rows. In the deterministic engine every step has the same products."""
    if config.device == "cpu" or config.deterministic:
        return False
    from adapters.kernels.backend import TAIL_TOKENS

    if (config.max_tokens_per_step or tokens_per_step(config.device)) < TAIL_TOKENS:
        return False
    return tail.can_have(loaded.dtype)


def _try_out(runner: Runner, manifest: Manifest, slots: int) -> None:
    """A step of a few tokens, for a model whose code wants more of its linears than their products. Raises
    UnsupportedModel."""
    tokens = min(TRIED, slots, manifest.max_positions)
    pages = -(-tokens // runner.page_size)
    layout = StepLayout(
        slots=np.arange(tokens),
        query_lens=np.array([tokens], dtype=np.int32),
        context_lens=np.array([tokens], dtype=np.int32),
        page_table=np.arange(pages, dtype=np.int32)[None],
        num_decode=int(tokens == 1),
    )
    try:
        runner.forward(np.zeros(tokens, dtype=np.int64), np.arange(tokens), layout, None, np.array([tokens - 1]))
    except (AttributeError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UnsupportedModel(f"{manifest.architecture}: a step fails with LoRA layers in it ({what})") from error


def page_bytes(shapes: list[LayerShape], page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV page over all layers: keys and values."""
    return sum(2 * page_size * shape.kv_heads * shape.head_dim * dtype.itemsize for shape in shapes)


def share_memory(config: EngineConfig, loaded: LoadedModel, budget: int) -> tuple[int, int]:
    """(KV pages, arena bytes): as configured, else shares of what is free once the model is loaded and the
    activations of the largest step have been measured."""
    each = page_bytes(loaded.shapes, config.page_size, loaded.dtype)
    pages, arena_bytes = config.kv_pages, config.arena_bytes
    if config.device == "cpu":
        one_sequence = -(-loaded.manifest.max_positions // config.page_size)
        return pages or max(CPU_KV_BYTES // each, min(one_sequence, 2 * CPU_KV_BYTES // each)), (
            arena_bytes or CPU_ARENA_BYTES
        )
    # The deterministic engine computes the logits of every token.
    wanted = budget if config.deterministic else config.max_sequences
    activations = measure_activations(loaded, budget, wanted, config.max_sequences)
    # Graphs keep theirs, of steps of up to so many tokens.
    activations += activations * min(budget, STEP_SIZES[-1]) // budget
    free, total = torch.cuda.mem_get_info()
    if _tails(config, loaded):
        free -= tail.spare_bytes((site for _, site in sites(loaded.model, loaded.manifest)), loaded.dtype.itemsize)
    usable = int(free - activations - CUDA_HEADROOM * total)
    if not arena_bytes:
        arena_bytes = int((usable - pages * each) * (1.0 if pages else CUDA_ARENA_SHARE))
    if not pages:
        pages = (usable - arena_bytes) // each
    if pages < 1 or arena_bytes < 1:
        raise CannotStart(
            f"memory: after the model {free / 2**30:.1f} GiB are free and a step needs {activations / 2**30:.1f} GiB",
            "lower LORAPLEX_MAX_TOKENS_PER_STEP, LORAPLEX_ARENA_BYTES or LORAPLEX_KV_PAGES",
        )
    return pages, arena_bytes


@torch.inference_mode()
def measure_activations(loaded: LoadedModel, tokens: int, wanted: int, sequences: int) -> int:
    """Peak bytes that a step of `tokens` tokens with `wanted` rows of logits, of them `sequences` sampled, allocates
    beside the weights."""
    device = loaded.device
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.register(attention.Probe())
    try:
        logits = loaded.model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device),
            position_ids=torch.arange(tokens, device=device)[None] % loaded.manifest.max_positions,
            use_cache=False,
            logits_to_keep=torch.arange(min(wanted, tokens), device=device),
        ).logits[0]
        # What sampling with every option on holds at once: float32 logits, probabilities, their order and sums.
        order = logits[:sequences].float().softmax(-1).sort(dim=-1, descending=True)
        del order
    finally:
        attention.register()
    peak = torch.cuda.max_memory_allocated() - before
    del logits
    torch.cuda.empty_cache()
    return int(peak * 1.25)


def _host_bytes(config: EngineConfig) -> int:
    """On CPU blocks are read straight into the arena: a second copy in host memory would buy nothing."""
    if config.device == "cpu":
        return config.host_cache_bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return config.host_cache_bytes or min(CUDA_HOST_CACHE_BYTES, memory // 8)
