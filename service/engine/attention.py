"""Attention over a paged KV cache: what transformers' layers call instead of their own attention.

The model's code hands over q, k, v of the packed step, [1, heads, T, head_dim]. Every layer owns two tensors
[pages, page_size, kv_heads, head_dim]; the step's layout (which tokens belong to which sequence, and where its
pages are) is the same for all layers and is set once per step. `PagedAttention` here computes in plain torch (SDPA over
gathered pages): the path on CPU and the oracle for the Triton kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from adapters.kernels.opaque import opaque
from service.engine.errors import UnsupportedModel

NAME = "loraplex"
HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"})
"""Keyword arguments of an attention call that do not change its result here."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the packed tokens of a step belong. Decoding sequences (one token each) come first."""

    slots: NDArray[np.int64]
    """[T] page * page_size + offset of each token's KV entry."""
    query_lens: NDArray[np.int32]
    """[S] tokens of each sequence in this step, in token order."""
    context_lens: NDArray[np.int32]
    """[S] KV entries of each sequence, this step's included."""
    page_table: NDArray[np.int32]
    """[S, most pages]; unused places are 0."""
    num_decode: int
    """The first so many sequences have one query token."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One attention layer, as seen when the model was probed at load."""

    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    """Sliding window: a query at position p sees keys at positions > p - window."""
    softcap: float | None = None
    """Scores are softcap · tanh(score / softcap) (Gemma 2)."""


