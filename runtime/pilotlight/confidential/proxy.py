"""A local OpenAI endpoint in front of a server on somebody else's machine, for clients that know nothing of all this.

Before anything is sent, the server proves itself with a fresh nonce; its keys are pinned and each request is encrypted
for them. The end of an answer is held back until it is certain that nothing before it is missing, and, where receipts
are kept, until its receipt fits. So a client sees a complete answer or an error, never a part that looks complete.

What the network sees: path, headers and API key (under TLS, if the URL is https), sizes and times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from pilotlight.confidential import tls_pin
from pilotlight.confidential.answers import PLAIN, read_at_most
from pilotlight.confidential.binding import NO_PART
from pilotlight.confidential.chain import DEFECTS
from pilotlight.confidential.ehbp import (
    ENCAPSULATED_KEY,
    RESPONSE_NONCE,
    EncryptedBodyRefused,
    Frames,
    ResponseCipher,
    Sent,
)
from pilotlight.confidential.receipt_files import NAME, ReceiptFiles
from pilotlight.confidential.receipts import MAX_RECEIPT_BYTES, Exchange, verify_receipt
from pilotlight.confidential.remote import Proven, RemotePolicy, RemoteRefused, fresh_nonce, prove
from pilotlight.errors import ConfigError, PilotlightError
from pilotlight.tee import TEE_HEADER

TIMEOUT = httpx.Timeout(30.0, read=600.0)
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_ATTESTATION_BYTES = 8 * 1024 * 1024
FRAME_BYTES = 64 * 1024
SENT_HEADERS = ("authorization", "x-api-key", "content-type", "accept", "x-request-id", "anthropic-version")
KEPT_HEADERS = ("content-type", "x-request-id", "request-id", "retry-after", "x-should-retry")
EVENT_STREAM = "text/event-stream"
PROVE_AGAIN_AFTER_S = 300.0
"""A server may exchange a function's artifact; it has to say so before long."""


class _Named(msgspec.Struct):
    model: str


@dataclass(frozen=True, slots=True)
class Remote:
    """A proven server and the way to it."""

    proven: Proven
    client: httpx.AsyncClient
    proven_at: float


