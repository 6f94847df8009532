"""Every message survives the wire, and what is not a message is refused."""

from __future__ import annotations

import msgspec
import pytest

from adapters.manifest import Manifest, Module
from service.engine import messages as m

MANIFEST = Manifest("f", "LlamaForCausalLM", "llama", "float32", 100, 64, (Module("lm", "output", 4, 100),))
ENTRY = m.TokenLogprob(5, -0.25, [(5, -0.25), (7, -1.5)])

TO_ENGINE: list[m.ToEngine] = [
    m.Ping(),
    m.Submit(request_id="r", prompts=[[1]], sampling=m.SamplingParams()),
    m.Submit(
        request_id="r",
        prompts=[[1, 2], [3]],
        n=2,
        adapters=(m.AdapterRef("d@7", 0.5), m.AdapterRef("e")),
        resident_limits={"7": 4096, "8": None},
        sampling=m.SamplingParams(
            temperature=0.5, logit_bias={7: -1.5}, seed=2**62, stop_token_ids=(1, 2), logprobs=0, prompt_logprobs=5
        ),
        salt="tenant",
        tenant="t-1",
        tenant_weight=2.5,
        priority=-3,
    ),
    m.Abort("r"),
    m.Abort("r", 3),
    m.Prefetch(("a", "b"), {"7": None}),
    m.LoadAdapter("c", "d", {"7": 0}),
    m.UnloadAdapter("c", "d", forget=True),
    m.QueryResidency("c", ("d", "e")),
    m.TakeOccupancy("c"),
]
FROM_ENGINE: list[m.FromEngine] = [
    m.Ready("id", MANIFEST, m.Limits(64, 8, 16, 16, 100, 8, 512, 1 << 40), "cpu", {"torch": "2"}),
    m.Heartbeat("id", 0.5, {"kv_pages": 3.0}),
    m.Outputs([m.Delta("r", 0, [1, 2]), m.Delta("r", 1, [3], "stop", [ENTRY], [None, ENTRY], 16)]),
    m.Refused("r", "queue_full", "later", 1.5),
    m.Reply("c", None, {"d": "device"}),
    m.Reply("c", None, {"d": [1, 2.5]}),
    m.Reply("c", "it is broken"),
]


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: type(message).__name__)
def test_to_engine(message: m.ToEngine) -> None:
    assert m.decode_to_engine(m.encode(message)) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda message: type(message).__name__)
def test_from_engine(message: m.FromEngine) -> None:
    assert m.decode_from_engine(m.encode(message)) == message


def test_every_message_is_tried() -> None:
    assert {type(message) for message in TO_ENGINE} == set(m.ToEngine.__args__)
    assert {type(message) for message in FROM_ENGINE} == set(m.FromEngine.__args__)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        m.encode(m.Heartbeat("id", 0.0, {})),
        msgspec.msgpack.encode({"type": "submit", "request_id": "r"}),
        msgspec.msgpack.encode({"type": "submit", "request_id": "r", "prompts": [["text"]], "sampling": {}}),
        msgspec.msgpack.encode({"type": "no such message"}),
    ],
)
def test_what_is_not_a_message_to_the_engine_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        m.decode_to_engine(data)
