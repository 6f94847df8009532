"""The API process serves without torch, transformers or peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.service.inference_helpers import BASE, ROOT, InferenceServer

SCRIPT = """
import asyncio, json, sys
import httpx
from service.app import from_environment

async def main():
    app = from_environment()
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)
            body = {"model": sys.argv[1], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
            for stream in (False, True):
                answer = await client.post("/v1/chat/completions", json={**body, "stream": stream})
                assert answer.status_code == 200, answer.text
            for path in ("/v1/models", "/v1/adapters", "/metrics", "/version"):
                assert (await client.get(path)).status_code == 200, path
            files = {"config": ("adapter_config.json", b"{}"), "weights": ("adapter_model.safetensors", b"junk")}
            answer = await client.post("/v1/adapters", data={"name": "x"}, files=files)
            assert answer.status_code == 422, answer.text
    print(json.dumps(sorted(sys.modules)))

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_torch_is_not_in_the_api_process(server: InferenceServer, tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), BASE],
        cwd=ROOT,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    modules = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert {"service", "adapters", "tokenizers", "jinja2"} <= modules
    assert not modules & {"torch", "transformers", "peft", "accelerate", "triton"}