class Proxy:
    """The endpoint. A model's server is proven at its first request, and again when its key has changed."""

    def __init__(
        self,
        url: str,
        policy: RemotePolicy,
        receipts_dir: Path | None = None,
        make_client: Callable[[httpx.URL, Proven | None], httpx.AsyncClient] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError where the URL is none, or receipts cannot be written where they are to be kept."""
        self._clock = clock
        self._url = _remote_url(url)
        self._policy = policy
        self._receipts = None if receipts_dir is None else ReceiptFiles(receipts_dir)
        self._make_client = make_client or client_for
        self._now = now
        self._remotes: dict[str | None, Remote] = {}

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._answering(self.models), methods=["GET"]),
                Route("/v1/{path:path}", self._answering(self.forward), methods=["POST"]),
            ]
        )

    async def prove(self, model: str | None = None) -> Proven:
        """Have the server prove itself now.

        Raises:
            PilotlightError: it does not, or cannot be reached.
        """
        try:
            return (await self._remote(model)).proven
        except httpx.HTTPError as error:
            raise RemoteRefused(f"the remote cannot be reached ({type(error).__name__})") from error

    async def close(self) -> None:
        for remote in self._remotes.values():
            await remote.client.aclose()

    async def models(self, request: Request) -> Response:
        """Pass on the list of models, which is public; nothing in it is believed."""
        remote = await self._any_remote()
        answer, content = await self._get(
            remote.client, "/v1/models", MAX_ATTESTATION_BYTES, _chosen(request.headers, SENT_HEADERS)
        )
        return Response(content, answer.status_code, _chosen(answer.headers, KEPT_HEADERS))

    async def forward(self, request: Request) -> Response:
        body = await _body(request)
        model = _model(body)
        remote = await self._remote(model)
        answer = await self._send(request, remote, body)
        if isinstance(answer, _KeyChanged):
            await self._forget(model)
            former, remote = remote, await self._remote(model)
            if remote.proven.bindings.hpke_key == former.proven.bindings.hpke_key:
                # Somebody in between who passes a request on and says this could have it answered twice.
                raise RemoteRefused("the remote says that its key has changed, and it has not")
            answer = await self._send(request, remote, body)
        if isinstance(answer, _KeyChanged):
            raise RemoteRefused("the remote does not take the key that it has just proven to have")
        return await answer.response()

    async def _send(self, request: Request, remote: Remote, body: bytes) -> _Answer | _KeyChanged:
        sent = Sent(remote.proven.hpke_key)
        headers = {**_chosen(request.headers, SENT_HEADERS), ENCAPSULATED_KEY: sent.header}
        frames = b"".join(sent.seal(body[start : start + FRAME_BYTES]) for start in range(0, len(body), FRAME_BYTES))
        outgoing = remote.client.build_request(
            "POST", self._at(request.url.path), content=frames, headers=headers, params=request.url.query or None
        )
        answer = await remote.client.send(outgoing, stream=True)
        if RESPONSE_NONCE in answer.headers:
            cipher = sent.response(answer.headers[RESPONSE_NONCE])
            check = None if self._receipts is None else self._check_receipt
            return _Answer(answer, cipher, body, remote, check)
        await answer.aclose()
        if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            return _KeyChanged()
        raise InClear(answer.status_code, _chosen(answer.headers, ("retry-after", "x-request-id")))

    async def _check_receipt(
        self, remote: Remote, request_id: str, exchange: Exchange, headers: Mapping[str, str]
    ) -> None:
        """Fetch the receipt of an answer, hold it against what was sent and received, and keep it."""
        if not NAME.fullmatch(request_id):
            raise RemoteRefused("the remote names no request")
        answer, content = await self._get(remote.client, f"/v1/receipts/{request_id}", MAX_RECEIPT_BYTES, dict(headers))
        if answer.status_code != httpx.codes.OK:
            raise RemoteRefused(f"the remote gives no receipt (status {answer.status_code})")
        verified = verify_receipt(content, remote.proven.receipt_key, exchange)
        if verified.artifact_digest != remote.proven.artifact_digest or verified.request_id != request_id:
            raise RemoteRefused("the receipt is of another artifact or request")
        assert self._receipts is not None
        try:
            self._receipts.write(request_id, content)
        except OSError as error:
            raise ReceiptNotKept(f"the receipt cannot be kept ({error.strerror})") from error

    async def _any_remote(self) -> Remote:
        return next(iter(self._remotes.values()), None) or await self._remote(None)

    async def _remote(self, model: str | None) -> Remote:
        """Return the server of a model, which proves itself if it has not yet."""
        known = self._remotes.get(model)
        if known is None or self._clock() - known.proven_at >= PROVE_AGAIN_AFTER_S:
            nonce = fresh_nonce()
            query = {"nonce": nonce.hex()} | ({} if model is None else {"model": model})
            async with self._make_client(self._url, None) as client:
                answer, content = await self._get(client, "/attestation", MAX_ATTESTATION_BYTES, {}, query)
            if answer.status_code != httpx.codes.OK:
                raise RemoteRefused(f"the remote does not attest (status {answer.status_code})")
            proven = prove(content, nonce, self._policy, self._now())
            client = await asyncio.to_thread(self._make_client, self._url, proven)  # it may have to look at TLS
            known = self._remotes[model] = Remote(proven, client, self._clock())
        return known

    async def _get(
        self,
        client: httpx.AsyncClient,
        path: str,
        max_bytes: int,
        headers: dict[str, str],
        query: dict[str, str] | None = None,
    ) -> tuple[httpx.Response, bytes]:
        """Return an answer that nothing is known of, and its body, which is no longer than this."""
        asked = client.build_request("GET", self._at(path), headers={**headers, **PLAIN}, params=query)
        answer = await client.send(asked, stream=True)
        return answer, await read_at_most(answer, max_bytes)

    async def _forget(self, model: str | None) -> None:
        remote = self._remotes.pop(model, None)
        if remote is not None:
            await remote.client.aclose()

    def _at(self, path: str) -> httpx.URL:
        return self._url.copy_with(path=self._url.path.rstrip("/") + path)

    def _answering(self, endpoint: Callable[[Request], object]) -> Callable[[Request], object]:
        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)  # type: ignore[no-any-return, misc]
            except PilotlightError as error:
                headers = error.headers if isinstance(error, InClear) else {}
                return Response(error_body(error), _status(error), headers, "application/json")
            except httpx.HTTPError as error:
                refusal = RemoteRefused(f"the remote cannot be reached ({type(error).__name__})")
                return Response(error_body(refusal), refusal.status, media_type="application/json")

        return answer


class InClear(PilotlightError):
    """The remote, or whoever is in between, refuses without having opened the request. The reason is not believed."""

    code = "remote_refused_in_clear"

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"the remote refuses in clear, with status {status}")
        self.status = status if 400 <= status < 600 else 502
        self.headers = dict(headers)


class ReceiptNotKept(PilotlightError):
    """An answer came whole, and its receipt cannot be written. Where receipts are demanded, it is not given."""

    code = "receipt_not_kept"


class _KeyChanged:
    """The remote could not open the request: it has another key by now."""


CheckReceipt = Callable[[Remote, str, Exchange, Mapping[str, str]], object]


class _Answer:
    """An encrypted answer on its way to the client."""

    def __init__(
        self,
        answer: httpx.Response,
        cipher: ResponseCipher,
        body: bytes,
        remote: Remote,
        check_receipt: CheckReceipt | None,
    ) -> None:
        self._answer = answer
        self._cipher = cipher
        self._exchange = Exchange.of(body)
        self._remote = remote
        self._check_receipt = check_receipt

    async def response(self) -> Response:
        # The remote's own word for its label goes in clear: what is said here is what its evidence was worth to us.
        label = {TEE_HEADER: str(self._remote.proven.appraisal.label)}
        headers = _chosen(self._answer.headers, KEPT_HEADERS) | label
        if headers.get("content-type", "").startswith(EVENT_STREAM):
            return StreamingResponse(self._events(), self._answer.status_code, headers)
        return Response(b"".join([text async for text in self._texts()]), self._answer.status_code, headers)

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield a stream's frames; what is wrong with it becomes one error frame, and then it has no end."""
        try:
            async for text in self._texts():
                yield text
        except (PilotlightError, httpx.HTTPError) as error:
            problem = error if isinstance(error, PilotlightError) else RemoteRefused("the connection was cut off")
            yield b"data: " + error_body(problem) + b"\n\n"

    async def _texts(self) -> AsyncIterator[bytes]:
        """Yield what was sealed, each piece once the next one is there, and the last one when all is known to be well.

        Raises:
            EncryptedBodyRefused: a frame was altered, or the end is missing.
            RemoteRefused: the receipt does not fit.
        """
        held = b""
        frames = Frames()
        try:
            async for piece in self._answer.aiter_raw():
                for frame in frames.feed(piece):
                    text = self._cipher.open(frame)
                    if text:
                        self._exchange.received(text)
                        if held:
                            yield held
                        held = text
            frames.finish()
        finally:
            await self._answer.aclose()
        if not self._cipher.ended:
            raise EncryptedBodyRefused("the answer was cut off on its way")
        if self._check_receipt is not None and self._answer.is_success:
            request_id = self._answer.headers.get("x-request-id", "")
            sent = _chosen(self._answer.request.headers, ("authorization", "x-api-key"))
            await self._check_receipt(self._remote, request_id, self._exchange, sent)  # type: ignore[misc]
        yield held


def client_for(url: httpx.URL, proven: Proven | None) -> httpx.AsyncClient:
    """Return a client. Under https it speaks to the certificate in the evidence only; before there is any, to whoever
    is there, since what is asked for then proves itself.

    Raises:
        RemoteRefused: the certificate is another one.
    """
    if url.scheme != "https":
        return httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False)
    if proven is None:
        return httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False, verify=False)  # noqa: S501
    if proven.bindings.tls_key_hash == NO_PART:
        raise RemoteRefused("the evidence holds no TLS key: confidential.tls_certificate")
    parts = urlsplit(str(url))
    try:
        certificate = tls_pin.certificate_of(parts.hostname or "", parts.port or 443)
        if tls_pin.key_hash(certificate) != proven.bindings.tls_key_hash:
            raise RemoteRefused("the key of the TLS certificate is not the one in the evidence")
        context = tls_pin.pinned(certificate)
    except OSError as error:
        raise RemoteRefused(f"the remote cannot be reached ({error})") from error
    except DEFECTS as error:
        raise RemoteRefused("the remote's TLS certificate cannot be read") from error
    return httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False, verify=context)


def error_body(error: PilotlightError) -> bytes:
    """Return an error as OpenAI's clients read it."""
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": error.type, "param": None, "code": error.code}}
    )


def _status(error: PilotlightError) -> int:
    """Whatever is wrong with the remote is no fault of the client's request."""
    return error.status if isinstance(error, InClear | RemoteRefused | BadRequest) else 502


class BadRequest(PilotlightError):
    """The request cannot be forwarded as it is."""

    status = 400
    code = "invalid_value"
    type = "invalid_request_error"


def _model(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("the body is not a JSON object with a model") from error


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BadRequest(f"the request body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


def _chosen(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


def _remote_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text.rstrip("/"))
    except httpx.InvalidURL as error:
        raise ConfigError(f"{text}: is no URL ({error})") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{text}: expected http:// or https:// and a host")
    return url
