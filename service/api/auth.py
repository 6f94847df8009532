"""Who calls, and what he may do.

With an admin key (LORAPLEX_ADMIN_KEY) every request passes the Gate, which finds out who calls, before anything of its
body is read: 401 to whoever has no valid key. Then the route asks whether that caller may: each declares its rule,
`@allow("upload")`, and a route without one cannot be made (Route). Without an admin key there is no Gate, one user, and
nothing is refused.

A key's row is read again once it is CACHE_S old: so a key that is revoked, a tenant that is disabled, and new limits
take effect within a second in every process of every instance, in the one that was told at once. To read it took
1.0 ms, to find it 18 us (SQLite, two busy cores).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service import log
from service.api.errors import ApiError, as_api_error
from service.limits import Limiter, LimitReached, TenantLimits
from service.store.errors import CatalogueError
from service.store.tables import DEFAULT_TENANT
from service.store.tenants import KEY, SCOPES, Credentials, Tenant, Tenants, matches_none

CACHE_S = 1.0
MOST_CACHED = 10_000
USE_NOTED_S = 60.0
"""When a key was last used is entered at most so often."""
MAX_KEY_CHARACTERS = 512
ADMIN = "admin"
"""A rule that only the admin key fulfils; and who the audit log says it was."""

UNLIMITED = TenantLimits()

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route asks of its caller: any one of `scopes`; none of them: any key will do. `metered`: it is what
    requests and tokens per minute and concurrent requests count."""

    scopes: frozenset[str]
    open: bool = False
    """Nobody is asked for a key."""
    admin: bool = False
    metered: bool = False

    @property
    def words(self) -> list[str]:
        """For the OpenAPI document."""
        if self.open:
            return ["open"]
        if self.admin:
            return [ADMIN]
        return [scope for scope in SCOPES if scope in self.scopes] or ["any"]


RULES: dict[str, Rule] = {}
"""Of every route, by its name, which is its operation's id in the OpenAPI document."""


def allow(*scopes: str, metered: bool = False) -> Callable[[_F], _F]:
    """Declares the rule of a route, between its decorator and its function: scopes of which one is needed, or "any" (a
    key is enough), "open" (not even that), "admin"."""
    if not scopes or not set(scopes) <= {*SCOPES, "any", "open", ADMIN}:
        raise ValueError(f"no scopes: {scopes}")
    rule = Rule(frozenset(scopes) & frozenset(SCOPES), "open" in scopes, ADMIN in scopes, metered)

    def declare(function: _F) -> _F:
        function.rule = rule  # type: ignore[attr-defined]
        return function

    return declare


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `namespace`: whose adapters a plain name means, the caller's own unless ?tenant says otherwise."""

    tenant: str
    tenant_id: int
    key_id: str | None
    admin: bool
    scopes: frozenset[str]
    weight: float = 1.0
    limits: TenantLimits = UNLIMITED
    namespace: str = DEFAULT_TENANT
    viewer: str | None = None
    """Whose eyes see what is shown (service/store/visibility.py); None: everything."""

    @property
    def salt(self) -> str:
        """Separates prefix caches: nobody can find out by the time it takes what others have asked."""
        return str(self.tenant_id)

    def says(self, owner: str, name: str) -> str:
        """What an adapter is called by this caller: its name, with its owner if that is somebody else."""
        return name if owner == self.tenant else f"{owner}/{name}"

    @property
    def actor(self) -> str:
        return ADMIN if self.admin else self.key_id or ""


SINGLE_USER = Caller(DEFAULT_TENANT, 0, None, True, frozenset(SCOPES))
"""The only one there is without an admin key."""


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope["state"].get("caller", SINGLE_USER) if "state" in request.scope else SINGLE_USER
    return caller


async def _caller(request: Request) -> Caller:
    return caller_of(request)


CallerDep = Annotated[Caller, Depends(_caller)]


