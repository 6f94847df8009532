"""The application: wiring only. Which part does what is in the modules named here.

uvicorn --factory service.app:from_environment
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service import __version__, log
from service.api import adapters, errors, health, merges, openai, prompts, reference, tenants, usage
from service.api.auth import Gate, Guards
from service.api.body import BodyLimit
from service.api.deps import RequestScope, Services
from service.api.keyring import Keyring
from service.engine.client import EngineClient
from service.jobs import Workers
from service.leases import Leases
from service.library import Library
from service.limits import Limiter
from service.merges import Merges
from service.metrics import Metrics
from service.settings import Settings
from service.store.audit import AuditLog
from service.store.catalogue import Catalogue
from service.store.instances import instance_id
from service.store.tenants import Tenants
from service.store.usage import UsageTable
from service.tokenizer import Tokenizer
from service.tracing import Traces
from service.uploads import Spool
from service.usage import UsageRecorder, collect_occupancy

DESCRIPTION = "One frozen base model, thousands of LoRA adapters beside it, different ones in every batch."


def create_app(settings: Settings) -> FastAPI:
    """The application of one API process. `settings.model` is the local folder of the base model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await _open(app, settings, stack)
            yield

    app = FastAPI(
        title="loraplex",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        separate_input_output_schemas=False,
        generate_unique_id_function=reference.operation_id,
        # Newer FastAPI makes spans of its own where OpenTelemetry is set up, with validation errors and so prompts.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    # The last one added is the first to see a request.
    if settings.multi_tenant:
        app.add_middleware(Gate)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["etag", "location", "retry-after", "x-loraplex-adapter", "x-request-id"],
        )
    app.add_middleware(RequestScope)
    errors.install(app)
    with_tenants = tenants.router if settings.multi_tenant else tenants.single_user
    for router in (
        openai.router,
        adapters.router,
        merges.router,
        with_tenants,
        tenants.audit_router,
        usage.router,
        prompts.router,
        health.router,
    ):
        app.include_router(router)
    reference.install(app, settings.base_name(), with_keys=settings.multi_tenant)
    return app


def end_requests(app: FastAPI) -> None:
    """Generations and loads that still run end with the answer, or in a stream the event, of a service that is shutting
    down (503)."""
    services: Services = app.state.services
    services.engine.end_all("shutting_down", "the service is shutting down, and the request took too long for that")


async def _open(app: FastAPI, settings: Settings, stack: AsyncExitStack) -> None:
    """Opens everything that the routes use; what is opened last is closed first."""
    logger = log.get("service.app")
    if not settings.is_loopback and not settings.multi_tenant:
        logger.warning("the service is open to whoever can reach this address", host=settings.host)
    for folder in (settings.data_dir, settings.run_dir, settings.uploads_dir):
        folder.mkdir(parents=True, exist_ok=True)
    base_name = settings.base_name()
    tokenizer = Tokenizer.load(settings.model)

    traces = Traces.open(settings)
    if traces is not None:
        stack.push_async_callback(asyncio.to_thread, traces.close)
    engine = EngineClient(settings.engine_socket)
    metrics = Metrics(settings, lambda: engine.stats, lambda: engine.healthy)
    stack.callback(metrics.close)
    catalogue = await Catalogue.open(settings.database_address(), with_tenants=settings.multi_tenant)
    stack.push_async_callback(catalogue.close)
    await engine.connect()
    stack.push_async_callback(engine.close)
    workers = Workers()
    stack.push_async_callback(workers.close)
    spool = Spool(
        settings.uploads_dir, settings.max_upload_bytes, settings.max_uploads, share_disk=settings.multi_tenant
    )
    stack.callback(spool.close)
    library = Library(
        catalogue,
        settings.open_blobs(),
        spool,
        workers,
        engine,
        base_name,
        settings.cache_dir,
        metrics.damaged_blobs.inc,
    )
    stack.push_async_callback(library.close)
    await library.recover()

    if settings.multi_tenant:
        rows = Tenants(catalogue.database)
        keyring = Keyring(rows, settings.admin_key.get_secret_value())
        keyring.start()
        stack.push_async_callback(keyring.close)
        limiter = Limiter(settings.run_dir / "limits", shared=catalogue.shared)
        stack.callback(limiter.close)
        if catalogue.shared:
            leases = Leases(catalogue.database, limiter, instance_id(spool.root), settings.run_dir / "limits")
            await leases.start()
            stack.push_async_callback(leases.close)
        app.state.guards = Guards(keyring, limiter, rows)
    app.state.audit = AuditLog(catalogue.database, settings.audit_days)
    app.state.library = library
    app.state.merges = Merges(library, workers, settings)
    table = UsageTable(catalogue.database, settings.usage_days)
    recorder = UsageRecorder(table.write, lambda recorder: collect_occupancy(recorder, engine, catalogue))
    recorder.start()
    if metrics.named is not None:
        await metrics.named.seed(table)
    stack.push_async_callback(recorder.close)
    app.state.services = Services(settings, base_name, tokenizer, engine, catalogue, metrics, recorder, table, traces)
    logger.info("API process started", model=base_name, data_dir=str(settings.data_dir))


def from_environment() -> FastAPI:
    """The factory for uvicorn: settings from LORAPLEX_*."""
    settings = Settings.load()
    log.configure(settings)
    return create_app(settings)
