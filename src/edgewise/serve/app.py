"""The HTTP app: paths, keys, models, health. It knows one seam, Generator, and decides nothing."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from edgewise.engines.base import Generator
from edgewise.errors import UnknownModel
from edgewise.joint.breaker import Breaker
from edgewise.joint.privacy import Rules
from edgewise.joint.replay_log import ReplayLog
from edgewise.serve.completions import CHAT, TEXT, Completions, Crowd, Node
from edgewise.serve.errors import answer_error, failure_of
from edgewise.serve.exchange import Limits
from edgewise.serve.link import Bytes
from edgewise.serve.metrics import Metrics
from edgewise.serve.openapi import document
from edgewise.serve.split import Split
from edgewise.types import Decision, Route
from edgewise.wire.answers import encode_model, encode_models

if TYPE_CHECKING:
    from edgewise.serve.halves import Half  # loads onnx and its runtime, which no other node needs

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics"})  # for probes, which have no key


def create_app(
    generator: Generator,
    *,
    models: Sequence[str],
    route: Route,
    keys: Collection[str] = (),
    split: Split | None = None,
    ready: Callable[[], Awaitable[bool]] | None = None,
    limits: Limits | None = None,
    breaker: Breaker | None = None,
    log: ReplayLog | None = None,
    rules: Rules | None = None,
) -> Starlette:
    """The app over one generator, which it closes when it shuts down.

    `models` are the names that /v1/models lists and requests may use; `auto` is understood in any case, and `edge` and
    `cloud`, where listed, ask for that route. `route` is told of answers whose generator made no decision. With `keys`
    all paths but the probes need one of them as a bearer token. At `split` edges find the rest of their model's layers.
    `ready` answers /readyz; without it the app is ready once it
    runs. /metrics shows the state of `breaker` and the rows of `log`. `rules` say by header, path and
    model which requests must not leave this machine; what their text says the generator looks at itself.
    """
    limits = limits or Limits()
    metrics = Metrics(breaker, log)
    fingerprint = f"edgewise-{version('edgewise')}"
    decision = Decision(route, None, "only")
    node = Node(generator, frozenset(models) | {"auto"}, decision, limits, metrics, fingerprint, rules)
    crowd = Crowd(limits.in_flight)
    health = Health(ready)
    shelf = Shelf(models)
    app = Starlette(
        routes=[
            Path("/v1/chat/completions", Completions(node, CHAT, crowd), methods=["POST"]),
            Path("/v1/completions", Completions(node, TEXT, crowd), methods=["POST"]),
            Path("/v1/models", shelf.list, methods=["GET"]),
            Path("/v1/models/{name:path}", shelf.show, methods=["GET"]),
            Path("/edgewise/bytes", Bytes(limits, crowd), methods=["GET", "POST"]),
            *([split.route] if split else []),
            Path("/livez", health.live, methods=["GET"]),
            Path("/readyz", health.ready, methods=["GET"]),
            Path("/metrics", metrics.show, methods=["GET"]),
            Path("/openapi.json", show_openapi, methods=["GET"]),
        ],
        middleware=guards(keys),
        exception_handlers={HTTPException: answer_error, UnknownModel: answer_error, Exception: answer_error},
        lifespan=_closing(generator, *([split] if split else [])),
    )
    app.router.redirect_slashes = False  # a POST would lose its way, and the answer would not be JSON
    return app


def create_worker_app(worker: Split | Half, *, keys: Collection[str] = (), limits: Limits | None = None) -> Starlette:
    """The app of a worker alone: its WebSocket or its path for features, bytes that measure the way to it, and
    probes."""
    limits = limits or Limits()
    health = Health(None)
    return Starlette(
        routes=[
            worker.route,
            Path("/edgewise/bytes", Bytes(limits, Crowd(limits.in_flight)), methods=["GET", "POST"]),
            Path("/livez", health.live, methods=["GET"]),
            Path("/readyz", health.ready, methods=["GET"]),
        ],
        middleware=guards(keys),
        exception_handlers={HTTPException: answer_error, Exception: answer_error},
        lifespan=_closing(worker),
    )


class Closable(Protocol):
    async def close(self) -> None: ...


def _closing(*parts: Closable) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for part in parts:
                await part.close()

    return lifespan


def guards(keys: Collection[str]) -> list[Middleware]:
    return [Middleware(BearerKey, keys=keys)] if keys else []


class Shelf:
    """The models by name, in the order given; a name may hold `/` and `:`."""

    def __init__(self, models: Sequence[str]) -> None:
        self._models = tuple(dict.fromkeys(models))

    async def list(self, request: Request) -> Response:
        return Response(encode_models(self._models), media_type="application/json")

    async def show(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models:
            raise UnknownModel(f"there is no model {name[:100]!r} here", param="model", hint="see /v1/models")
        return Response(encode_model(name), media_type="application/json")


class Health:
    """/livez: the process answers. /readyz: requests will be served."""

    def __init__(self, ready: Callable[[], Awaitable[bool]] | None) -> None:
        self._ready = ready

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self._ready is None or await self._asked(self._ready):
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503)

    async def _asked(self, ready: Callable[[], Awaitable[bool]]) -> bool:
        try:
            return await ready()
        except Exception as e:  # whatever it is that fails, the server is not ready
            log.warning("not ready: %s", type(e).__qualname__)
            return False


async def show_openapi(request: Request) -> Response:
    return Response(document(version("edgewise")), media_type="application/json")


class BearerKey:
    """Lets nobody in without a key. The comparison takes as long for a wrong key as for a right one."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._expected = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS
        if not guarded or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refusal = HTTPException(401, "the key is missing or wrong", {"www-authenticate": "Bearer"})
        answer = failure_of(refusal).response()
        if scope["type"] == "http":
            await answer(scope, receive, send)
        else:  # nothing of a frame is read
            await WebSocket(scope, receive, send).send_denial_response(answer)

    def _knows(self, headers: Headers) -> bool:
        shown = headers.get("authorization", "").encode("latin-1")
        return sum(hmac.compare_digest(shown, expected) for expected in self._expected) > 0  # all are compared
