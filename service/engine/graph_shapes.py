"""What CUDA graphs are captured for: shapes of steps, and of each the LoRA plans that it can serve. See graphs.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from adapters.kernels import tail
from adapters.kernels.backend import TAIL_TOKENS
from service.engine.attention import StepLayout
from service.engine.budgets import MIXED_SEQUENCES, STEP_SIZES
from service.engine.step_arrays import SMALL_TILE

MAX_MIX = 8
"""Adapters of a request at most (build.MAX_ADAPTERS_PER_REQUEST)."""


def decode_sizes(max_sequences: int) -> list[int]:
    """Numbers of decoding sequences that graphs are captured for, ascending: every batch pads by less than a quarter
    or 16."""
    wanted = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, *range(256, max_sequences, 64), max_sequences]
    return sorted({min(size, max_sequences) for size in wanted})


@dataclass(frozen=True, slots=True)
class Shape:
    """What one set of graphs has room for."""

    tokens: int
    sequences: int
    tiles: int = 0
    """Of prompts; 0: every sequence decodes."""
    wanted: int = 0
    """Tokens whose logits are computed; 0: all."""

    def fits(self, tokens: int, layout: StepLayout) -> bool:
        return tokens <= self.tokens and len(layout.context_lens) <= self.sequences


def shapes(max_sequences: int, max_tokens: int) -> list[Shape]:
    """All, in the order in which a batch looks for one that fits."""
    decode = [Shape(size, size) for size in decode_sizes(max_sequences)]
    sequences = min(max_sequences, MIXED_SEQUENCES)
    # The budget is one of the sizes: long prompts are cut into just so many tokens.
    sizes = sorted({min(size, max_tokens) for size in STEP_SIZES})
    mixed = [Shape(size, sequences, max(16, -(-size // SMALL_TILE)), sequences) for size in sizes]
    return decode + mixed


def one_shape(max_sequences: int, max_tokens: int) -> Shape:
    """The deterministic engine's: no step is too large for it."""
    sequences = min(max_sequences, max_tokens)
    return Shape(max_tokens, sequences, sequences + max_tokens // SMALL_TILE, max_tokens)


@dataclass(frozen=True, slots=True)
class Variant:
    """A LoRA plan that a graph can serve."""

    rank: int
    """Largest, of the adapters whose deltas are computed beside the product; 0: it has none of those."""
    waves: int
    block_m: int
    """Entries of a tile of theirs."""
    slots: int = 0
    """Adapters with many tokens each stand in the tails of the base weights (adapters/kernels/tail.py), in so many
    slots; 0: none does."""


VARIANTS = (Variant(16, 1, 16), Variant(64, 1, 16), Variant(512, 4, 16))
"""The last is for everything else: what it launches for nothing costs about 0.6 ms in 32 layers."""
DECODE_VARIANTS = (*VARIANTS[:2], Variant(512, 1, 16), VARIANTS[2])
"""With one for high ranks without mixes: a step that only decodes takes a third of one with a prompt, so launches for
nothing weigh more there."""
LARGE_VARIANT = Variant(512, 4, 64)
"""For adapters of many tokens each that no tail has room for."""
TAIL_VARIANTS = (Variant(0, 0, 0, slots=1), Variant(0, 0, 0, slots=tail.SLOTS))
"""All adapters stand in the tails."""
BOTH_VARIANTS = tuple(replace(variant, slots=tail.SLOTS) for variant in VARIANTS)
"""Those of the prompts do, the others' deltas are computed beside the product."""
BOTH_TOKENS = 384
"""From so many tokens on they serve what VARIANTS do in smaller steps: with 63 sequences of as many adapters and 449
tokens of prompts 1 to 2% faster, with 65 tokens 3% slower (H100)."""
SLOTS_TOKENS = 96
"""From so many decoding sequences on there is one with all slots: two adapters have many tokens each then."""
MANY_VARIANT = Variant(512, MAX_MIX, 16)
"""For mixes of more adapters than the others hold. Each of its graphs has twice their launches, so few shapes have one,
and a step with such a mix takes the next of those: at most some ms longer, where launched kernel by kernel it takes 26
to 75 ms."""
MANY_DECODING, MANY_TOKENS = 64, 640
"""The first shapes that have one, of steps that decode and of those with prompts; so have the largest."""
SAME_VARIANTS = (Variant(512, 1, 16), MANY_VARIANT)
"""The deterministic engine's: they differ in launches that find nothing to do, and give every token the same bits."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a plan asks of the kernels beside the product."""

    rank: int
    waves: int
    block_m: int
    """Tiles that are best for it."""


def candidates(variants: Iterable[Variant], whole: Need, rest: Need | None) -> list[Variant]:
    """Those that can serve a step, best first. whole: of all its adapters; rest: of those that cannot stand in the
    tails, None if all can. Ranks that no tail has room for are worth tiles of the size that is wanted, and no tail."""

    def fits(v: Variant) -> bool:
        if not v.slots:
            return whole.rank <= v.rank and whole.waves <= v.waves
        if rest is None:
            return True
        return rest.rank <= v.rank and rest.waves <= v.waves and (rest.rank <= tail.RANKS or rest.block_m == v.block_m)

    return sorted(
        filter(fits, variants),
        key=lambda v: (not v.slots, v.slots > 0 and v.waves > 0, v.slots, v.rank, v.block_m != whole.block_m, v.waves),
    )


def variants_of_shapes(max_sequences: int, max_tokens: int, *, tails: bool) -> dict[Shape, tuple[Variant | None, ...]]:
    """What is captured for each shape, in the order of `shapes`; None is a step without LoRA. tails: the base weights
    have spare rows."""
    found: dict[Shape, tuple[Variant | None, ...]] = {}
    every = shapes(max_sequences, max_tokens)
    for shape in every:
        alike = [other.tokens for other in every if bool(other.tiles) == bool(shape.tiles)]
        first = min((size for size in alike if size >= (MANY_TOKENS if shape.tiles else MANY_DECODING)), default=0)
        many = (MANY_VARIANT,) if shape.tokens in (first, alike[-1]) else ()
        tailed = TAIL_VARIANTS if tails and shape.tokens >= TAIL_TOKENS else ()
        if not shape.tiles:
            found[shape] = (None, *tailed[: 1 if shape.tokens < SLOTS_TOKENS else 2], *DECODE_VARIANTS, *many)
        elif tailed:
            beside = BOTH_VARIANTS if shape.tokens >= BOTH_TOKENS else VARIANTS
            found[shape] = (None, *tailed, *beside, LARGE_VARIANT, *many)
        else:
            found[shape] = (None, *VARIANTS, *many)
    return found
