"""Who calls, and what he may do.

With an admin key (LORAPLEX_ADMIN_KEY) every request passes the Gate, which finds out who calls, before anything of its
body is read: 401 to whoever has no valid key. Then the route asks whether that caller may: each declares its rule,
`@allow("upload")`, and a route without one cannot be made (Route). Without an admin key there is no Gate, one user, and
nothing is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service import log
from service.api.errors import as_api_error, status_of
from service.api.failure import ApiError, shown
from service.api.keyring import ADMIN, CACHE_S, OPERATOR, SINGLE_USER, Caller, Keyring
from service.limits import Limiter, LimitReached
from service.store.audit import AuditLog
from service.store.errors import CatalogueError
from service.store.tables import DEFAULT_TENANT
from service.store.tenants import SCOPES, Tenants

__all__ = [
    "SINGLE_USER",
    "Caller",
    "CallerDep",
    "Gate",
    "Guards",
    "Route",
    "Rule",
    "about",
    "allow",
    "caller_of",
    "limit_error",
    "reserve",
]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route asks of its caller: any one of `scopes`; none of them: any key will do. `metered`: it is what
    requests and tokens per minute and concurrent requests count: inference, /tokenize and
    /detokenize, uploads, merges."""

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


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope["state"].get("caller", SINGLE_USER) if "state" in request.scope else SINGLE_USER
    return caller


async def _caller(request: Request) -> Caller:
    return caller_of(request)