class Keyring:
    """Tells callers by their keys."""

    def __init__(self, tenants: Tenants, admin_key: str) -> None:
        self._tenants = tenants
        self._admin = hashlib.sha256(admin_key.encode()).digest()
        self._keys: dict[str, tuple[float, Credentials]] = {}
        self._named: dict[str, tuple[float, Tenant]] = {}
        self._used: dict[str, int] = {}
        self._noted: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._note_uses())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(CatalogueError):
            await self._tenants.note_use(self._used)

    def forget(self) -> None:
        """Rows have been changed here: they are read again."""
        self._keys.clear()
        self._named.clear()

    async def caller(self, authorization: str | None, tenant: str | None) -> Caller:
        """`tenant`: the ?tenant of the request. Raises ApiError 401, 403; 404 to the admin for an unknown tenant."""
        if authorization is None:
            raise _unauthorized("missing_key", "A key is needed: Authorization: Bearer <key>.")
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_CHARACTERS:
            raise _unauthorized("invalid_key", "The Authorization header should be: Bearer <key>.")
        if hmac.compare_digest(hashlib.sha256(key.encode("utf-8", "replace")).digest(), self._admin):
            return await self._administrator(tenant)
        known = await self._credentials(key)
        if known.expires_at is not None and known.expires_at <= time.time():
            raise _unauthorized("key_expired", "The key has expired.")
        owner = known.tenant
        if owner.disabled:
            raise ApiError(403, f"Tenant {owner.id!r} is disabled.", code="tenant_disabled")
        self._used[known.key_id] = int(time.time())
        return Caller(
            owner.id,
            owner.number,
            known.key_id,
            False,
            known.scopes,
            owner.weight,
            TenantLimits.of(owner.limits),
            owner.id if tenant is None else tenant,
            owner.id,
        )

    async def _administrator(self, tenant: str | None) -> Caller:
        """As `tenant`, with its limits and its view; without one as the default tenant who sees everything."""
        name = DEFAULT_TENANT if tenant is None else tenant
        fresh = self._named.get(name)
        if fresh is None or time.monotonic() - fresh[0] > CACHE_S:
            fresh = _keep(self._named, name, await self._tenants.get(name))
        own = fresh[1]
        limits = TenantLimits.of(own.limits)
        return Caller(own.id, own.number, None, True, frozenset(SCOPES), own.weight, limits, own.id, tenant)

    async def _credentials(self, key: str) -> Credentials:
        invalid = _unauthorized("invalid_key", "The key is not valid.")
        if (form := KEY.fullmatch(key)) is None:
            raise invalid
        key_id, secret = form[1], form[2]
        fresh = self._keys.get(key_id)
        if fresh is None or time.monotonic() - fresh[0] > CACHE_S:
            read_at = time.monotonic()  # before the row is read: it may change while it is under way
            known = await self._tenants.credentials(key_id)
            if known is None:
                self._keys.pop(key_id, None)
                matches_none(secret)
                raise invalid
            fresh = _keep(self._keys, key_id, known, read_at)
        if not fresh[1].matches(secret):
            raise invalid
        return fresh[1]

    async def _note_uses(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            due = {key: at for key, at in self._used.items() if now - self._noted.get(key, -1e9) >= USE_NOTED_S}
            if not due:
                continue
            for key in due:
                del self._used[key]
            with contextlib.suppress(CatalogueError):  # the next use is as good
                await self._tenants.note_use(due)
                self._noted |= dict.fromkeys(due, now)


def _keep(cache: dict[str, tuple[float, Any]], key: str, value: Any, at: float | None = None) -> tuple[float, Any]:
    if len(cache) >= MOST_CACHED:
        cache.clear()
    cache[key] = (time.monotonic() if at is None else at, value)
    return cache[key]


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def _forbidden(rule: Rule) -> ApiError:
    if rule.admin:
        return ApiError(403, "This needs the admin key.", code="admin_only")
    needed = " or ".join(rule.words)
    return ApiError(403, f"The key lacks the scope that this needs: {needed}.", code="missing_scope")


@dataclass(frozen=True, slots=True)
class Guards:
    """What Gate and Route use; at `app.state.guards` where there are tenants."""

    keyring: Keyring
    limiter: Limiter
    tenants: Tenants


OPEN_PATHS = frozenset({"/health", "/ready"})
ADMIN_PATHS = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})


