"""Whether an engine that tests have driven is sound: it checks itself once more when all is done, and finds nothing."""

from __future__ import annotations

import time

import msgspec
import zmq

from service.engine.config import EngineConfig
from service.engine.messages import Heartbeat, Ping, QueryResidency, decode_from_engine, encode

BUSY = ("sequences_running", "sequences_waiting", "sequences_fetching", "adapter_leases")


def checking(config: EngineConfig) -> EngineConfig:
    """With a check whenever the engine has become idle."""
    return msgspec.structs.replace(config, integrity_interval_s=0.0)


def check_engine(address: str, seconds: float = 40.0) -> None:
    """Waits until the engine at this address has nothing to do, wakes it, and waits for the check that follows (with an
    integrity interval of 0). An engine that finds itself unsound ends, and so does not answer: AssertionError, as when
    it keeps sequences or leases that nobody has asked for, or does not check.

    It asks the engine itself, which every server of the tests has, whatever its API refuses."""
    until = time.monotonic() + seconds
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)

        def stats() -> dict[str, float]:
            while True:
                socket.send(encode(Ping()))
                if not socket.poll(max(0, int(1000 * (until - time.monotonic())))):
                    raise AssertionError(f"the engine at {address} does not answer")
                # The first Ping is answered with a hello; an engine that has just started has no figures yet.
                message = decode_from_engine(socket.recv())
                if isinstance(message, Heartbeat) and "integrity_checks_total" in message.stats:
                    return message.stats
                time.sleep(0.02)

        while any((now := stats())[name] for name in BUSY):
            if time.monotonic() > until:
                raise AssertionError({name: now[name] for name in BUSY})
            time.sleep(0.05)
        checks = now["integrity_checks_total"]
        while now["integrity_checks_total"] <= checks:
            if time.monotonic() > until:
                raise AssertionError("the engine has not checked its integrity since")
            socket.send(encode(QueryResidency("soundness", ("0" * 64,))))
            time.sleep(0.02)
            now = stats()
