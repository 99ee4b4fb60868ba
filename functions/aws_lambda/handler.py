"""From the Runtime API to the application and back: one loop for each invocation that may run at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from answer import Answer, failure_of, open_answer
from event import Call, Reading, UnsupportedEvent, parse_event
from logs import aws_request_id
from pilotlight.api.errors import error_response
from pilotlight.errors import EngineError, PilotlightError
from pilotlight.function import Function
from runtime_client import Invocation, RuntimeClient

logger = logging.getLogger("pilotlight.aws_lambda")

DEADLINE_MARGIN_S = 1.0
"""How long before the platform's deadline a generation ends; then come its last step, record and frames."""

Message = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


class Handler:
    """Answers invocations with an ASGI application over one function."""

    def __init__(self, client: RuntimeClient, app: App, function: Function, url_reading: Reading) -> None:
        self._client = client
        self._app = app
        self._function = function
        self._url_reading = url_reading

    async def poll(self) -> None:
        """Take invocations and answer them, one at a time, until the task is cancelled.

        Raises:
            RuntimeApiError: the Runtime API has no invocations for us.
            OSError: the Runtime API is gone.
        """
        while True:
            await self.handle(await self._client.next_invocation())

    async def handle(self, invocation: Invocation) -> None:
        """Answer one invocation. It ends after its record is written, because the platform freezes us then."""
        aws_request_id.set(invocation.request_id)
        try:
            call = parse_event(invocation.event, invocation.request_id, self._url_reading)
        except UnsupportedEvent as refusal:
            await self._refuse(invocation, refusal)
            return
        answer = open_answer(self._client, invocation, call.reading)
        await answer.end(await self._run(call, invocation, answer))

    async def _refuse(self, invocation: Invocation, refusal: UnsupportedEvent) -> None:
        """Let the invocation fail, lest a queue thinks that its message was dealt with; or say so over HTTP."""
        logger.warning("%s", refusal.message)
        if refusal.reading is None:
            await self._client.report_error(invocation, failure_of(refusal))
            return
        answer = open_answer(self._client, invocation, refusal.reading)
        scope = {"type": "http", "path": ""}
        await error_response(refusal, scope)(scope, _receiver(b"", answer), answer.send)
        await answer.end(None)

    async def _run(self, call: Call, invocation: Invocation, answer: Answer) -> PilotlightError | None:
        """Have the application answer, and return what went wrong after its answer had begun."""
        state = call.scope["state"]
        state["deadline_at"] = invocation.deadline_at - DEADLINE_MARGIN_S
        try:
            await self._app(call.scope, _receiver(call.body, answer), answer.send)
        except Exception as error:
            logger.error("the application failed", exc_info=error)
            return EngineError("an internal error occurred")
        finally:
            await self._function.settled(state.get("request_id", ""))
        failure: PilotlightError | None = state.get("failure")
        return failure


def _receiver(body: bytes, answer: Answer) -> Callable[[], Awaitable[Message]]:
    """Return ASGI's ``receive``: the body, then a disconnect when the platform has given up."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await answer.gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def poll_all(handler: Handler, num_pollers: int) -> None:
    """Run so many loops side by side; when one fails, all end.

    Raises:
        ExceptionGroup: of what ``Handler.poll`` raises.
    """
    async with asyncio.TaskGroup() as pollers:
        for number in range(num_pollers):
            pollers.create_task(handler.poll(), name=f"poller {number}")
