"""The HTTP application: routes, request ids, body limits."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
from collections.abc import Mapping

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight.api import errors
from pilotlight.api.metrics import CONTENT_TYPE, Metrics
from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_chat import CHAT, chat_request, parse_chat
from pilotlight.api.openai_completion import Shape, stream, whole
from pilotlight.api.openai_text import TEXT, parse_text, text_request
from pilotlight.api.sse import EventStream, cancelled_on_disconnect
from pilotlight.errors import BodyTooLarge, Draining, FunctionNotFound, InvalidRequest, PilotlightError, RequestNotFound
from pilotlight.function import Function, UsageLedger
from pilotlight.function import Request as FunctionRequest

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Api:
    """The endpoints, over the functions that this process serves."""

    def __init__(
        self, functions: Mapping[str, Function], ledger: UsageLedger, metrics: Metrics, max_body_bytes: int
    ) -> None:
        self._functions = functions
        self._ledger = ledger
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    def app(self) -> Starlette:
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/usage/{request_id}", self.usage),
                Route("/v1/requests/{request_id}/cancel", self.cancel, methods=["POST"]),
                Route("/livez", self.livez),
                Route("/readyz", self.readyz),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={
                PilotlightError: errors.on_pilotlight_error,
                HTTPException: errors.on_http_exception,
                Exception: errors.on_unexpected_error,
            },
        )
        app.add_middleware(RequestIds)
        return app

    async def chat_completions(self, request: Request) -> Response:
        body = parse_chat(await self._read_body(request))
        return await self._complete(request, body, chat_request(body, _request_id(request)), CHAT)

    async def completions(self, request: Request) -> Response:
        body = parse_text(await self._read_body(request))
        return await self._complete(request, body, text_request(body, _request_id(request)), TEXT)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_model_object(f) for f in self._functions.values()]})

    async def model(self, request: Request) -> Response:
        return _json(_model_object(self._function(request.path_params["name"])))

    async def usage(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        record = await asyncio.to_thread(self._ledger.get, request_id)
        if record is None:
            raise RequestNotFound(f"there is no usage record of a request {request_id!r}")
        return _json(record)

    async def cancel(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        if not any(function.cancel(request_id) for function in self._functions.values()):
            raise RequestNotFound(f"no request {request_id!r} is running")
        return _json({"id": request_id, "object": "request", "status": "cancelling"})

    async def livez(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        if any(function.draining for function in self._functions.values()):
            raise Draining
        return _json({"status": "ok", "functions": sorted(self._functions)})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _complete(self, request: Request, body: GenerationBody, asked: FunctionRequest, shape: Shape) -> Response:
        timed = dataclasses.replace(asked, deadline_at=getattr(request.state, "deadline_at", None))
        invocation = await self._function(body.model).invoke(timed)
        if body.stream:
            return EventStream(invocation, stream(invocation, body, shape))
        async with cancelled_on_disconnect(invocation, request.receive):
            return _json(await whole(invocation, body, shape))

    def _function(self, name: str) -> Function:
        if name not in self._functions:
            raise FunctionNotFound(name, list(self._functions))
        return self._functions[name]

    async def _read_body(self, request: Request) -> bytes:
        """Read the body, and stop reading at the limit."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
        return bytes(body)


class RequestIds:
    """Gives every request an id, the client's own where it sent an acceptable one, and returns it in the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        valid = REQUEST_ID.fullmatch(given) is not None
        request_id = given if valid else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if given and not valid:
            refusal = InvalidRequest("x-request-id", "x-request-id: expected 1 to 128 letters, digits or . _ : -")
            await errors.error_response(refusal)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


def _request_id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _model_object(function: Function) -> dict[str, object]:
    return {
        "id": function.name,
        "object": "model",
        "created": int(function.created_at_utc.timestamp()),
        "owned_by": "pilotlight",
        "max_context_tokens": function.max_context_tokens,
        "artifact": function.artifact.digest,
        "precision": function.artifact.manifest.precision,
    }
