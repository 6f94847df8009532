"""Text to token ids and back, from the files of a Hugging Face folder; no transformers, so no torch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from service.chat_template import ChatTemplate

# Encoding runs at about 2.8 MB/s, so this much holds the event loop up for under a millisecond.
_INLINE_CHARACTERS = 2048
_REPLACEMENT = "\ufffd"
# Tokens of the prompt that a continuation is decoded with: enough for any decoder to know that it is not at a start.
_CONTEXT = 6
# Encodings take 500 bytes a token, ids 40, so the texts of a request become ids so many characters at a time.
_BATCH_CHARACTERS = 1 << 18
# A character is at most four bytes and so four tokens; far more undecodable ones in a row will never become text.
_LONGEST_PENDING = 64


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, as many at once as have _BATCH_CHARACTERS together, at least one."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


class TokenizerError(ValueError):
    """The folder has no tokenizer that can be used."""


class Tokenizer:
    """The tokenizer of one model folder. Encoding and decoding are thread-safe."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat: ChatTemplate, eos_token_ids: tuple[int, ...]) -> None:
        # Saved training settings would cut or pad prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Offsets are for starts() alone, where a token has the spaces that are part of it.
        post = tokenizer.post_processor
        parts: Any = post if hasattr(post, "__getitem__") else (post,)
        for part in parts:
            if hasattr(part, "trim_offsets"):
                part.trim_offsets = False
        self._tokenizer = tokenizer
        self.chat = chat
        self.eos_token_ids = eos_token_ids
        """Every id that ends an answer: those of generation_config.json (or config.json) and the eos_token."""
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self._added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
        state = json.loads(tokenizer.to_str())["decoder"] or {}
        kinds = {part["type"] for part in (state, *state.get("decoders", ()))} if state else set()
        self._byte_level = "ByteLevel" in kinds
        # A byte-level token has a character for each of its bytes. A normaliser may make one character of several.
        longest = max(map(len, vocabulary), default=0) * (1 if tokenizer.normalizer is None else 4)
        self.characters_per_token: int | None = longest if self._byte_level else None
        """No token stands for more characters; None: unknown."""
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, the chat templates,
        generation_config.json and config.json. Raises TokenizerError."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises bare Exception
            raise TokenizerError(f"{path} cannot be read: {exc}") from exc
        config = _read(folder / "tokenizer_config.json")
        special = _special_tokens(config, _read(folder / "special_tokens_map.json"))
        eos = _eos_ids(_read(folder / "generation_config.json")) or _eos_ids(_read(folder / "config.json"))
        token = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
        eos_ids = tuple(dict.fromkeys([*eos, *([] if token is None else [token])]))
        return cls(tokenizer, ChatTemplate.load(folder, config, special), eos_ids)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; `add_special_tokens` lets the tokenizer's post-processor add what it does (BOS)."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self.encode_now(texts, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_now, texts, add_special_tokens=add_special_tokens)

    def encode_now(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        # Only the batch call releases the GIL: 1.8 MB of text stall other threads for 4 ms, with encode() for 1.6 s.
        ids: list[list[int]] = []
        for batch in _batches(texts):
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
            ids += [encoding.ids for encoding in encodings]
        return ids

    async def starts(self, texts: Sequence[str]) -> list[list[int]]:
        """Where in its text each token of encode() starts, in characters. What the post-processor adds (BOS) has no
        width. Not by decoding: a normaliser, or a special token that swallows spaces, gives another text back."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self._starts(texts)
        return await asyncio.to_thread(self._starts, texts)

    def _starts(self, texts: Sequence[str]) -> list[list[int]]:
        all_starts: list[list[int]] = []
        for batch in _batches(texts):
            for encoding in self._tokenizer.encode_batch(batch):
                starts: list[int] = []
                end = 0
                for (start, stop), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
                    starts.append(end if added else min(start, end))
                    end = end if added else stop
                all_starts.append(starts)
        return all_starts

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary have none."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; a token may be part of a character. Empty outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def _make_bytes(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[char] for char in token)
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token as OpenAI shows it in logprobs: its text, or `bytes:\\xe2\\x82` where it is not text by itself."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Detokenizer:
    """Text of one sequence, token by token, in constant time per token and never half a character.

    What push() and flush() return adds up to the decoding of all tokens after `context` (the end of the prompt, where
    the text continues one). Only the tokens since the last but one piece of text are decoded again: decoders look at
    most one token back. Byte-fallback tokenizers decode a run of byte tokens with one bad byte differently as a whole;
    then, and after 64 undecodable tokens in a row, what was given out already stands.
    """

    __slots__ = ("_decode", "_ids", "_known", "_read", "_skip")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._decode = tokenizer._tokenizer.decode
        self._skip = skip_special_tokens
        self._ids = list(context[-_CONTEXT:])
        self._read = len(self._ids)
        self._known = self._decode(self._ids, self._skip).rstrip(_REPLACEMENT) if self._ids else ""

    def push(self, token_id: int) -> str:
        """The text that is certain once `token_id` is there; often "" in the middle of a character."""
        ids = self._ids
        ids.append(token_id)
        text = self._decode(ids, self._skip)
        known = self._known
        if len(text) <= len(known) or text[-1] == _REPLACEMENT:
            if text == known:
                # A token without text (special, skipped): forgetting it keeps the window from growing.
                ids.pop()
                return ""
            if len(ids) - self._read < _LONGEST_PENDING:
                return ""
        self._ids = ids = ids[self._read :]
        self._read = len(ids)
        self._known = self._decode(ids, self._skip)
        return text[len(known) :]

    def flush(self) -> str:
        """What is left when no token follows: replacement characters for a character that never became whole."""
        if len(self._ids) == self._read:
            return ""
        text = self._decode(self._ids, self._skip)[len(self._known) :]
        self._ids, self._read, self._known = [], 0, ""
        return text


def _byte_characters() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2's bytes_to_unicode, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as exc:
        raise TokenizerError(f"{path} is not JSON: {exc}") from exc
    return value if isinstance(value, dict) else {}


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, Any]:
    """What templates know as bos_token, eos_token and the like."""
    named = config.get("extra_special_tokens")
    found: dict[str, Any] = {}
    for source in (special_map, config, named if isinstance(named, dict) else {}):
        for key, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def _eos_ids(config: dict[str, Any]) -> list[int]:
    value = config.get("eos_token_id")
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get("eos_token_id")
    return [value] if type(value) is int else [id for id in value or () if type(id) is int]
