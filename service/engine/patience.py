"""When the next step has to be launched, while the device is busy with one. No torch, no clock.

Launched at once, it would wait on the device for the whole step before it, and whoever comes meanwhile would wait for
both. Launched when the device is nearly through, it takes all of them along:

    launch = begin of the step in progress + what such a step takes at least - what the host needs for a launch

Both are learned from the steps there were. Too early costs a newcomer its place in a step, too late costs everybody the
device's idle time, so both are taken from the safe side: the least that such steps took, and three deviations more than
the host needs on average. A time is believed once two steps have shown it, for one can be longer by anything: the first
after a start was seen to take more than twice as long as the next. A launch that was late takes belief away: behind the
next step of that kind nothing is waited for, which shows how long it really takes.
"""

from __future__ import annotations

MARGIN_S = 0.0007
"""Before the time found: for what wakes up late."""
LATE_S = 0.00005
"""A step that was collected without waiting so long was over before: its end is not known, and the next launch was
late."""
RISE = 1 / 16
"""Share of what a step took longer than was believed that is believed from now on."""
OUTLIER = 1.5
"""It counts as at most so many times what was believed (a pause of the host, a compilation)."""
FORGET = 1 / 16
"""Share of what the host needed otherwise than was believed that is believed from now on."""
PROMPTS, SEQUENCES = 64, 16
"""Prompt tokens, and sequences, in multiples of which steps are of one kind."""

Kind = tuple[int, int]


def kind_of(prompts: int, sequences: int) -> Kind:
    """Of a step with so many prompt tokens and sequences."""
    return -(-prompts // PROMPTS), -(-sequences // SEQUENCES)


class Patience:
    def __init__(self) -> None:
        self._least: dict[Kind, float] = {}
        self._once: dict[Kind, float] = {}
        """Where it is not believed yet: a first step took so long, or so long was believed before a late launch."""
        self._host = 0.0
        self._deviation = 0.0
        self.late = 0
        """Steps behind which the next was launched too late: the device stood still in between."""

    @property
    def lead(self) -> float:
        """Seconds before the end of a step from which on newcomers have missed the next."""
        return self._host + 3.0 * self._deviation + MARGIN_S

    def until(self, kind: Kind, began: float) -> float:
        """The time until which the launch behind a step of this kind can wait."""
        return began + self._least.get(kind, 0.0) - self.lead

    def launched(self, seconds: float) -> None:
        """The host took so long from beginning to prepare a step until it was launched."""
        off = seconds - self._host
        self._host += FORGET * off
        self._deviation += FORGET * (abs(off) - self._deviation)

    def took(self, kind: Kind, seconds: float, waited: float) -> None:
        """A step of this kind ended so long after it had begun, after the host had waited for it so long."""
        least = self._least.get(kind)
        if waited < LATE_S:
            self.late += 1
            self._once[kind] = min(self._least.pop(kind, seconds), seconds)
        elif least is not None:
            self._least[kind] = min(seconds, least + RISE * (min(seconds, OUTLIER * least) - least))
        elif kind in self._once:
            self._least[kind] = min(self._once.pop(kind), seconds)
        else:
            self._once[kind] = seconds
