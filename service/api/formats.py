"""The JSON of answers, whole and streamed. Events are put together from prepared pieces of JSON, because a process
sends tens of thousands of them a second: a pydantic model for each would cost more than everything else.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import msgspec

from service.api.generation import Piece, Token, Usage
from service.tokenizer import Tokenizer

_json = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
# JSON has no -inf; OpenAI shows the impossible so.
_LOWEST = -9999.0


def error_event(body: dict[str, Any]) -> bytes:
    """What ends a stream that failed, in place of [DONE]."""
    return b"event: error\ndata: " + _json(body) + b"\n\n"


class Format(Protocol):
    """One answer's shape."""

    def events(self, piece: Piece) -> bytes:
        """The server-sent events of a piece."""

    def usage_event(self, usage: Usage) -> bytes: ...

    def add(self, piece: Piece) -> None:
        """Gather a piece of an answer that is sent as a whole."""

    def whole(self, usage: Usage) -> bytes:
        """The body made of what was gathered."""


class _Answer:
    """What both shapes share."""

    _prefix: str
    _object: str
    _chunk_object: str

    def __init__(self, request_id: str, model: str, sequences: int, tokenizer: Tokenizer, *, with_usage: bool) -> None:
        """`model`: as the request named it. `with_usage`: the stream ends with a usage chunk, and every other chunk
        says that it has none."""
        self._tokenizer = tokenizer
        self._head = {"id": self._prefix + request_id, "object": self._object, "created": int(time.time())}
        self._head["model"] = model
        self._chunk_head = _json({**self._head, "object": self._chunk_object})[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._texts: list[list[str]] = [[] for _ in range(sequences)]
        self._tokens: list[list[Token] | None] = [None] * sequences
        self._finish: list[str | None] = [None] * sequences

    def add(self, piece: Piece) -> None:
        self._texts[piece.index].append(piece.text)
        if piece.tokens is not None:
            self._tokens[piece.index] = [*(self._tokens[piece.index] or ()), *piece.tokens]
        self._finish[piece.index] = piece.finish_reason or self._finish[piece.index]

    def usage_event(self, usage: Usage) -> bytes:
        return b"data: " + self._chunk_head + b'],"usage":' + _json(usage_json(usage)) + b"}\n\n"

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, usage: Usage) -> bytes:
        choices = [self._choice(index) for index in range(len(self._texts))]
        return _json({**self._head, "choices": choices, "usage": usage_json(usage)})

    def _event(self, choice: bytes) -> bytes:
        return b"data: " + self._chunk_head + choice + self._tail


class CompletionFormat(_Answer):
    """/v1/completions."""

    _prefix, _object, _chunk_object = "cmpl-", "text_completion", "text_completion"

    def events(self, piece: Piece) -> bytes:
        logprobs = b"null" if piece.tokens is None else _json(self._logprobs(piece.tokens))
        return self._event(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (piece.index, _json(piece.text), logprobs, _json(piece.finish_reason))
        )

    def _choice(self, index: int) -> dict[str, Any]:
        tokens = self._tokens[index]
        return {
            "index": index,
            "text": "".join(self._texts[index]),
            "logprobs": None if tokens is None else self._logprobs(tokens),
            "finish_reason": self._finish[index],
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        text = self._tokenizer.token_text
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            if token.logprob is None or not token.logprob.top:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            # The chosen one is always among them; different tokens may have the same text, then the likelier stands.
            for id, value in [*token.logprob.top, (token.id, token.logprob.logprob)]:
                top.setdefault(text(id), _finite(value))
            tops.append(top)
        return {
            "tokens": [text(token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob.logprob) for token in tokens],
            "top_logprobs": tops if any(top is not None for top in tops) else None,
            "text_offset": [token.offset for token in tokens],
        }


class ChatFormat(_Answer):
    """/v1/chat/completions."""

    _prefix, _object, _chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opened: set[int] = set()

    def events(self, piece: Piece) -> bytes:
        out = b""
        index = piece.index
        if index not in self._opened:
            self._opened.add(index)
            role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            out = self._event(role % index)
        if piece.text or piece.tokens:
            logprobs = b"null" if piece.tokens is None else _json(self._logprobs(piece.tokens))
            content = b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}'
            out += self._event(content % (index, _json(piece.text), logprobs))
        if piece.finish_reason is not None:
            last = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}'
            out += self._event(last % (index, _json(piece.finish_reason)))
        return out

    def _choice(self, index: int) -> dict[str, Any]:
        tokens = self._tokens[index]
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(self._texts[index]), "refusal": None},
            "logprobs": None if tokens is None else self._logprobs(tokens),
            "finish_reason": self._finish[index],
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        entries = []
        for token in tokens:
            if token.logprob is None:
                continue
            top = [self._entry(id, value) for id, value in token.logprob.top]
            entries.append({**self._entry(token.id, token.logprob.logprob), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._tokenizer.token_text(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _finite(value: float) -> float:
    return value if value > _LOWEST else _LOWEST
