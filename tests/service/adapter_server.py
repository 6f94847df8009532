"""The service's API process, for tests: `python -m tests.service.adapter_server '<JSON>'`.

{"settings": {...}, "manifest" (optional: path of a Manifest as JSON, instead of the engine's), "reclaim_delay_s"}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI

import service.app
import service.library
from adapters.manifest import Manifest
from service.engine.client import EngineClient
from service.settings import Settings


def engine_of_another_base(given: Manifest) -> type[EngineClient]:
    """A client that says that the base model is the given one; the engine itself is what it is."""

    class Client(EngineClient):
        @property
        def manifest(self) -> Manifest:
            return given

    return Client


def build(options: dict[str, Any]) -> FastAPI:
    service.library.RECLAIM_DELAY_S = options.get("reclaim_delay_s", 0.05)
    if "manifest" in options:
        given = msgspec.json.decode(Path(options["manifest"]).read_bytes(), type=Manifest)
        service.app.EngineClient = engine_of_another_base(given)  # type: ignore[misc]
    app = service.app.create_app(Settings.load(**options["settings"]))

    @app.get("/probe")
    async def probe() -> dict[str, bool]:
        return {"ready": app.state.library.engine.ready.is_set(), "torch": "torch" in sys.modules}

    @app.get("/resolve")
    async def resolve(model: str) -> dict[str, Any]:
        library = app.state.library
        found = await library.catalogue.resolve(model)
        found.require_base(*library.engine.manifest.fingerprints)
        return {"name": found.name, "version": found.version, "digest": found.digest}

    return app


if __name__ == "__main__":
    given_options = json.loads(sys.argv[1])
    application = build(given_options)
    uvicorn.run(application, host="127.0.0.1", port=given_options["settings"]["port"], log_level="warning")
