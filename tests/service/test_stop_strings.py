"""Stop strings: found across tokens, never shown in part, and the engine is told at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.generation import Job, StopMatcher, _Choice
from service.engine.messages import Delta, SamplingParams
from service.tokenizer import Detokenizer
from tests.service.inference_helpers import BASE, InferenceServer

PROMPT = "It was the best of times"


def run(stops: list[str], pieces: list[str], include: bool = False, armed_from: int = 0) -> tuple[list[str], bool]:
    """The text that goes out for each piece (the last: what was held), and whether it was stopped."""
    matcher = StopMatcher(stops, include)
    out: list[str] = []
    for number, piece in enumerate(pieces):
        text, stopped = matcher.feed(piece, armed=number >= armed_from)
        out.append(text)
        if stopped:
            return out, True
    return [*out, matcher.flush()], False


def brute_force(stops: list[str], text: str, include: bool) -> tuple[str, bool]:
    """The string that is complete first wins, the longest of those complete at once."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if include else end - max(map(len, complete))], True
    return text, False


few = st.text("ab", max_size=12)


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    pieces=st.lists(few, max_size=8),
    include=st.booleans(),
)
def test_any_cut_into_pieces_gives_the_same(stops: list[str], pieces: list[str], include: bool) -> None:
    out, stopped = run(stops, pieces, include)
    assert ("".join(out), stopped) == brute_force(stops, "".join(pieces), include)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), pieces=st.lists(few, max_size=8))
def test_what_goes_out_is_never_taken_back_nor_held_without_need(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = ""
    sent = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        seen, sent = seen + piece, sent + text
        if stopped:
            return
        held = seen.removeprefix(sent)
        assert seen == sent + held
        longest = max(n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n]))
        assert len(held) == longest


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(few, max_size=8),
    armed_from=st.integers(0, 8),
)
def test_min_tokens_lets_complete_strings_through(stops: list[str], pieces: list[str], armed_from: int) -> None:
    out, stopped = run(stops, pieces, armed_from=armed_from)
    safe = len("".join(pieces[:armed_from]))
    text = "".join(pieces)
    ends = [
        (end, -len(stop))
        for stop in stops
        for end in range(len(stop), len(text) + 1)
        if text[:end].endswith(stop) and end > safe
    ]
    if not ends:
        assert ("".join(out), stopped) == (text, False)
    else:
        end, length = min(ends)
        assert stopped
        assert "".join(out) == text[: end + length]


def test_no_stop_string_holds_nothing() -> None:
    assert StopMatcher([]).feed("text") == ("text", False)


def stop_inside(server: InferenceServer, count: int = 12) -> tuple[list[int], str, str, int]:
    """(tokens, text, a stop string that begins and ends inside tokens, number of tokens that complete it)."""
    ids = server.expected_ids(PROMPT, count)
    text = server.tokenizer.decode(ids)
    texts = [server.tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    for n in range(4, count - 2):
        first, second = len(texts[n]) - 2, len(texts[n]) + 2
        stop = text[first:second]
        if "\ufffd" not in text and text.find(stop) == first and len(texts[n + 1]) >= second:
            return ids, text, stop, n + 1
    raise RuntimeError("choose another prompt")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(server: InferenceServer, stream: bool, include: bool) -> None:
    _, text, stop, tokens = stop_inside(server)
    arguments: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 400}
    arguments |= {"stop": [stop, "never to be found"], "extra_body": {"include_stop_str_in_output": include}}
    if stream:
        arguments |= {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(server.openai.completions.create(**arguments))
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
        got, finish, usage = "".join(piece.text for piece in pieces), pieces[-1].finish_reason, chunks[-1].usage
    else:
        answer = server.openai.completions.create(**arguments)
        got, finish, usage = answer.choices[0].text, answer.choices[0].finish_reason, answer.usage
    assert got == text[: text.find(stop) + (len(stop) if include else 0)]
    assert finish == "stop"
    assert usage.completion_tokens == tokens
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_is_told_at_once(slow: InferenceServer, stream: bool) -> None:
    _, _, stop, tokens = stop_inside(slow)
    slow.wait_until_idle()
    before = slow.metrics()["loraplex_engine_generated_tokens_total"]
    body = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 480, "stop": stop, "stream": stream}
    assert slow.http.post("/v1/completions", json=body).status_code == 200
    slow.wait_for_engine("generated_tokens_total", before + tokens)
    slow.wait_until_idle()
    # A few more steps were on their way, and on a busy machine some seconds of them.
    assert slow.metrics()["loraplex_engine_generated_tokens_total"] - before < 400


