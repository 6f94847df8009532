"""loraplex with OpenAI's own client: every adapter is a model, and what OpenAI does not have goes into extra_body.

pip install openai; python examples/openai_client.py [URL]
"""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI

BASE = "SmolLM2-135M-Instruct"


async def ask(client: AsyncOpenAI, model: str, question: str) -> str:
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=48
    )
    return answer.choices[0].message.content or ""


async def main(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300) as client:
        models = [model.id async for model in client.models.list()]
        print("models:", ", ".join(models))

        # All at once: the engine runs them in one batch, whatever adapters they name.
        named = [BASE, *(model for model in ("headline", "json-extract", "pirate") if model in models)]
        for model, answer in zip(
            named, await asyncio.gather(*(ask(client, model, "What is a river?") for model in named)), strict=True
        ):
            print(f"\n{model}: {answer}")

        print("\nstreamed: ", end="")
        stream = await client.completions.create(
            model="pirate", prompt="The sea is", temperature=0, max_tokens=16, stream=True
        )
        async for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)

        mixed = await client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "What is a lighthouse?"}],
            temperature=0,
            max_tokens=24,
            extra_body={"adapters": [{"name": "pirate", "weight": 0.7}, {"name": "headline", "weight": 0.5}]},
        )
        print("\n\nmixed:", mixed.choices[0].message.content)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