class Gate:
    """ASGI middleware: puts the Caller into the request's state, or answers 401 before anything else is done."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        guards: Guards = scope["app"].state.guards
        try:
            caller = await guards.keyring.caller(_authorization(scope), _tenant_of(scope))
            if scope["path"] in ADMIN_PATHS and not caller.admin:
                raise _forbidden(Rule(frozenset(), admin=True))
        except (ApiError, CatalogueError) as exc:
            error = as_api_error(exc)
            state["error_code"] = error.code
            await error.response()(scope, receive, send)
            return
        state["caller"] = caller
        state["tenant"], state["key"] = caller.tenant, caller.actor
        try:
            await self._app(scope, receive, send)
        finally:
            if state.get("metered"):
                used = (state.get("prompt_tokens") or 0) + (state.get("completion_tokens") or 0)
                guards.limiter.end(caller.tenant_id, used)


def _authorization(scope: Scope) -> str | None:
    """The header, if there is exactly one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    return found[0].decode("latin-1") if len(found) == 1 else None


def _tenant_of(scope: Scope) -> str | None:
    query: bytes = scope["query_string"]
    if b"tenant" not in query:
        return None
    found = [value for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if name == "tenant"]
    if len(set(found)) > 1:
        raise ApiError(400, "'tenant' is given more than once.", param="tenant")
    return found[0] if found else None


class Route(APIRoute):
    """A route that declares its rule (`allow`), and asks it before the request's body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        rule: Rule | None = getattr(self.endpoint, "rule", None)
        if rule is None:
            raise TypeError(f"{self.path}: {self.name} declares no rule; service/api/auth.py says how")
        RULES[self.name] = rule
        handler = super().get_route_handler()
        # What changes nothing of anybody's is not for the audit log: reads, and what is only computed.
        changes = bool((self.methods or set()) - {"GET", "HEAD"}) and not rule.metered

        async def handle(request: Request) -> Response:
            caller: Caller | None = request.scope["state"].get("caller")
            if caller is None or rule.open:
                return await handler(request)
            guards: Guards = request.app.state.guards
            _require(caller, rule)
            if rule.metered:
                _admit(guards.limiter, caller, request.scope["state"])
            if not changes:
                return await handler(request)
            if caller.namespace != caller.tenant:
                message = f"What belongs to tenant {caller.namespace!r} cannot be changed with a key of another one."
                raise ApiError(403, message, code="not_your_tenant", param="tenant")
            response = await handler(request)
            if response.status_code < 400:
                await _audit(guards.tenants, caller, self.name, request, response.status_code)
            return response

        return handle


def _require(caller: Caller, rule: Rule) -> None:
    """Raises ApiError 403."""
    if caller.admin or not (rule.admin or (rule.scopes and not rule.scopes & caller.scopes)):
        return
    raise _forbidden(rule)


def _admit(limiter: Limiter, caller: Caller, state: dict[str, Any]) -> None:
    """Raises ApiError 429."""
    try:
        limiter.begin(caller.tenant_id, caller.limits)
    except LimitReached as full:
        raise limit_error(429, caller, full.name, full.limit, retry_after_s=full.retry_after_s) from None
    state["metered"] = True


def limit_error(
    status: int, caller: Caller, name: str, limit: int, detail: str = "", *, retry_after_s: float | None = None
) -> ApiError:
    """A limit of the tenant is in the way; the error's param is the limit's name."""
    message = f"Tenant {caller.tenant!r} has reached its limit {name} of {limit}{detail}."
    return ApiError(status, message, code="limit_exceeded", param=name, retry_after_s=retry_after_s)


async def _audit(tenants: Tenants, caller: Caller, action: str, request: Request, status: int) -> None:
    """Before the answer: what was answered is in the log, also if the process is killed."""
    state = request.scope["state"]
    target = state.get("target") or " ".join(str(value) for value in request.path_params.values())
    log.get("service.audit").info("management action", action=action, actor=caller.actor, target=target, status=status)
    await tenants.record(caller.actor, caller.tenant, action, target, status, state["request_id"])
