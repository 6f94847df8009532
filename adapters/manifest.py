"""What the engine says of its base model, so that adapters can be validated against it without torch."""

from __future__ import annotations

from typing import Literal

import msgspec

ModuleKind = Literal["linear", "embedding", "output"]


class Module(msgspec.Struct, frozen=True, array_like=True):
    """One module of the base model that an adapter may name.

    `name` is the dotted path inside the Hugging Face model, as PEFT sees it: `model.layers.0.self_attn.q_proj`.
    A linear computes y[d] = x[k] W0ᵀ with `out_features` = d and `in_features` = k; `output` is the LM head (also
    a linear, but `all-linear` leaves it out, as PEFT does); for `embedding`, in_features is the vocabulary.
    """

    name: str
    kind: ModuleKind
    in_features: int
    out_features: int


class Manifest(msgspec.Struct, frozen=True):
    """The base model, as the engine loaded it. The index of a linear in `linears` is its target index everywhere:
    in blocks, in the arena's table and in kernels."""

    fingerprint: str
    """Changes whenever weights or architecture change; part of every block file's key."""
    architecture: str
    model_type: str
    dtype: Literal["float32", "bfloat16", "float16"]
    """Compute dtype, and so the dtype of blocks."""
    vocab_size: int
    max_positions: int
    modules: tuple[Module, ...]
    """Every module an adapter may name, in model order."""
    former: tuple[str, ...] = ()
    """Fingerprints that earlier versions of this code gave for the same base: what was stored with one still fits."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All that this base is known by."""
        return (self.fingerprint, *self.former)

    @property
    def linears(self) -> tuple[Module, ...]:
        """The servable targets, in model order (so layer-major); position in this tuple = target index."""
        return tuple(m for m in self.modules if m.kind == "linear")
