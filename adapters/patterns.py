"""Regular expressions out of uploaded configurations: PEFT's meaning, with a time limit.

PEFT matches them with `re`, which cannot be stopped: one pattern like (.*.*)*x could hold a process for ever. The
`regex` package matches the same language with a time-out. Where the two read a pattern differently (fuzzy
matching {e<=1}, POSIX classes [[:alpha:]]) the pattern is refused, and so is all that `re` refuses.
"""

from __future__ import annotations

import re
import time
from typing import Any

import regex

from adapters.errors import shown

BUDGET_SECONDS = 2.0
"""CPU time of one thread for all patterns of an adapter together; an honest configuration needs milliseconds."""
MAX_PATTERN_CHARS = 16384
"""Some trainers write the names of all modules, joined by |."""
MAX_EXPANSION = 1_000_000
"""Pattern length times all repeat counts: `regex` expands counted repeats when it compiles, so that 20 characters such
as (?:a{50000}){50000} would take all memory there."""

_REPEAT = re.compile(r"\{(?:(\d+)(?:,(\d*))?|,(\d+))\}")
_SET_OPERATORS = ("--", "&&", "~~", "||")


class PatternError(ValueError):
    """A pattern that is not a regular expression of the accepted kind; the message says why."""


class PatternTimeoutError(PatternError):
    """Matching took too long; the message names the field."""


class Budget:
    """CPU seconds that the patterns of one adapter may still use."""

    def __init__(self, seconds: float | None = None) -> None:
        self.total = self.remaining = BUDGET_SECONDS if seconds is None else seconds


class Pattern:
    """One compiled pattern of field `field`; `template` wraps it as PEFT does before matching ({} is the pattern)."""

    def __init__(self, field: str, source: str, budget: Budget, template: str = "{}") -> None:
        self.field, self.source, self.budget = field, source, budget
        if len(source) > MAX_PATTERN_CHARS:
            raise PatternError(
                f"{field}: a regular expression of {len(source)} characters; at most {MAX_PATTERN_CHARS} are accepted"
            )
        fault = _fault(source)
        if fault:
            raise PatternError(f"{field}: regular expression {shown(source)}: {fault}")
        whole = template.replace("{}", source)
        self._charge(0.0)
        started = time.thread_time()
        try:
            re.compile(whole)  # refuses what PEFT would refuse
            self._compiled: Any = regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            why = ascii(str(error))[1:-1]  # it quotes the pattern, control characters and all
            raise PatternError(
                f"{field}: {shown(source)} is not a regular expression that Python's re accepts: {why}"
            ) from error
        self._charge(time.thread_time() - started)

    def fullmatch(self, name: str) -> Any:
        """Match object or None, as re.fullmatch. PatternTimeoutError when the budget is used up."""
        return self._run(self._compiled.fullmatch, name)

    def match(self, name: str) -> Any:
        """Match object or None, as re.match. PatternTimeoutError when the budget is used up."""
        return self._run(self._compiled.match, name)

    def _run(self, function: Any, name: str) -> Any:
        timeout = self.budget.remaining
        while True:
            self._charge(0.0)
            started = time.thread_time()
            try:
                return function(name, timeout=timeout)
            except TimeoutError:
                # `regex` counts the CPU time of all threads, the budget only this one's: beside a busy engine, go on.
                timeout *= 2
                used = time.thread_time() - started
                if used >= self.budget.remaining / 2:
                    self._charge(self.budget.remaining)
            except MemoryError:
                self._charge(self.budget.remaining)
            finally:
                self._charge(time.thread_time() - started)

    def _charge(self, seconds: float) -> None:
        self.budget.remaining -= seconds
        if self.budget.remaining <= 0:
            raise PatternTimeoutError(
                f"{self.field}: matching regular expression {shown(self.source)} took too long"
                f" (at most {self.budget.total:g} s for all patterns); write a simpler one or list the module names"
            )


def _fault(source: str) -> str | None:
    """What `re` and `regex` would read differently, or what would expand too far; None if neither."""
    position, in_set, expansion = 0, False, len(source)
    while position < len(source):
        char = source[position]
        if char == "\\":
            position += 2
            continue
        if in_set:
            if char == "[" or source[position : position + 2] in _SET_OPERATORS:
                return "a nested or combined character set is not accepted; escape the character with a backslash"
            if char == "]":
                in_set = False
        elif char == "[":
            in_set = True
            # A leading ] (after an optional ^) is an ordinary member of the set.
            if source[position + 1 : position + 2] == "^":
                position += 1
            if source[position + 1 : position + 2] == "]":
                position += 1
        elif char == "{":
            repeat = _REPEAT.match(source, position)
            if not repeat:
                return "a brace that is no repeat count must be escaped with a backslash"
            expansion *= max(1, *(int(count[:9]) for count in repeat.groups() if count))
            if expansion > MAX_EXPANSION:
                return "its repeat counts are too large; use * or smaller counts"
        position += 1
    return None
