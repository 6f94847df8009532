"""The tokenizer against transformers' own, and the incremental detokenizer against decoding everything at once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.chat_template import ChatTemplate, ChatTemplateError
from service.tokenizer import Detokenizer, Tokenizer, TokenizerError

TEXTS = [
    "Hello, world",
    "你好，世界 😀👩‍👩‍👧 naïve",
    " leading and trailing ",
    "a\n\n\tb",
    "<|im_start|>user\nx<|im_end|>",
    "�x�",
]


@pytest.fixture(scope="module")
def tokenizer(base_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(base_model_dir)


@pytest.fixture(scope="module")
def reference(base_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model_dir)


def metaspace() -> Tokenizer:
    """A Llama-2-like tokenizer: metaspace, byte fallback, a decoder that strips the first space."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁hello",
        "▁world",
        "hel",
        "lo",
        "!",
    ]
    words += sorted(set("▁abcdefghijklmnopqrstuvwxyz") - set(words))
    model = tokenizers.models.BPE(
        {word: id for id, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
    )
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner, ChatTemplate({}, {}), (2,))


def streamed(tokenizer: Tokenizer, ids: list[int], context: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context or [], skip_special_tokens=skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
async def test_encoding_and_decoding_equal_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    (ids,) = await tokenizer.encode([text])
    assert ids == reference(text)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2 "}, {"role": "user", "content": "3"}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("generation", [True, False])
def test_chat_prompts_equal_transformers(
    tokenizer: Tokenizer, reference: Any, messages: list[dict[str, Any]], generation: bool
) -> None:
    text = tokenizer.chat.render(messages, add_generation_prompt=generation)
    ids = tokenizer.encode_now([text], add_special_tokens=False)[0]
    expected = reference.apply_chat_template(messages, add_generation_prompt=generation, tokenize=True)
    assert ids == (expected["input_ids"] if hasattr(expected, "keys") else expected)


HARD_TEMPLATE = """\
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- set ns = namespace(last='') %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ bos_token + message.content | trim }}{% endgeneration %}
    {%- else %}
        {{- '<' + message.role + '>' + message.content + '</>' }}
    {%- endif %}
    {%- set ns.last = message.role %}
    {% if loop.last and not mood is defined %}
    plain
    {% elif loop.last %}{{ mood }}{% endif %}
{%- endfor %}
{{ dict(a=1) | tojson }}{{ ns.last }}{{ strftime_now('%Y') }}
{% if add_generation_prompt %}
<assistant>
{% endif %}"""


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("variables", [{}, {"mood": "<é>"}])
def test_helpers_and_whitespace_equal_transformers(reference: Any, generation: bool, variables: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f<é>", "parameters": {"type": "object", "properties": {}}}}]
    messages = [*CONVERSATIONS[2], {"role": "skip", "content": "x"}, {"role": "user", "content": "é"}]
    ours = ChatTemplate({"default": HARD_TEMPLATE}, {"bos_token": reference.bos_token}).render(
        messages, tools=tools, add_generation_prompt=generation, variables=variables
    )
    assert ours == reference.apply_chat_template(
        messages,
        tools=tools,
        chat_template=HARD_TEMPLATE,
        add_generation_prompt=generation,
        tokenize=False,
        **variables,
    )


@pytest.mark.parametrize("content", ["The answer is", "with a space ", " in front"])
def test_continuing_the_final_message_equals_transformers(tokenizer: Tokenizer, reference: Any, content: str) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    ours = tokenizer.chat.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == reference.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert ours.endswith(content)


def test_templates_refuse_in_words_and_stay_in_the_sandbox() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render([{"role": "user", "content": "x"}])
    for attack in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(ChatTemplateError):
            ChatTemplate({"default": attack}, {}).render([{"role": "user", "content": "x"}])
    with pytest.raises(ChatTemplateError, match="cannot be given"):
        ChatTemplate({"default": ""}, {}).render([{"role": "user", "content": "x"}], variables={"messages": []})
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplate({}, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer, skip: bool, data: st.DataObject) -> None:
    # Ids below 300 are special tokens and single bytes, so broken and split characters are frequent.
    ids = data.draw(st.lists(st.one_of(st.integers(0, 300), st.integers(0, tokenizer.vocab_size - 1)), max_size=60))
    pieces = streamed(tokenizer, ids, skip=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_text_survives_a_byte_fallback_tokenizer_token_by_token(text: str) -> None:
    tokenizer = metaspace()
    text = text.replace("▁", "").replace("\ufffd", "")
    (ids,) = tokenizer.encode_now([text])
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_continuation_keeps_the_space_that_a_start_would_lose() -> None:
    tokenizer = metaspace()
    prompt, answer = ["▁hello"], ["▁world", "!"]
    ids = {word: tokenizer._tokenizer.token_to_id(word) for word in [*prompt, *answer]}
    assert "".join(streamed(tokenizer, [ids[word] for word in answer])) == "world!"
    assert "".join(streamed(tokenizer, [ids[word] for word in answer], [ids["▁hello"]])) == " world!"
    assert "".join(streamed(tokenizer, [1, 2, *[ids[word] for word in answer]], [ids["▁hello"]])) == " world!"


def test_a_character_split_over_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_now(["🜀𐍈"])
    assert len(ids) > 3
    pieces = streamed(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["🜀", "𐍈"]
    # The prompt may end in the middle of one.
    assert "".join(streamed(tokenizer, ids[1:], ids[:1])) == "🜀𐍈"


async def test_tokens_start_where_they_stand_in_the_text(tokenizer: Tokenizer) -> None:
    """Also where the post-processor adds tokens and trims offsets, and where decoding would not give the text back."""
    text = "<|im_start|> A\n   so  \U0001f700<|im_end|>\n"
    (ids,) = tokenizer.encode_now([text])
    plain = [len(tokenizer.decode(ids[:at], skip_special_tokens=False).rstrip("\ufffd")) for at in range(len(ids))]
    assert await tokenizer.starts([text, ""]) == [plain, []]
    inner = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    inner.normalizer = tokenizers.normalizers.Replace("shorter", "so")
    processors = tokenizers.processors
    around = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    added = Tokenizer(inner, ChatTemplate({}, {}), ())
    assert await added.starts([text, "A shorter one"]) == [[0, *plain, len(text)], [0, 0, 1, 9, 13]]
    long = " a" * 2000
    assert await added.starts([long]) == [[0, *range(0, len(long) + 1, 2)]]
    assert await metaspace().starts(["a \u00e9!"]) == [[0, 1, 2, 2, 3]]


def test_undecodable_and_silent_tokens_do_not_slow_it_down(tokenizer: Tokenizer) -> None:
    bad = next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b"\xe2")
    for token in (bad, 2):
        detokenizer = Detokenizer(tokenizer)
        for _ in range(1000):
            detokenizer.push(token)
        assert len(detokenizer._ids) <= 130


def test_the_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        (ids,) = tokenizer.encode_now([text])
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    plain = metaspace()
    (ids,) = plain.encode_now(["hello é"])
    assert b"".join(map(plain.token_bytes, ids)).decode() == "hello é"
    assert tokenizer.token_bytes(10**9) == b""
    (euro,) = tokenizer.encode_now(["🜀"])
    assert tokenizer.token_text(euro[0]).startswith("bytes:\\x")


async def test_a_large_text_does_not_stop_the_event_loop(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20_000
    task = asyncio.create_task(tokenizer.encode([text]))
    turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len((await task)[0]) > 100_000
    assert turns > 3  # encoding on the loop would leave one


def test_the_files_of_a_folder(tmp_path: Path, base_model_dir: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    source = json.loads((base_model_dir / "tokenizer.json").read_text())
    source["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    config = {
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "bos_token": "<|im_start|>",
        "chat_template": [
            {"name": "default", "template": "d{{ bos_token }}"},
            {"name": "tool_use", "template": "t{{ eos_token }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == (7, 2)
    assert len(loaded.encode_now(["one two three four"])[0]) == 4
    user = [{"role": "user", "content": "x"}]
    assert loaded.chat.render(user) == "d<|im_start|>"
    assert loaded.chat.render(user, tools=[{"type": "function"}]) == "t<|im_end|>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    (tmp_path / "chat_template.jinja").write_text("file")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == (0, 5, 2)
    assert loaded.chat.render(user) == "file"


def test_many_texts_are_encoded_in_order_whatever_their_batches(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "", "the sea " * 40, "b" * 300, "", "moon", "x y z " * 20]
    alone = [tokenizer.encode_now([text])[0] for text in texts]
    for size in (1, 100, 330, 1 << 18):
        monkeypatch.setattr("service.tokenizer._BATCH_CHARACTERS", size)
        assert tokenizer.encode_now(texts) == alone


def test_no_token_has_more_characters_than_it_is_said_to_have(tokenizer: Tokenizer) -> None:
    most = tokenizer.characters_per_token
    assert most is not None
    assert max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)) == most
    assert metaspace().characters_per_token is None


@pytest.mark.parametrize(
    ("template", "taken"),
    [
        ("{% for tool in tools %}{{ tool }}{% endfor %}", True),
        # As Llama 3.1's.
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% macro calls() %}{{ tools }}{% endmacro %}{{ calls() }}", True),
        ("{% generation %}{{ tools }}{% endgeneration %}", True),
        ("{# no tools #}You have no tools. {{ messages }}", False),
        ("{% set tools = [] %}{{ tools }}", False),
        ("{{ message['tools'] }}", False),
    ],
)
def test_a_template_takes_tools_if_it_reads_what_it_is_given(template: str, taken: bool) -> None:
    assert ChatTemplate({"default": template}, {}).takes_tools is taken
    assert ChatTemplate({"default": "{{ tools }}", "tool_use": template}, {}).takes_tools is taken
