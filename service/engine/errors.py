"""Everything that can go wrong between an API process and the engine, and inside the engine.

EngineError
  EngineRefused        the engine said no to one request (code, message, retry_after_s)
  EngineUnavailable    there is no engine to ask: not started yet, hung, ended or replaced
  EngineCallFailed     a control call (load, unload, residency) was answered with an error
  EngineCallTimedOut   a control call was not answered in time
  CannotStart          starting again will not help: device, memory, model (one line, and a hint)
    UnsupportedModel   the base model needs something that the engine does not implement
  IntegrityError       a pool's book-keeping contradicts itself: a bug, the process must not go on
  EngineBroken         several steps in a row failed: the process must be replaced
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of the engine's failures."""


class EngineRefused(EngineError):  # noqa: N818 - these names say what happened
    """The request was not, or is no longer, served; see messages.Refused for the codes."""

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):  # noqa: N818
    """There is no engine to ask; what was submitted to it is lost."""


class EngineCallFailed(EngineError):  # noqa: N818
    """A control call was answered with an error; the text is the engine's, `code` as in messages.Reply."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class EngineCallTimedOut(EngineError):  # noqa: N818
    """A control call was not answered in time; it may still take effect."""


class CannotStart(EngineError):  # noqa: N818
    """The engine cannot start as it is configured, on this machine. str(): one line; `hint`: what to do."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.hint = hint


class UnsupportedModel(CannotStart):
    """The base model needs something that the engine does not implement; it would answer wrongly."""


class IntegrityError(EngineError):
    """A pool's book-keeping contradicts itself."""


class EngineBroken(EngineError):  # noqa: N818
    """Several steps in a row failed."""
