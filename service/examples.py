"""The example adapters, uploaded through the service's own HTTP API when it starts for the first time."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import httpx

from service.gguf_model import Report, silent

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "adapters"
_DONE = "examples.json"


async def load_examples(client: httpx.AsyncClient, data_dir: Path, report: Report = silent) -> list[str]:
    """Uploads what is in examples/adapters/ and was never uploaded to this data folder: an example that its owner
    deleted stays deleted. Returns one line for each that the service did not take."""
    record = data_dir / _DONE
    done: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        done = list(json.loads(record.read_bytes()))
    problems = []
    for folder in sorted(path.parent for path in FOLDER.glob("*/adapter_config.json")):
        name = folder.name
        if name in done:
            continue
        report(f"uploading the example adapter {name}")
        response = await _upload(client, folder)
        # 409: the name is taken by an adapter of the owner's own.
        if response.status_code in (200, 201, 409):
            done.append(name)
            with contextlib.suppress(OSError):  # not worth a failed start: it is offered again, and found to be there
                record.write_text(json.dumps(done) + "\n")
        else:
            problems.append(f"example adapter {name}: {response.status_code} {_message(response)}")
    return problems


async def _upload(client: httpx.AsyncClient, folder: Path) -> httpx.Response:
    if (await client.get(f"/v1/adapters/{folder.name}")).status_code == 200:
        return httpx.Response(200)
    weights = folder / "adapter_model.safetensors"
    files = {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes(), "application/json"),
        "weights": (weights.name, weights.read_bytes(), "application/octet-stream"),
    }
    data = {"name": folder.name, "description": _purpose(folder / "README.md")}
    return await client.post("/v1/adapters", data=data, files=files)


def _purpose(card: Path) -> str:
    """The first sentence of the card's first paragraph."""
    with contextlib.suppress(OSError):
        body = card.read_text(encoding="utf-8").partition("\n# ")[2]
        for line in body.splitlines()[1:]:
            if line.strip():
                return line.split(" Trained by")[0].strip()
    return ""


def _message(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["error"]["message"])
    return response.text[:200]
