"""/openapi.json, made from the types that read and write the wire: it cannot say anything else than they do."""

from __future__ import annotations

from typing import Any

import msgspec

from edgewise.serve.completions import WISHES
from edgewise.serve.link import MOST
from edgewise.wire.answers import ChunkBody, Completion, ErrorAnswer, ModelBody, ModelList, TextCompletion
from edgewise.wire.openai import ChatBody, TextBody

BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
COUNT = {"type": "integer", "minimum": 1, "maximum": MOST}
TYPES = (ChatBody, ChunkBody, Completion, TextBody, TextCompletion, ErrorAnswer, ModelBody, ModelList)


def document(version: str) -> bytes:
    """The OpenAPI 3.1 document as JSON."""
    _, components = msgspec.json.schema_components(TYPES, ref_template="#/components/schemas/{name}")
    paths = {
        "/v1/chat/completions": {
            "post": _asked("An answer to a conversation, whole or as a stream.", "ChatBody", "Completion", "ChunkBody")
        },
        "/v1/completions": {
            "post": _asked("What follows a text, whole or as a stream.", "TextBody", "TextCompletion", "TextCompletion")
        },
        "/v1/models": {"get": _operation("The models by name.", _json("ModelList"), (401,))},
        "/v1/models/{name}": {
            "get": _operation("One model.", _json("ModelBody"), (401, 404))
            | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
        },
        "/edgewise/bytes": {
            "get": _operation("So many random bytes, to measure the way here.", BINARY, (400, 401, 429))
            | {"parameters": [{"name": "count", "in": "query", "required": True, "schema": COUNT}]},
            "post": _operation("Takes a body and forgets it.", {"application/json": {}}, (401, 408, 413, 429))
            | {"requestBody": {"content": BINARY}},
        },
        "/livez": {"get": _operation("The process answers.", {"application/json": {}}, ())},
        "/readyz": {"get": _operation("Requests will be served.", {"application/json": {}}, (503,))},
        "/metrics": {"get": _operation("Counters for Prometheus.", {"text/plain": {}}, ())},
    }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Edgewise", "version": version},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


def _asked(summary: str, body: str, whole: str, piece: str) -> dict[str, Any]:
    answers = _json(whole) | {"text/event-stream": {"schema": _ref(piece)}}
    refusals = (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504)
    headers = [
        _header("x-edgewise-route", {"enum": list(WISHES)}),
        _header("x-edgewise-group", {"type": "string", "pattern": r"^[!-~]{1,100}$"}),
        _header("x-edgewise-hops", {"type": "string", "pattern": r"^[0-4]$"}),
        _header("x-request-deadline-ms", {"type": "string", "pattern": r"^[0-9]{1,7}(\.[0-9]{1,3})?$"}),
    ]
    request = {"required": True, "content": _json(body)}
    return _operation(summary, answers, refusals) | {"parameters": headers, "requestBody": request}


def _operation(summary: str, answer: dict[str, Any], refusals: tuple[int, ...]) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": summary, "content": answer}}
    for status in refusals:
        responses[str(status)] = {"description": "An error in OpenAI's form.", "content": _json("ErrorAnswer")}
    return {"summary": summary, "responses": responses}


def _header(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
