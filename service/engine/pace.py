"""What a step takes, learned from the steps there were. No torch, no clock.

    seconds = fixed + each prompt token + each sequence

The engine tells how long its steps took (`observe`), so this holds for the device, the model, its adapters and the
lengths of the moment, where constants would not: a sequence that decodes costs 2 or 7 times what a prompt token does
with two versions of the same kernels. Normalised least mean squares: each error is taken back in part, divided between
the terms by their size in that step. Where steps are always alike the terms cannot be told apart, but then their sum
is right, and that is what is asked for.
"""

from __future__ import annotations

RATE = 0.2
"""Share of an error that is taken back at once."""
OUTLIER = 4.0
"""A step that took longer than so many times what was expected (a collector's pause, a compilation) counts as that."""
SEQUENCES = 32.0
"""So many sequences weigh in an error what `bound` prompt tokens do."""


class StepTimes:
    """Begins with `seconds` for `bound` prompt tokens, half of it fixed, and 4 prompt tokens for a sequence."""

    def __init__(self, bound: int, seconds: float) -> None:
        self._bound = float(bound)
        self._fixed = seconds / 2.0
        self._prompts = seconds
        self._sequences = seconds * min(1.0, 4.0 * SEQUENCES / bound)

    def observe(self, tokens: int, sequences: int, seconds: float) -> None:
        """A step of `tokens` prompt tokens and so many sequences took so long."""
        p, d = tokens / self._bound, sequences / SEQUENCES
        expected = self._fixed + p * self._prompts + d * self._sequences
        part = RATE * (min(seconds, OUTLIER * expected) - expected) / (1.0 + p * p + d * d)
        self._fixed = max(1e-6, self._fixed + part)
        self._prompts = max(1e-6, self._prompts + p * part)
        self._sequences = max(1e-6, self._sequences + d * part)

    def step(self, tokens: float, sequences: float) -> float:
        """Seconds."""
        return self._fixed + tokens / self._bound * self._prompts + sequences / SEQUENCES * self._sequences

    def tokens_in(self, seconds: float) -> int:
        """Prompt tokens that take so long, without the fixed part."""
        return int(max(0.0, seconds) / self._prompts * self._bound)

    def sequences_in(self, seconds: float) -> int:
        """The same for sequences that decode."""
        return int(max(0.0, seconds) / self._sequences * SEQUENCES)
