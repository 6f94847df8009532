"""From the engine's tokens to the client's text: detokenising, stop strings, logprobs, usage.

Knows neither HTTP nor the shapes of the API: openai.py makes a Job of a request and formats the Pieces.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from service.engine.client import EngineClient
from service.engine.errors import EngineRefused
from service.engine.messages import AdapterRef, Delta, SamplingParams, Submit, TokenLogprob
from service.tokenizer import Detokenizer, Tokenizer


@dataclass(slots=True, kw_only=True)
class Job:
    """One request, ready for the engine. Sequence index = prompt number * n + choice number, as in Submit."""

    request_id: str
    prompts: list[list[int]]
    sampling: SamplingParams
    n: int = 1
    adapters: tuple[AdapterRef, ...] = ()
    resident_limits: dict[str, int | None] = field(default_factory=dict)
    """Of the adapters' owners, as in Submit."""
    salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    """The tenant's share, as in Submit."""
    priority: int = 0
    trace: str = ""
    """W3C traceparent, if the request is traced."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Whether a stop string, or the text of a stop token, is part of the answer."""
    skip_special_tokens: bool = True
    continues: bool = False
    """The text goes on where the prompt ends (completions), rather than being a text of its own (chat)."""
    echo: list[str] | None = None
    """Text of each prompt, to stand before the answer."""
    echo_starts: list[list[int]] | None = None
    """Where in that text each token of each prompt starts; None: the text is the decoding of the tokens."""
    score_only: bool = False
    """Nothing is to be generated (max_tokens 0)."""


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far. A prompt counts once, whatever n is, and when its first token has come: who is
    refused, or leaves before, has used nothing."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Token:
    """A token with its logprob (None where there is none: the first of a prompt) and where its text starts, in
    characters of the choice's text."""

    id: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(slots=True)
class Piece:
    """What one choice gains: text that is certain, and the tokens that it belongs to (if logprobs were asked for)."""

    index: int
    text: str
    tokens: list[Token] | None = None
    finish_reason: str | None = None


class Observer(Protocol):
    """Who is told of tokens as they come (the metrics)."""

    def first_token(self, seconds: float) -> None: ...

    def tokens_done(self, tokens: int, seconds: float) -> None: ...