class Attention(Protocol):
    """A backend: owns the KV cache of all layers, (k, v) by layer number."""

    tensors: dict[int, tuple[Tensor, Tensor]]

    def begin_step(self, layout: StepLayout) -> None: ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [T, query_heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, query_heads, head_dim], contiguous; k
        and v are written to their slots of the caches first. scaling, window, softcap: of LayerShape."""


class PagedAttention:
    """The torch backend. `tensors` holds (k, v) by layer, each [pages, page_size, kv_heads, head_dim].

    Decoding sequences are read padded, under a mask, which is no wall: 0 * NaN is NaN, and the score of a huge key
    overflows before it is masked. So a sequence reads its own pages alone, and a page is cleared for its next owner: an
    adapter that overflows does not reach its neighbours."""

    def __init__(
        self, shapes: list[LayerShape], pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.device = device
        self.tensors = allocate_cache(shapes, pages, page_size, dtype, device)

    def begin_step(self, layout: StepLayout) -> None:
        self.layout = layout
        self._slots = torch.from_numpy(layout.slots).to(self.device)
        begun = layout.slots[layout.slots % self.page_size == 0] // self.page_size
        self._begun = torch.from_numpy(begun).to(self.device) if len(begun) else None
        used = -(-layout.context_lens // self.page_size)
        padding = np.arange(layout.page_table.shape[1]) >= used[:, None]
        tables = np.where(padding, layout.page_table[:, :1], layout.page_table).astype(np.int64)
        self._tables = torch.from_numpy(tables).to(self.device)
        self._decode_masks: dict[int | None, Tensor] = {}
        self._chunk_masks: dict[tuple[int, int | None], Tensor | None] = {}
        n = layout.num_decode
        if n:
            self._decode_pages = int(-(-layout.context_lens[:n].max() // self.page_size))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        if self._begun is not None:
            for cache in (k_cache, v_cache):
                cache.index_fill_(0, self._begun, 0.0)
        k_cache.view(-1, *k.shape[1:]).index_copy_(0, self._slots, k)
        v_cache.view(-1, *v.shape[1:]).index_copy_(0, self._slots, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        n = self.layout.num_decode
        if n:
            out[:n] = self._decode(q[:n], k_cache, v_cache, scaling, window, softcap)
        start = n
        for s in range(n, len(self.layout.query_lens)):
            end = start + int(self.layout.query_lens[s])
            q_, k_, v_ = (t[start:end] for t in (q, k, v))
            out[start:end] = self._chunk(s, q_, k_, v_, k_cache, v_cache, scaling, window, softcap)
            start = end
        return out

    def _decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """All decoding sequences at once, padded to the longest; the heads of a KV group are the query rows."""
        n, length = len(q), self._decode_pages * self.page_size
        pages = self._tables[:n, : self._decode_pages].reshape(-1)
        k, v = (c[pages].view(n, length, *c.shape[2:]).transpose(1, 2) for c in (k_cache, v_cache))
        mask = self._decode_masks.get(window)
        if mask is None:
            context = torch.from_numpy(self.layout.context_lens[:n].astype(np.int64)).to(self.device)[:, None]
            position = torch.arange(length, device=self.device)[None]
            visible = position < context
            if window is not None:
                visible &= position >= context - window
            mask = self._decode_masks[window] = visible[:, None, None, :]
        grouped = q.reshape(n, k.shape[1], -1, q.shape[2])
        mask = mask.expand(n, 1, grouped.shape[2], length)
        return scaled_attention(grouped, k, v, mask, scaling, softcap).reshape(q.shape)

    def _chunk(
        self,
        s: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One sequence's prefill chunk against its own context."""
        context = int(self.layout.context_lens[s])
        if context > len(q):
            pages = self._tables[s, : -(-context // self.page_size)]
            k, v = (c[pages].flatten(0, 1)[:context] for c in (k_cache, v_cache))
        key = (s, window)
        if key not in self._chunk_masks:
            self._chunk_masks[key] = chunk_mask(len(q), context, window, self.device)
        mask = self._chunk_masks[key]
        q4, k4, v4 = (t.transpose(0, 1)[None] for t in (q, k, v))
        return scaled_attention(q4, k4, v4, mask, scaling, softcap)[0].transpose(0, 1)


def scaled_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """q [n, heads, T, head_dim], k and v [n, kv_heads, S, head_dim] -> q's shape. visible: True where a query may look,
    to be broadcast to [n, heads, T, S]; None: T = S and a query sees its own key and those before it."""
    group = q.shape[1] // k.shape[1]
    if softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, visible, is_causal=visible is None, scale=scaling, enable_gqa=group > 1
        )
    if visible is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = softcap * torch.tanh((q @ k.mT).float() * (scaling / softcap))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v


def allocate_cache(
    shapes: list[LayerShape], pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> dict[int, tuple[Tensor, Tensor]]:
    """(k, v) of every layer, each [pages, page_size, kv_heads, head_dim]."""

    def one(shape: LayerShape) -> Tensor:
        return torch.zeros(pages, page_size, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)

    return {shape.layer: (one(shape), one(shape)) for shape in shapes}


def chunk_mask(queries: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """[queries, context] of True where a query may look; None where plain causal attention says the same."""
    if queries == context and (window is None or window >= context):
        return None
    q = torch.arange(context - queries, context, device=device)[:, None]
    k = torch.arange(context, device=device)[None]
    visible = k <= q
    if window is not None:
        visible &= k > q - window
    return visible


class Current:
    """The backend that the attention operator calls; one per process, as there is one engine thread."""

    backend: Attention | None = None


def _like_q(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@opaque(_like_q, mutates=("k_cache", "v_cache"))
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention.attend of the current backend, opaque to torch.compile: it reads the step's layout when it runs, so
    one compiled layer, or one captured CUDA graph, serves every batch."""
    if Current.backend is None:
        raise RuntimeError("no attention backend is attached")
    return Current.backend.attend(q, k, v, k_cache, v_cache, scaling, window, softcap)


def attach(modules: list[nn.Module], shapes: list[LayerShape], backend: Attention) -> None:
    """Gives every attention module its KV cache. Buffers, not attributes: torch.compile then takes them as inputs
    and one compiled layer serves all."""
    Current.backend = backend
    for module, shape in zip(modules, shapes, strict=True):
        k_cache, v_cache = backend.tensors[shape.layer]
        module.register_buffer("loraplex_k", k_cache, persistent=False)
        module.register_buffer("loraplex_v", v_cache, persistent=False)
        module.loraplex_scaling = shape.scaling  # type: ignore[assignment]
        module.loraplex_window = shape.window  # type: ignore[assignment]
        module.loraplex_softcap = shape.softcap  # type: ignore[assignment]


def attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: q [1, heads, T, d], k, v [1, kv_heads, T, d] -> ([1, T, heads, d], None)."""
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    caches = (module.loraplex_k, module.loraplex_v)
    rest = (*caches, module.loraplex_scaling, module.loraplex_window, module.loraplex_softcap)
    if torch.compiler.is_compiling() or Current.backend is None:
        return attend(q, k, v, *rest)[None], None
    return Current.backend.attend(q, k, v, *rest)[None], None  # an operator's call costs tens of microseconds


class Probe:
    """Stands in for the backend while a model is probed at load: notes every attention call and refuses what the
    backends do not implement, rather than answer wrongly."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, LayerShape]] = []

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        where = f"attention layer {len(self.calls)} ({type(module).__name__})"
        scaling = kwargs.pop("scaling", None)
        window = kwargs.pop("sliding_window", None)
        softcap = kwargs.pop("softcap", None)
        if kwargs.pop("dropout", 0.0) or kwargs.pop("is_causal", True) is False:
            raise UnsupportedModel(f"{where}: only causal attention without dropout is served")
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(f"{where}: is_causal=False, bidirectional attention is not served")
        unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in HARMLESS)
        if unknown or attention_mask is not None:
            what = ", ".join(unknown) or "an attention mask of its own"
            raise UnsupportedModel(f"{where}: uses {what}, which is not implemented; serving it would answer wrongly")
        if v.shape[-1] != q.shape[-1]:
            raise UnsupportedModel(f"{where}: value heads of {v.shape[-1]} and query heads of {q.shape[-1]} dimensions")
        shape = LayerShape(
            layer=len(self.calls),
            query_heads=q.shape[1],
            kv_heads=k.shape[1],
            head_dim=q.shape[-1],
            scaling=float(q.shape[-1] ** -0.5 if scaling is None else scaling),
            window=window,
            softcap=None if softcap is None else float(softcap),
        )
        self.calls.append((module, shape))
        # What comes out is of no interest, what it takes is measured: no memory for scores, as the soft cap would need.
        return scaled_attention(q, k, v, None, shape.scaling).transpose(1, 2).contiguous(), None


def register(function: Any = attention) -> None:
    """Makes `attn_implementation="loraplex"` known to transformers. The name is deliberately not in the mask
    interface: transformers then builds no mask at all."""
    AttentionInterface.register(NAME, function)
