"""The OpenAPI document, and with it /docs: what FastAPI finds in the routes, plus examples that work, every status
code, and links from what an upload answers to what can be done with it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from service.api.auth import RULES, Rule
from service.store.names import ALIAS, NAME

Json = dict[str, Any]

_NAMED = (404,)
_CHANGE = (400, 404, 409, 412)
_BODY = (400, 413)
_UPLOAD = (400, 403, 408, 409, 413, 415, 422, 429, 503, 507)

FAILURES: dict[str, tuple[int, ...]] = {
    "completions": (*_BODY, 404, 409, 429, 503),
    "chat_completions": (*_BODY, 404, 409, 429, 503),
    "list_models": (400,),
    "get_model": (404, 409),
    "tokenize": (*_BODY, 404, 409),
    "detokenize": (*_BODY, 404, 409, 503),
    "create_adapter": _UPLOAD,
    "put_adapter": (*_UPLOAD, 412),
    "list_adapters": (400, 503),
    "get_adapter": _NAMED,
    "change_adapter": (*_CHANGE, 413),
    "delete_adapter": _CHANGE,
    "list_versions": (400, 404),
    "get_version": _NAMED,
    "delete_version": _CHANGE,
    "list_files": _NAMED,
    "get_file": (404, 416),
    "put_alias": (*_CHANGE, 413),
    "delete_alias": _CHANGE,
    "load_adapter": (400, 404, 409, 413, 503),
    "unload_adapter": (400, 404, 409, 503),
    "create_merge": (*_BODY, 403, 404, 409, 422, 429, 503, 507),
    "list_merges": (400, 404),
    "get_merge": _NAMED,
    "get_usage": (400,),
    "delete_merge": _NAMED,
    "list_merge_files": _NAMED,
    "get_merge_file": (404, 416, 503),
    "create_tenant": (*_BODY, 409),
    "list_tenants": (400,),
    "get_tenant": _NAMED,
    "change_tenant": (*_BODY, 404),
    "delete_tenant": (404, 409),
    "create_key": (*_BODY, 404),
    "list_keys": (400, 404),
    "get_key": _NAMED,
    "change_key": (*_BODY, 404),
    "delete_key": _NAMED,
    "list_audit": (400,),
    "health": (),
    "ready": (),
    "metrics": (),
    "version": (),
}
"""Statuses of failure by operation. Every operation may also answer 500, and 400 to a query parameter that it does not
have, unless it is open to everybody."""

_BYTES = {"schema": {"type": "string", "format": "binary"}}
_TEXT = {"schema": {"type": "string"}}
_OBJECT = {"schema": {"type": "object"}}
_EVENT = {
    "schema": {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}},
    }
}

SUCCESSES: dict[str, dict[str, Json]] = {
    "completions": {
        "200": {"description": "The completion; with `stream`, events.", "content": {
            "application/json": _OBJECT, "text/event-stream": _EVENT}}},
    "chat_completions": {
        "200": {"description": "The answer; with `stream`, events.", "content": {
            "application/json": _OBJECT, "text/event-stream": _EVENT}}},
    "create_adapter": {
        "200": {"description": "The adapter has this content already.", "content": {"application/json": _OBJECT}}},
    "put_adapter": {
        "200": {"description": "A version has this content already.", "content": {"application/json": _OBJECT}}},
    "get_file": {
        "200": {"description": "The file.", "content": {
            "application/octet-stream": _BYTES, "application/json": {"schema": {}}}},
        "206": {"description": "The range asked for.", "content": {
            "application/octet-stream": _BYTES, "application/json": {"schema": {}},
            "multipart/byteranges": _BYTES}},
        "304": {"description": "The file is the one named by If-None-Match."}},
    "create_merge": {
        "200": {"description": "The merge that this Idempotency-Key has started.", "content": {
            "application/json": _OBJECT}}},
    "get_merge_file": {
        "200": {"description": "The file.", "content": {
            "application/octet-stream": _BYTES, "application/json": {"schema": {}}}},
        "206": {"description": "The range asked for.", "content": {
            "application/octet-stream": _BYTES, "application/json": {"schema": {}},
            "multipart/byteranges": _BYTES}},
        "304": {"description": "The file is the one named by If-None-Match."}},
    "get_usage": {
        "200": {"description": "The sums; with `format=csv`, or where Accept says so, as CSV.", "content": {
            "application/json": _OBJECT, "text/csv": {"schema": {"type": "string"}}}}},
    "put_alias": {
        "201": {"description": "The alias is new.", "content": {"application/json": _OBJECT}}},
    "load_adapter": {
        "200": {"description": "It is on the device (`wait`).", "content": {"application/json": _OBJECT}}},
    "unload_adapter": {
        "200": {"description": "It is out of memory (`wait`).", "content": {"application/json": _OBJECT}}},
    "ready": {
        "503": {"description": "Requests would fail now; `reason` says why.", "content": {
            "application/json": _OBJECT}}},
    "metrics": {
        "200": {"description": "Prometheus's text format.", "content": {"text/plain": _TEXT}}},
}  # fmt: skip

ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": {"type": "string", "description": "Names the field and its value."},
                "type": {"type": "string"},
                "code": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"], "description": "Path of the field, as in messages[0].role."},
                "reasons": {
                    "type": "array", "items": {"type": "string"}, "description": "Of a refused adapter: all of them.",
                },
            },
        }
    },
}  # fmt: skip

PARAMETERS: dict[str, Any] = {
    "name": "pirate",
    "model": "pirate",
    "version": "1",
    "filename": "adapter_config.json",
    "merge": "merge-0123456789abcdef01234567",
    "alias": "prod",
    "tenant": "acme",
    "key": "0123456789abcdef",
}
"""Example of each path parameter. `pirate` comes with `make serve`."""

PATTERNS = {"name": f"^{NAME.pattern}$", "alias": f"^{ALIAS.pattern}$"}


def examples(base: str) -> dict[str, dict[str, Json]]:
    """Bodies that the server answers as they stand, by operation and title; `base`: the base model's name."""
    question = [{"role": "user", "content": "What is a river?"}]
    mix = [{"name": "pirate", "weight": 0.7}, {"name": "headline", "weight": 0.5}]
    return {
        "chat_completions": {
            "An adapter": {"model": "pirate", "messages": question, "temperature": 0, "max_tokens": 48},
            "The base model": {"model": base, "messages": question, "temperature": 0, "max_tokens": 48},
            "A mix of adapters": {"model": base, "adapters": mix, "messages": question, "max_tokens": 24},
            "As a stream": {"model": "pirate", "messages": question, "max_tokens": 24, "stream": True,
                            "stream_options": {"include_usage": True}},
        },
        "completions": {
            "A text": {"model": base, "prompt": "The sea is", "max_tokens": 16, "temperature": 0},
            "Sampled, with log-probabilities": {
                "model": base, "prompt": ["The sea is", "The moon is"], "max_tokens": 8, "n": 2, "temperature": 0.8,
                "top_p": 0.95, "seed": 7, "stop": ["\n"], "logprobs": 2},
            "Token ids, a version of an adapter": {"model": "pirate@1", "prompt": [504, 3575, 314], "max_tokens": 8},
        },
        "tokenize": {
            "A text": {"prompt": "Shiver me timbers!"},
            "A conversation": {"messages": question, "return_token_strs": True},
        },
        "detokenize": {"Two tokens": {"tokens": [504, 3575]}},
        "change_adapter": {
            "Describe it": {"description": "Answers like a pirate", "labels": {"language": "en"}},
            "Another default version": {"default_version": 1},
            "Fetched at start": {"pinned": True},
        },
        "create_merge": {
            "Two adapters into one": {
                "name": "pirate-headline", "method": "linear",
                "sources": [{"adapter": "pirate", "weight": 0.7}, {"adapter": "headline", "weight": 0.5}]},
            "TIES": {
                "name": "pirate-headline", "method": "ties", "density": 0.5,
                "sources": [{"adapter": "pirate@1"}, {"adapter": "headline"}]},
        },
        "put_alias": {"Version 1": {"version": 1}},
        "create_tenant": {
            "A tenant with limits": {"name": "acme", "weight": 2, "limits": {"requests_per_minute": 600}},
        },
        "change_tenant": {"Fewer requests at once": {"limits": {"concurrent_requests": 8}}},
        "change_key": {"Not now": {"disabled": True}, "Never ends": {"expires_at": None}},
        "create_key": {"For an application": {"scopes": ["infer"], "description": "the web shop"}},
    }  # fmt: skip