class StopMatcher:
    """Finds stop strings in a stream of text and holds back what may become one.

    The text is read character by character, so the result does not depend on how it is cut into tokens: the string that
    is complete first wins, of those complete at the same character the longest. One Knuth-Morris-Pratt automaton per
    string: constant work per character and string, however often a string almost matches.
    """

    __slots__ = ("_failure", "_held", "_include", "_state", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [stop for stop in dict.fromkeys(stops) if stop]
        self._failure = [_failure(stop) for stop in self._stops]
        self._state = [0] * len(self._stops)
        self._include = include
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """(text that may go out, whether a stop string is complete). While not `armed` (min_tokens) complete ones are
        let through; one that began then and is completed later still counts."""
        if not self._stops:
            return text, False
        buffer = self._held + text
        state = self._state
        for at, char in enumerate(text, len(self._held) + 1):
            complete = 0
            for i, stop in enumerate(self._stops):
                length, failure = state[i], self._failure[i]
                while length and (length == len(stop) or stop[length] != char):
                    length = failure[length - 1]
                if stop[length] == char:
                    length += 1
                state[i] = length
                if length == len(stop):
                    complete = max(complete, length)
            if complete and armed:
                self._held = ""
                return buffer[: at if self._include else at - complete], True
        # A complete one that was let through (not armed) is no longer held, but what it ends with may begin another.
        hold = max(
            length if length < len(stop) else failure[length - 1]
            for length, stop, failure in zip(state, self._stops, self._failure, strict=True)
        )
        self._held = buffer[len(buffer) - hold :]
        return buffer[: len(buffer) - hold], False

    def flush(self) -> str:
        """What was held back, once no more text follows."""
        held, self._held = self._held, ""
        return held


def _failure(word: str) -> list[int]:
    """failure[i]: length of the longest proper prefix of word[: i + 1] that is also its suffix."""
    table = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = table[length - 1]
        if word[i] == word[length]:
            length += 1
        table[i] = length
    return table


@dataclass(slots=True, eq=False)
class _Choice:
    """One sequence on its way from tokens to text."""

    job: Job
    index: int
    detokenizer: Detokenizer
    matcher: StopMatcher
    generated: int = 0
    decoded: int = 0
    """Characters decoded so far, held back or not."""
    released: int = 0
    waiting: list[Token] = field(default_factory=list)
    """Tokens with logprobs whose text has not gone out yet."""
    first_at: float = 0.0
    stopped: bool = False
    """A stop string ended it, so the engine has to be told."""

    def take(self, delta: Delta) -> Piece | None:
        """The piece that a delta makes certain; None if nothing."""
        text = self._decode(delta)
        if delta.finish_reason is not None and not self.stopped:
            text += self._rest()  # which may complete a stop string
        finish = "stop" if self.stopped else delta.finish_reason
        self.released += len(text)
        tokens = self._certain_tokens(finish) if self.job.sampling.logprobs is not None else None
        if not text and not tokens and finish is None:
            return None
        return Piece(self.index, text, tokens, finish)

    def _decode(self, delta: Delta) -> str:
        parts: list[str] = []
        last = len(delta.token_ids) - 1 if delta.finish_reason == "stop" else -1
        for at, token in enumerate(delta.token_ids):
            self.generated += 1
            if delta.logprobs is not None:
                self.waiting.append(Token(token, self.decoded, delta.logprobs[at]))
            if at == last and not self.job.include_stop and token in self.job.sampling.stop_token_ids:
                break  # the token that ends the answer is no part of its text
            text = self.detokenizer.push(token)
            if text and self._feed(parts, text):
                break
        return "".join(parts)

    def _feed(self, parts: list[str], text: str) -> bool:
        self.decoded += len(text)
        out, self.stopped = self.matcher.feed(text, armed=self.generated >= self.job.sampling.min_tokens)
        parts.append(out)
        return self.stopped

    def _rest(self) -> str:
        parts: list[str] = []
        if (text := self.detokenizer.flush()) and self._feed(parts, text):
            return parts[0]
        return "".join(parts) + self.matcher.flush()

    def _certain_tokens(self, finish: str | None) -> list[Token]:
        if finish is not None and not self.stopped:
            out, self.waiting = self.waiting, []
            return out
        # Offsets only grow, so the tokens of the text that went out stand in front.
        count = 0
        while count < len(self.waiting) and self.waiting[count].offset < self.released:
            count += 1
        out, self.waiting = self.waiting[:count], [] if finish is not None else self.waiting[count:]
        return out

    def echo(self, text: str, number: int, delta: Delta, tokenizer: Tokenizer) -> Piece:
        """The prompt of that number as the first piece of the choice; what follows is offset by its length."""
        tokens = None
        if self.job.sampling.logprobs is not None:
            prompt = self.job.prompts[number]
            given = self.job.echo_starts
            starts = self._decoded_starts(prompt, tokenizer) if given is None else given[number]
            logprobs = delta.prompt_logprobs or [None] * len(prompt)
            tokens = [
                Token(token, min(start, len(text)), logprob)
                for token, start, logprob in zip(prompt, starts, logprobs, strict=True)
            ]
        self.decoded = self.released = len(text)
        return Piece(self.index, text, tokens)

    def _decoded_starts(self, prompt: list[int], tokenizer: Tokenizer) -> list[int]:
        reader = Detokenizer(tokenizer, skip_special_tokens=self.job.skip_special_tokens)
        ends = accumulate((len(reader.push(token)) for token in prompt), initial=0)
        return list(ends)[:-1]


class Generation:
    """Runs one Job. Iterate over it for its Pieces; `usage` grows as they come.

    Closing it (aclose), or cancelling the task that iterates, frees every sequence in the engine at once. Raises
    EngineRefused and EngineUnavailable from the iteration.
    """

    def __init__(self, job: Job, engine: EngineClient, tokenizer: Tokenizer, observer: Observer) -> None:
        self.job = job
        self.usage = Usage()
        self._engine = engine
        self._tokenizer = tokenizer
        self._observer = observer
        self._pieces = self._run()

    def __aiter__(self) -> AsyncGenerator[Piece, None]:
        return self._pieces

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        await self._pieces.aclose()

    def _choice(self, index: int) -> _Choice:
        job = self.job
        context = job.prompts[index // job.n] if job.continues else ()
        return _Choice(
            job,
            index,
            Detokenizer(self._tokenizer, context, skip_special_tokens=job.skip_special_tokens),
            StopMatcher(job.stop, job.include_stop),
        )

    async def _run(self) -> AsyncGenerator[Piece, None]:
        job = self.job
        submit = Submit(
            request_id=job.request_id,
            prompts=job.prompts,
            n=job.n,
            adapters=job.adapters,
            resident_limits=job.resident_limits,
            sampling=job.sampling,
            salt=job.salt,
            tenant=job.tenant,
            tenant_weight=job.weight,
            priority=job.priority,
            trace=job.trace,
        )
        started = time.perf_counter()
        choices: dict[int, _Choice] = {}
        unfinished = set(range(len(job.prompts) * job.n))
        unbegun = set(range(len(job.prompts)))
        async with self._engine.submit(submit) as stream:
            async for delta in stream:
                if delta.index not in unfinished:
                    continue
                if delta.finish_reason == "error":
                    raise EngineRefused("engine_error", "the engine failed while it ran the request")
                choice = choices.get(delta.index)
                if choice is None:
                    choice = choices[delta.index] = self._choice(delta.index)
                    choice.first_at = time.perf_counter()
                    self._observer.first_token(choice.first_at - started)
                    number = delta.index // job.n
                    if number in unbegun:
                        unbegun.discard(number)
                        self.usage.prompt_tokens += len(job.prompts[number])
                    if delta.index % job.n == 0:
                        self.usage.cached_tokens += delta.cached_tokens
                    if job.echo is not None:
                        yield choice.echo(job.echo[number], number, delta, self._tokenizer)
                if job.score_only:  # nor is what the detokenizer still has of the prompt a text of the answer
                    unfinished.discard(delta.index)
                    yield Piece(delta.index, "", None, "length")
                    continue
                before = choice.generated
                piece = choice.take(delta)
                self.usage.completion_tokens += choice.generated - before
                if piece is None:
                    continue
                if piece.finish_reason is not None:
                    unfinished.discard(delta.index)
                    if choice.stopped and delta.finish_reason is None:
                        self._engine.abort(job.request_id, delta.index)
                    self._observer.tokens_done(choice.generated, time.perf_counter() - choice.first_at)
                yield piece