def test_logprobs_end_with_the_text(server: InferenceServer) -> None:
    _, text, stop, _ = stop_inside(server)
    arguments: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "temperature": 0, "max_tokens": 30}
    arguments |= {"stop": stop, "logprobs": 1}
    whole = server.openai.completions.create(**arguments).choices[0]
    offsets = [o for c in server.openai.completions.create(**arguments, stream=True) for o in _offsets(c.choices[0])]
    assert whole.logprobs is not None
    assert whole.logprobs.text_offset == offsets
    assert offsets[0] == 0
    assert offsets[-1] < text.find(stop)
    assert len(whole.logprobs.tokens or []) == len(whole.logprobs.token_logprobs or []) == len(offsets)


def _offsets(choice: Any) -> list[int]:
    return choice.logprobs.text_offset if choice.logprobs else []


def test_one_choice_stops_and_the_others_go_on(server: InferenceServer) -> None:
    prompts = [PROMPT, "Something else"]
    _, text, stop, tokens = stop_inside(server)
    other = server.expected_text(prompts[1], 40)
    if stop in other:
        pytest.skip("the stop string is in both")
    answer = server.openai.completions.create(model=BASE, prompt=prompts, temperature=0, max_tokens=40, stop=stop)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert [choice.text for choice in answer.choices] == [text[: text.find(stop)], other]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens + 40


def test_min_tokens_delays_stop_strings(server: InferenceServer) -> None:
    _, text, stop, tokens = stop_inside(server)
    answer = server.openai.completions.create(
        model=BASE, prompt=PROMPT, temperature=0, max_tokens=12, stop=stop, extra_body={"min_tokens": tokens + 1}
    )
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"


def test_text_held_back_comes_at_the_end(server: InferenceServer) -> None:
    text = server.expected_text(PROMPT, 12)
    answer = server.openai.completions.create(
        model=BASE, prompt=PROMPT, temperature=0, max_tokens=12, stop=text[-4:] + "~"
    )
    assert answer.choices[0].text == text
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("armed", [False, True])
def test_a_stop_string_that_half_a_character_completes(server: InferenceServer, include: bool, armed: bool) -> None:
    """The last token is half a character: its replacement character is known only when no token follows."""
    ids = [*server.tokenizer.encode_now(["so \u6f22"])[0]][:-1]
    text = server.tokenizer.decode(ids)
    assert text.endswith("\ufffd")
    job = Job(
        request_id="r",
        prompts=[[5]],
        sampling=SamplingParams(max_tokens=len(ids), min_tokens=0 if armed else len(ids) + 1),
        stop=("o \ufffd",),
        include_stop=include,
    )
    choice = _Choice(job, 0, Detokenizer(server.tokenizer), StopMatcher(job.stop, include))
    pieces = [choice.take(Delta("r", 0, [token])) for token in ids[:-1]]
    pieces.append(choice.take(Delta("r", 0, ids[-1:], "length")))
    said = "".join(piece.text for piece in pieces if piece is not None)
    assert pieces[-1] is not None
    assert (said, pieces[-1].finish_reason) == (
        ("so \ufffd" if include else "s", "stop") if armed else (text, "length")
    )
