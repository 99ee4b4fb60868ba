"""The HTTP application: routes, request ids, body limits."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight import __version__
from pilotlight.api import errors
from pilotlight.api.admin import Admin, Control
from pilotlight.api.anthropic_messages import Messages
from pilotlight.api.attestation import Attestations, Attester, Unattested
from pilotlight.api.auth import Doorkeeper, Keys, caller_of
from pilotlight.api.catalogue import catalogue_of
from pilotlight.api.docs_page import SECURITY_POLICY, page
from pilotlight.api.endpoint import ANY, GENERATION, Endpoint, routes
from pilotlight.api.idempotency import KeptAnswers
from pilotlight.api.intake import Intake, json_response, request_id_of
from pilotlight.api.metrics import CONTENT_TYPE, Metrics
from pilotlight.api.objects import (
    REQUEST_ID,
    Alive,
    CancelledRequest,
    GenerationHeaders,
    ModelList,
    ModelObject,
    Ready,
    model_object,
)
from pilotlight.api.openai_body import GenerationBody
from pilotlight.api.openai_chat import ChatBody, ChatShape, chat_request
from pilotlight.api.openai_completion import Shape, stream, whole
from pilotlight.api.openai_responses import Responses
from pilotlight.api.openai_text import TextBody, TextShape, text_request
from pilotlight.api.openai_types import ChatChunk, ChatCompletion, TextChunk, TextCompletion
from pilotlight.api.openapi import document
from pilotlight.api.response_store import ResponseStore
from pilotlight.api.resume_token import ResumeTokens
from pilotlight.api.resumption import Resumption
from pilotlight.api.sse import STRAIGHT_SEND, TERMINATOR
from pilotlight.api.wire import parse
from pilotlight.errors import (
    Draining,
    FunctionNotFound,
    InvalidRequest,
    LedgerUnavailable,
    NotPermitted,
    PilotlightError,
    RequestNotFound,
)
from pilotlight.function import Function, UsageLedger
from pilotlight.function import Request as FunctionRequest
from pilotlight.metering.record import UsageRecord
from pilotlight.tee import TEE_HEADER, TeeLabel

RECEIPT_TYPE = "application/jose"
VALID_REQUEST_ID = re.compile(REQUEST_ID)

HTML = "text/html; charset=utf-8"


class Api:
    """The endpoints, over the functions that this process serves."""

    def __init__(
        self,
        functions: Mapping[str, Function],
        ledger: UsageLedger,
        metrics: Metrics,
        max_body_bytes: int,
        responses: ResponseStore,
        keyring: Keys | None = None,
        kept_answers: KeptAnswers | None = None,
        control: Control | None = None,
        attester: Attester | None = None,
        resume_tokens: ResumeTokens | None = None,
        middleware: Sequence[Callable[[ASGIApp], ASGIApp]] = (),
    ) -> None:
        """``middleware`` goes between the door and the endpoints, the first one outermost."""
        self._middleware = middleware
        self._attester = attester or Unattested()
        self._intake = Intake(functions, max_body_bytes, Resumption(resume_tokens, ledger), kept_answers)
        self._messages = Messages(self._intake)
        self._responses = Responses(self._intake, responses)
        self._functions = catalogue_of(functions)
        self._attestations = Attestations(self._functions, self._attester)
        self._admin = Admin(self._intake, control) if control is not None else None
        self._ledger = ledger
        self._metrics = metrics
        self._keyring = keyring

    def app(self) -> ASGIApp:
        app = _App(
            routes=routes(self.endpoints()),
            exception_handlers={
                PilotlightError: errors.on_pilotlight_error,
                HTTPException: errors.on_http_exception,
                Exception: errors.on_unexpected_error,
            },
        )
        app.router.redirect_slashes = False  # behind a proxy it would lead to where the proxy is not, with the body
        for one in reversed(self._middleware):
            app.add_middleware(one)
        app.add_middleware(Doorkeeper, keyring=self._keyring)
        app.add_middleware(RequestIds, tee=self._attester.label)  # the last one added is the first one called
        return app

    def endpoints(self) -> list[Endpoint]:
        return [
            *(self._admin.endpoints() if self._admin is not None else ()),
            Endpoint(
                "POST",
                "/v1/chat/completions",
                self.chat_completions,
                "Answer a conversation",
                answer=ChatCompletion,
                body=ChatBody,
                event=ChatChunk,
                terminator=TERMINATOR,
                headers=GenerationHeaders,
                refusals=GENERATION,
            ),
            Endpoint(
                "POST",
                "/v1/completions",
                self.completions,
                "Continue a text",
                answer=TextCompletion,
                body=TextBody,
                event=TextChunk,
                terminator=TERMINATOR,
                headers=GenerationHeaders,
                refusals=GENERATION,
            ),
            *self._responses.endpoints(),
            *self._messages.endpoints(),
            Endpoint("GET", "/v1/models", self.models, "List the functions", answer=ModelList),
            Endpoint(
                "GET",
                "/v1/models/{name:path}",
                self.model,
                "Describe a function",
                answer=ModelObject,
                refusals=(*ANY, NotPermitted, FunctionNotFound),
            ),
            Endpoint(
                "GET",
                "/v1/usage/{request_id}",
                self.usage,
                "Return the usage record of a finished invocation",
                answer=UsageRecord,
                also=(RECEIPT_TYPE,),
                refusals=(*ANY, RequestNotFound, LedgerUnavailable),
            ),
            Endpoint(
                "POST",
                "/v1/requests/{request_id}/cancel",
                self.cancel,
                "End a running invocation",
                answer=CancelledRequest,
                refusals=(*ANY, RequestNotFound),
            ),
            self._attestations.endpoint(),
            Endpoint("GET", "/livez", self.livez, "Tell whether the process runs", answer=Alive),
            Endpoint(
                "GET",
                "/readyz",
                self.readyz,
                "Tell whether requests are taken",
                answer=Ready,
                refusals=(*ANY, Draining),
            ),
            Endpoint(
                "GET",
                "/metrics",
                self.metrics,
                "Metrics for Prometheus",
                answer=CONTENT_TYPE,
                refusals=(*ANY, NotPermitted),
            ),
            Endpoint("GET", "/openapi.json", self.openapi, "Describe this API", answer=dict[str, Any]),
            Endpoint("GET", "/docs", self.docs, "Describe this API to people", answer=HTML),
        ]

    async def chat_completions(self, request: Request) -> Response:
        body = parse(await self._intake.read_body(request), ChatBody)
        return await self._complete(request, body, chat_request(body, request_id_of(request)), ChatShape())

    async def completions(self, request: Request) -> Response:
        body = parse(await self._intake.read_body(request), TextBody)
        return await self._complete(request, body, text_request(body, request_id_of(request)), TextShape())

    async def models(self, request: Request) -> Response:
        caller = caller_of(request)
        allowed = [function for function in self._functions.values() if caller.may_call(function.name)]
        return json_response(ModelList([model_object(function) for function in allowed]))

    async def model(self, request: Request) -> Response:
        return json_response(model_object(self._intake.function(request.path_params["name"], caller_of(request))))

    async def usage(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        record = await asyncio.to_thread(self._ledger.get, request_id)
        if record is None or not caller_of(request).may_see(record.key_id):
            raise RequestNotFound(f"there is no usage record of a request {request_id!r}")
        if request.headers.get("accept") == RECEIPT_TYPE:
            receipt = await asyncio.to_thread(self._ledger.receipt, request_id)
            if receipt is None:
                raise RequestNotFound(f"the usage record of {request_id!r} is not signed")
            return Response(receipt, media_type=RECEIPT_TYPE)
        return json_response(record)

    async def cancel(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        running = [function.running(request_id) for function in self._functions.versions()]
        found = [i for i in running if i is not None and caller_of(request).may_see(i.request.key_id)]
        if not found:
            raise RequestNotFound(f"no request {request_id!r} is running")
        for invocation in found:
            invocation.cancel()
        return json_response(CancelledRequest(request_id))

    async def livez(self, request: Request) -> Response:
        return json_response(Alive())

    async def readyz(self, request: Request) -> Response:
        if not all(function.ready for function in self._functions.values()):
            raise Draining
        caller = caller_of(request)
        return json_response(Ready(sorted(name for name in self._functions if caller.may_call(name))))

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        return json_response(self._document)

    async def docs(self, request: Request) -> Response:
        headers = {"content-type": HTML, "content-security-policy": SECURITY_POLICY}
        return Response(page(self._document), headers=headers)

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self.endpoints(), __version__)

    async def _complete(
        self, request: Request, body: GenerationBody, asked: FunctionRequest, shape: Shape[Any, Any]
    ) -> Response:
        return await self._intake.answer(
            request, body, asked, partial(stream, body=body, shape=shape), partial(whole, body=body, shape=shape)
        )


class _App(Starlette):
    """Keeps the way to the server open for frames, past the middleware: each layer of it would cost every token."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[STRAIGHT_SEND] = send
        await super().__call__(scope, receive, send)


class RequestIds:
    """Gives every request an id, the client's own where it sent an acceptable one, and returns it in the header;
    ``request-id`` is where Anthropic's clients look for it. Beside it stands what the place is that answers."""

    def __init__(self, app: ASGIApp, tee: TeeLabel) -> None:
        self._app = app
        self._tee = tee

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = dict(scope["headers"]).get(b"x-request-id")
        given = None if header is None else header.decode("latin-1")
        valid = given if given is not None and VALID_REQUEST_ID.fullmatch(given) else None
        request_id = valid or f"req-{secrets.token_hex(12)}"
        added = {"x-request-id": request_id, "request-id": request_id, TEE_HEADER: str(self._tee)}
        scope.setdefault("state", {}).update(request_id=request_id, headers=added)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(added)
            await send(message)

        if given is not None and valid is None:
            refusal = InvalidRequest("x-request-id", "x-request-id: expected 1 to 128 letters, digits or . _ : -")
            await errors.error_response(refusal, scope)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)