_NAME = {"name": "$response.body#/name"}
_VERSION = {**_NAME, "version": "$response.body#/version"}
LINKS: dict[str, Json] = {
    "complete": {"operationId": "completions", "requestBody": {
        "model": "$response.body#/name", "prompt": "The sea is", "max_tokens": 4}},
    "chat": {"operationId": "chat_completions", "requestBody": {
        "model": "$response.body#/name", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}},
    "model": {"operationId": "get_model", "parameters": {"model": "$response.body#/name"}},
    "adapter": {"operationId": "get_adapter", "parameters": _NAME},
    "change": {"operationId": "change_adapter", "parameters": _NAME},
    "delete": {"operationId": "delete_adapter", "parameters": _NAME},
    "versions": {"operationId": "list_versions", "parameters": _NAME},
    "version": {"operationId": "get_version", "parameters": _VERSION},
    "delete_version": {"operationId": "delete_version", "parameters": _VERSION},
    "files": {"operationId": "list_files", "parameters": _VERSION},
    "config": {"operationId": "get_file", "parameters": {**_VERSION, "filename": "adapter_config.json"}},
    "alias": {"operationId": "put_alias", "parameters": {**_NAME, "alias": "prod"}, "requestBody": {
        "version": "$response.body#/version"}},
    "load": {"operationId": "load_adapter", "parameters": _VERSION},
    "unload": {"operationId": "unload_adapter", "parameters": _VERSION},
}  # fmt: skip
"""From the answer of an upload."""


