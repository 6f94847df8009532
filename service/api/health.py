"""Operation: is the process alive, can it serve, what does it count, what is it."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service import __version__
from service.api.auth import Route, allow
from service.api.deps import ServicesDep
from service.store.errors import CatalogueError

router = APIRouter(tags=["operation"], route_class=Route)


@router.get("/", include_in_schema=False)
@allow("any")
async def index(request: Request, services: ServicesDep) -> dict[str, Any]:
    """Where to go from here."""
    return {
        "service": "loraplex",
        "version": __version__,
        "model": services.base_name,
        "docs": "/docs",
        "endpoints": {
            "inference": ["/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"],
            "adapters": ["/v1/adapters", "/v1/merges"],
            "operation": ["/health", "/ready", "/metrics", "/version"],
        },
    }


@router.get("/health", summary="The process lives")
@allow("open")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/ready", summary="The model is loaded and the engine answers")
@allow("open")
async def ready(services: ServicesDep) -> Response:
    """200, or 503 with the reason while requests would fail."""
    engine = services.engine
    if engine.healthy:
        # Whoever has no key is told no more than a load balancer needs.
        model = {} if services.settings.multi_tenant else {"model": services.base_name}
        return JSONResponse({"status": "ready", **model})
    if engine.last_ready is None:
        reason = "the engine is starting"
    elif not engine.ready.is_set():
        reason = "the engine is gone and is being started again"
    else:
        reason = f"the engine's step has been running for {engine.step_age_s:.0f} s"
    return JSONResponse({"status": "unavailable", "reason": reason}, 503, {"Retry-After": "1"})


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
@allow("admin")
async def metrics(services: ServicesDep) -> Response:
    merges = None
    with contextlib.suppress(CatalogueError):  # without its database the service has all the other figures
        async with services.catalogue.merges() as table:
            merges = await table.count()
    page, content_type = await asyncio.to_thread(services.metrics.expose, merges)
    return Response(page, headers={"content-type": content_type})


@router.get("/version", summary="What is running")
@allow("any")
async def version(services: ServicesDep) -> dict[str, Any]:
    hello = services.engine.last_ready
    engine = None
    if hello is not None:
        manifest = hello.manifest
        engine = {
            "device": hello.device,
            "architecture": manifest.architecture,
            "dtype": manifest.dtype,
            "fingerprint": manifest.fingerprint,
            "limits": {name: getattr(hello.limits, name) for name in hello.limits.__struct_fields__},
            "versions": hello.versions,
        }
    return {"version": __version__, "python": platform.python_version(), "model": services.base_name, "engine": engine}
