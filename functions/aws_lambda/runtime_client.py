"""The Lambda Runtime API: take an invocation, stream its response, report what failed.

Source: the AWS Lambda developer guide, "Using the Lambda runtime API" and "Custom runtimes, response streaming".
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass

import msgspec

from runtime_http import Reply, Upload, call, upload

VERSION = "/2018-06-01/runtime"
HTTP_INTEGRATION = "application/vnd.awslambda.http-integration-response"
PRELUDE_END = bytes(8)
REQUEST_ID = "lambda-runtime-aws-request-id"
DEADLINE_MS = "lambda-runtime-deadline-ms"
INVOCATION_ID = "lambda-runtime-invocation-id"
GONE = 410
"""The platform gave the invocation up, for its time limit or because its caller left; the next one comes as usual."""


class RuntimeApiError(Exception):
    """The Runtime API refused a call that it should accept; the process cannot go on."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One event. ``deadline_at`` is the monotonic instant at which the platform kills the process."""

    request_id: str
    event: bytes
    deadline_at: float
    invocation_id: str | None = None
    """Newer platforms tell attempts with one request id apart by it, and want it back with every answer."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the platform records it."""

    type: str
    message: str

    def encode(self) -> bytes:
        return msgspec.json.encode({"errorMessage": self.message, "errorType": self.type, "stackTrace": []})


class ResponseStream:
    """The body of a streamed response."""

    def __init__(self, body: Upload) -> None:
        self._body = body
        self._num_bytes = 0

    async def write_prelude(self, status: int, headers: dict[str, str], cookies: list[str]) -> None:
        """Send what becomes the HTTP response's head; only with the content type ``HTTP_INTEGRATION``.

        Raises:
            OSError: the platform has closed the connection.
        """
        head = {"statusCode": status, "headers": headers, "cookies": cookies}
        await self._body.write(msgspec.json.encode(head) + PRELUDE_END)

    async def write(self, data: bytes) -> None:
        """Send a piece of the payload at once.

        Raises:
            OSError: the platform has closed the connection.
        """
        self._num_bytes += len(data)
        await self._body.write(data)

    async def finish(self, failure: Failure | None = None) -> Reply:
        """End the payload and close. It is never quite empty: a front end may wait for its first byte for ever.

        Raises:
            OSError: the platform has closed the connection.
        """
        if not self._num_bytes:
            await self._body.write(b"\n")
        return await self._body.finish({} if failure is None else _trailers(failure))

    def close(self) -> None:
        """Close the connection, wherever the response is."""
        self._body.close()


class RuntimeClient:
    """Talks to the Runtime API at ``address`` (``host:port``)."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def next_invocation(self) -> Invocation:
        """Wait for an invocation. Several callers may wait at the same time, where the platform allows that.

        Raises:
            RuntimeApiError: there was none in the answer.
            OSError: the Runtime API is gone.
        """
        reply = await call(self._address, "GET", f"{VERSION}/invocation/next", {})
        if reply.status != 200 or not reply.headers.keys() >= {REQUEST_ID, DEADLINE_MS}:
            raise RuntimeApiError(f"invocation/next was answered with status {reply.status} and no invocation")
        left_s = int(reply.headers[DEADLINE_MS]) / 1000 - time.time()
        return Invocation(
            reply.headers[REQUEST_ID], reply.body, time.monotonic() + left_s, reply.headers.get(INVOCATION_ID)
        )

    async def stream(self, invocation: Invocation, content_type: str | None = None) -> ResponseStream:
        """Begin the response of an invocation; the caller writes it, then finishes or closes it.

        Raises:
            OSError: the platform has closed the connection.
        """
        headers = {
            **_echo(invocation),
            "Lambda-Runtime-Function-Response-Mode": "streaming",
            "Trailer": "Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body",
        }
        if content_type is not None:
            headers["Content-Type"] = content_type
        path = f"{VERSION}/invocation/{invocation.request_id}/response"
        return ResponseStream(await upload(self._address, path, headers))

    async def respond(self, invocation: Invocation, body: bytes) -> Reply:
        """Send a whole response.

        Raises:
            OSError: the Runtime API is gone.
        """
        return await self._post(f"invocation/{invocation.request_id}/response", body, _echo(invocation))

    async def report_error(self, invocation: Invocation, failure: Failure) -> Reply:
        """Let an invocation fail; only possible before its response has begun.

        Raises:
            OSError: the Runtime API is gone.
        """
        return await self._report(f"invocation/{invocation.request_id}/error", failure, _echo(invocation))

    async def report_init_error(self, failure: Failure) -> Reply:
        """Say why the start failed; the process has to end then.

        Raises:
            OSError: the Runtime API is gone.
        """
        return await self._report("init/error", failure)

    async def wait_for_restore(self) -> None:
        """Have the snapshot taken, and return in a copy of this process that was restored from it.

        Raises:
            RuntimeApiError: snapshots are not possible here.
            OSError: the Runtime API is gone.
        """
        reply = await call(self._address, "GET", f"{VERSION}/restore/next", {})
        if reply.status != 200:
            raise RuntimeApiError(f"restore/next was answered with status {reply.status}")

    async def report_restore_error(self, failure: Failure) -> Reply:
        """Say why what follows a restore failed; the process has to end then.

        Raises:
            OSError: the Runtime API is gone.
        """
        return await self._report("restore/error", failure)

    async def _report(self, path: str, failure: Failure, headers: dict[str, str] | None = None) -> Reply:
        error_type = {"Lambda-Runtime-Function-Error-Type": failure.type}
        return await self._post(path, failure.encode(), {**error_type, **(headers or {})})

    async def _post(self, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        typed = {"Content-Type": "application/json", **headers}
        return await call(self._address, "POST", f"{VERSION}/{path}", typed, body)


def _echo(invocation: Invocation) -> dict[str, str]:
    return {} if invocation.invocation_id is None else {"Lambda-Runtime-Invocation-Id": invocation.invocation_id}


def _trailers(failure: Failure) -> dict[str, str]:
    return {
        "Lambda-Runtime-Function-Error-Type": failure.type,
        "Lambda-Runtime-Function-Error-Body": base64.b64encode(failure.encode()).decode(),
    }