def operation_id(route: APIRoute) -> str:
    """The name of the function."""
    return route.name


def install(app: FastAPI, base: str, *, with_keys: bool = False) -> None:
    """Makes `app.openapi()` the document of this module, built when it is first asked for."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, base, with_keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, base: str, with_keys: bool) -> Json:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)  # FastAPI's 422, which is a 400 here
    schemas["Error"] = ERROR
    bodies = examples(base)
    for path in document["paths"].values():
        for operation in path.values():
            _complete(operation, bodies.get(operation["operationId"]))
            if with_keys:
                _secure(operation, RULES[operation["operationId"]])
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _secure(operation: Json, rule: Rule) -> None:
    """What a key has to do with it: `x-loraplex-rule` names what a caller needs (service/api/auth.py)."""
    operation["x-loraplex-rule"] = rule.words
    operation["security"] = [] if rule.open else [{"key": []}]
    if rule.open:
        return
    codes = (400, 401, 403, 404, *((413, 429) if rule.metered else ()))
    operation["responses"].update({str(code): _failure(code) for code in codes})
    operation["responses"] = dict(sorted(operation["responses"].items()))
    operation["parameters"].append({
        "name": "tenant", "in": "query", "schema": {"type": "string"},
        "description": "Whose names are meant, other than the key's own; with the admin key: who acts.",
    })  # fmt: skip


def _failure(code: int) -> Json:
    return {
        "description": HTTPStatus(code).phrase,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


def _complete(operation: Json, bodies: dict[str, Json] | None) -> None:
    name = operation["operationId"]
    responses = operation["responses"]
    responses.pop("422", None)
    for status, response in SUCCESSES.get(name, {}).items():
        responses[status] = dict(response)
    for code in (*FAILURES[name], *(() if RULES[name].open else (400,))):
        responses[str(code)] = _failure(code)
    if bodies is not None:
        content = operation["requestBody"]["content"]["application/json"]
        content["examples"] = {title: {"summary": title, "value": value} for title, value in bodies.items()}
    parameters = operation.setdefault("parameters", [])
    for parameter in parameters:
        if parameter["in"] == "path":
            example = PARAMETERS[parameter["name"]]
            schema = parameter["schema"]
            parameter["example"] = int(example) if schema.get("type") == "integer" else example
            if (pattern := PATTERNS.get(parameter["name"])) is not None:
                schema["pattern"] = pattern
    if 412 in FAILURES[name]:
        for header, text in (
            ("If-Match", "Only if the adapter's ETag is this"),
            ("If-None-Match", "Only if it is not"),
        ):
            parameters.append({"name": header, "in": "header", "schema": {"type": "string"}, "description": text})
    if name in ("create_adapter", "put_adapter"):
        for status in ("200", "201"):
            responses[status]["links"] = LINKS
    operation["responses"] = dict(sorted(responses.items()))
