"""loraplex with its own client: upload with progress, wait until it can answer, stream, mix, compare, delete.

pip install loraplex; python examples/loraplex_client.py [URL]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from service.client import AsyncLoraplex, Loraplex, Refused

FOLDER = Path(__file__).parent / "adapters" / "json-extract"
QUESTION = "Extract: Hannah Weber, 41, works as a plumber in Vienna."
NAME = "client-demo"


def show(done: int, total: int) -> None:
    print(f"\ruploading {100 * done // total} %", end="" if done < total else "\n", flush=True)


async def side_by_side(url: str, models: list[str | None]) -> None:
    """All at once: the engine runs them in one batch. None is the base model."""
    async with AsyncLoraplex(url) as client:
        asked = [client.chat(QUESTION, model=model, temperature=0, max_tokens=48) for model in models]
        for model, answer in zip(models, await asyncio.gather(*asked), strict=True):
            print(f"\n{model or 'base'}: {answer.text}")


def main(url: str | None) -> None:
    with Loraplex(url) as client:
        client.wait_until_ready()
        try:
            uploaded = client.adapters.upload(NAME, FOLDER, description="From an example", progress=show)
        except Refused as error:  # it does not fit the base model: every reason is given
            raise SystemExit("\n".join(error.reasons)) from None
        print("uploaded", uploaded.id, f"of rank {uploaded.adapter.spec.rank}")
        client.adapters.load(uploaded.id)
        asyncio.run(side_by_side(client.url, [None, uploaded.id]))

        print("\nstreamed, in a mix: ", end="")
        mix = {NAME: 0.8, "pirate": 0.2}
        with client.chat_stream("What is glass?", adapters=mix, temperature=0, max_tokens=16) as chunks:
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
            print(f"\n({chunks.adapter})")

        print("adapters:", ", ".join(adapter.name for adapter in client.adapters.list()))
        print("deleted", client.adapters.delete(NAME).id)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