CallerDep = Annotated[Caller, Depends(_caller)]


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
        state["caller"], state["known_at"] = caller, time.monotonic()
        state["tenant"], state["key"] = caller.tenant, caller.actor
        try:
            await self._app(scope, receive, send)
        finally:
            if state.get("metered"):
                used = (state.get("prompt_tokens") or 0) + (state.get("completion_tokens") or 0)
                guards.limiter.end(caller.tenant_id, used, **state.get("reserved", {}))


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
    """A route that declares its rule (`allow`), and asks it before the request's body is read. Query parameters that it
    does not have are refused, unless it is open to everybody: what probes add to their addresses changes nothing."""

    def __init__(self, *args: Any, dependencies: Sequence[Any] | None = None, **options: Any) -> None:
        super().__init__(*args, dependencies=[Depends(_still_known), *(dependencies or ())], **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        rule: Rule | None = getattr(self.endpoint, "rule", None)
        if rule is None:
            raise TypeError(f"{self.path}: {self.name} declares no rule; service/api/auth.py says how")
        RULES[self.name] = rule
        handler = super().get_route_handler()
        # What changes nothing of anybody's is not for the audit log: reads, and what is only computed.
        computed = rule.metered and not rule.scopes & {"upload", "manage"}
        changes = bool((self.methods or set()) - {"GET", "HEAD"}) and not computed
        parameters = sorted({*_query_parameters(self.dependant), "tenant"})

        async def handle(request: Request) -> Response:
            if changes and not rule.open:
                return await _audited(lambda: judge(request), self.name, request)
            return await judge(request)

        async def judge(request: Request) -> Response:
            """Asks the rule, then the route."""
            state = request.scope["state"]
            caller: Caller | None = state.get("caller")
            if caller is None:
                _only_user(request)
                if not rule.open:
                    _require_known(request, parameters)
            elif not rule.open:
                _require(caller, rule)
                _require_known(request, parameters)
                if rule.metered:
                    _admit(request.app.state.guards.limiter, caller, state)
                if changes and caller.namespace != caller.tenant:
                    whose = f"What belongs to tenant {caller.namespace!r}"
                    message = f"{whose} cannot be changed with a key of another one."
                    raise ApiError(403, message, code="not_your_tenant", param="tenant")
            return await handler(request)

        return handle


async def _still_known(request: Request) -> None:
    """Asks for the caller again where the body took its time: while it came a key may have been revoked, or the tenant
    deleted and another been given the name. (FastAPI reads the body before it solves dependencies.) Raises ApiError
    401, 403."""
    state = request.scope["state"]
    caller: Caller | None = state.get("caller")
    if caller is None or time.monotonic() - state["known_at"] < CACHE_S:
        return
    now = await request.app.state.guards.keyring.caller(_authorization(request.scope), _tenant_of(request.scope))
    if now.tenant_id != caller.tenant_id:
        raise ApiError(401, "The tenant has been deleted.", code="invalid_key")


def _query_parameters(dependant: Dependant) -> set[str]:
    """By the names that they have in an address."""
    own = {field.alias for field in dependant.query_params}
    return own.union(*map(_query_parameters, dependant.dependencies))


def _require_known(request: Request, parameters: list[str]) -> None:
    """Raises ApiError 400 for a query parameter that the route does not have: passed over, one that is mistyped has
    something else done than was asked for. Its value is not shown, which may be a key."""
    if not request.scope["query_string"]:
        return
    unknown = next((name for name in request.query_params if name not in parameters), None)
    if unknown is not None:
        message = f"Unknown query parameter {shown(unknown)}; there are: {', '.join(parameters)}."
        raise ApiError(400, message, code="unknown_parameter", param=unknown)


def _only_user(request: Request) -> None:
    """Raises ApiError 404 for ?tenant where there are none: what is meant for another tenant must not hit the only
    user's adapters."""
    tenant = _tenant_of(request.scope)
    if tenant not in (None, DEFAULT_TENANT):
        message = f"There is no tenant {shown(tenant)}: this server has a single user (LORAPLEX_ADMIN_KEY is not set)."
        raise ApiError(404, message, code="single_user", param="tenant")


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


def reserve(request: Request, caller: Caller, *, sequences: int, tokens: int) -> None:
    """What a metered request takes of its tenant's limits, once it is known: how many answers are computed at once, and
    the tokens of prompts and answers that it may use at most. Raises ApiError 429, 413 for what alone is more than the
    limit."""
    state = request.scope["state"]
    if not state.get("metered") or (caller.limits.tokens_per_minute is None and sequences == 1):
        return
    limiter: Limiter = request.app.state.guards.limiter
    try:
        limiter.reserve(caller.tenant_id, caller.limits, sequences=sequences, tokens=tokens)
    except LimitReached as full:
        of = {"concurrent_requests": f"{sequences} answers at once (prompts x n)"}
        what = of.get(full.name, f"up to {tokens} tokens (prompts, and max_tokens for each answer)")
        status = 413 if full.retry_after_s is None else 429
        detail = f"; the request needs {what}"
        raise limit_error(status, caller, full.name, full.limit, detail, retry_after_s=full.retry_after_s) from None
    state["reserved"] = {"sequences": sequences, "reserved": tokens}


def limit_error(
    status: int, caller: Caller, name: str, limit: int, detail: str = "", *, retry_after_s: float | None = None
) -> ApiError:
    """A limit of the tenant is in the way; the error's param is the limit's name."""
    message = f"Tenant {caller.tenant!r} has reached its limit {name} of {limit}{detail}."
    return ApiError(status, message, code="limit_exceeded", param=name, retry_after_s=retry_after_s)


async def _audited(work: Callable[[], Coroutine[Any, Any, Response]], action: str, request: Request) -> Response:
    """An action that would change something, in the audit log before it is begun, and completed there before the
    answer: refused ones too, and those of whoever may not do them. Raises CatalogueUnavailable, and nothing is done,
    where it cannot be entered."""
    audit: AuditLog = request.app.state.audit
    state = request.scope["state"]
    caller = caller_of(request)
    actor = caller.actor if "caller" in state else OPERATOR
    where = " ".join(str(value) for value in request.path_params.values())
    number = state["action"] = await audit.record(actor, caller.tenant, action, where, request_id=state["request_id"])
    try:
        response = await work()
    except Exception as exc:
        await _completed(audit, number, action, actor, state.get("target") or where, status_of(exc))
        raise
    made = response.headers.get("location", "").rpartition("/")[2]
    await _completed(audit, number, action, actor, state.get("target") or where or made, response.status_code)
    return response


async def _completed(audit: AuditLog, number: int, action: str, actor: str, target: str, status: int) -> None:
    log.get("service.audit").info("management action", action=action, actor=actor, target=target, status=status)
    await audit.complete(number, target, status)


async def about(request: Request, target: str) -> None:
    """What an action is about that has it in its body, for the audit log: before anything is done."""
    state = request.scope["state"]
    state["target"] = target
    await request.app.state.audit.about(state["action"], target)
