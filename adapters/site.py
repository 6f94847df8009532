"""A site: one physical matrix product of the model, and where each adapter target lies in its output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """One product y[T, out_features] = x[T, in_features] W0ᵀ, shared by one or more targets.

    Target `targets[j]` (a target index of the manifest) owns the output columns
    `offsets[j] : offsets[j] + widths[j]`. A fused q/k/v product is one site with three targets.
    """

    targets: tuple[int, ...]
    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    in_features: int
    out_features: int
