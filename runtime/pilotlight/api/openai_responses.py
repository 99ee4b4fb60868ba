"""``/v1/responses``: the Responses API of OpenAI, to and from the one request and answer, with what it keeps."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from pilotlight.api.auth import Caller, caller_of
from pilotlight.api.endpoint import ANY, GENERATION, Endpoint
from pilotlight.api.intake import Intake, completed, json_response, request_id_of
from pilotlight.api.objects import GenerationHeaders, metered
from pilotlight.api.openai_tools import checked_use, template_calls
from pilotlight.api.response_store import ResponseStore, StoredResponse
from pilotlight.api.responses_output import Output
from pilotlight.api.responses_types import (
    CalledByName,
    DeletedResponse,
    Event,
    FunctionCall,
    FunctionCallOutput,
    IncompleteDetails,
    InputItem,
    InputMessage,
    InputText,
    InputTokensDetails,
    ItemList,
    ItemsQuery,
    JsonObject,
    JsonSchema,
    Numbered,
    OutputItem,
    OutputMessage,
    OutputTokensDetails,
    Refusal,
    ResponseCompleted,
    ResponseCreated,
    ResponseError,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponsesBody,
    ResponseUsage,
    StoredQuery,
    TextConfig,
)
from pilotlight.api.sse import event_frame
from pilotlight.api.wire import parse, parse_text
from pilotlight.errors import InvalidRequest, PilotlightError, ResponseNotFound, ResponseStoreUnavailable
from pilotlight.function import Invocation
from pilotlight.function import Request as FunctionRequest
from pilotlight.metering.record import UsageRecord
from pilotlight.request import FinishReason
from pilotlight.text.grammar import json_object_grammar, json_schema_grammar
from pilotlight.text.tool_syntax import Tool, ToolUse

STORED = (*ANY, ResponseNotFound, ResponseStoreUnavailable)
Messages = list[dict[str, Any]]


class Responses:
    """The endpoints of the Responses API."""

    def __init__(self, intake: Intake, store: ResponseStore) -> None:
        self._intake = intake
        self._store = store

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                "POST",
                "/v1/responses",
                self.create,
                "Answer an input, and keep the answer for a while",
                answer=ResponseObject,
                body=ResponsesBody,
                event=Event,
                headers=GenerationHeaders,
                refusals=GENERATION,
            ),
            Endpoint(
                "GET",
                "/v1/responses/{response_id}",
                self.retrieve,
                "Return a response that was kept",
                answer=ResponseObject,
                query=StoredQuery,
                refusals=STORED,
            ),
            Endpoint(
                "DELETE",
                "/v1/responses/{response_id}",
                self.delete,
                "Forget a response",
                answer=DeletedResponse,
                refusals=STORED,
            ),
            Endpoint(
                "GET",
                "/v1/responses/{response_id}/input_items",
                self.input_items,
                "List what a response that was kept answered",
                answer=ItemList,
                query=ItemsQuery,
                refusals=STORED,
            ),
        ]

    async def create(self, request: Request) -> Response:
        body = parse(await self._intake.read_body(request), ResponsesBody)
        owner = _owner(caller_of(request))
        before = await self._conversation(owner, body.previous_response_id)
        messages = before + _messages(body.input)
        answer = Answer(body, request_id_of(request), owner, messages, self._store)
        asked = responses_request(body, messages, request_id_of(request))
        return await self._intake.answer(request, body, asked, answer.stream, answer.whole)

    async def retrieve(self, request: Request) -> Response:
        parse_text(request.query_params, StoredQuery)
        return Response((await self._stored(request)).response, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        response_id = request.path_params["response_id"]
        if not await self._store.delete(_owner(caller_of(request)), response_id):
            raise ResponseNotFound(response_id)
        return json_response(DeletedResponse(response_id))

    async def input_items(self, request: Request) -> Response:
        query = parse_text(request.query_params, ItemsQuery)
        stored = await self._stored(request)
        return json_response(_page(msgspec.json.decode(stored.input_items, type=list[InputItem]), query))

    async def _stored(self, request: Request) -> StoredResponse:
        response_id = request.path_params["response_id"]
        stored = await self._store.get(_owner(caller_of(request)), response_id)
        if stored is None:
            raise ResponseNotFound(response_id)
        return stored

    async def _conversation(self, owner: str, response_id: str | None) -> Messages:
        if response_id is None:
            return []
        stored = await self._store.get(owner, response_id)
        if stored is None:
            message = f"previous_response_id: there is no response {response_id!r}, or it is kept no longer"
            raise InvalidRequest("previous_response_id", message, "previous_response_not_found")
        return stored.conversation


def responses_request(body: ResponsesBody, messages: Messages, request_id: str) -> FunctionRequest:
    """Return the request that a body asks for, behind ``messages``.

    Raises:
        InvalidRequest: parameters contradict each other.
    """
    wants_logprobs = "message.output_text.logprobs" in body.include
    if body.top_logprobs and not wants_logprobs:
        raise InvalidRequest("top_logprobs", "top_logprobs: requires message.output_text.logprobs in include")
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return FunctionRequest(
        id=request_id,
        messages=system + messages,
        prompt_name="input",
        tools=_tool_use(body),
        grammar=_grammar(body.text),
        grammar_param="text.format",
        num_top_logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        max_new_tokens=body.max_output_tokens,
        ignore_eos=body.ignore_eos,
        sampling=body.sampling,
        cache_key=body.prompt_cache_key,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of one body: a response, streamed or whole, kept for its owner."""

    body: ResponsesBody
    request_id: str
    owner: str
    messages: Messages
    store: ResponseStore

    async def stream(self, invocation: Invocation) -> AsyncIterator[bytes]:
        """Yield SSE frames. The last one comes when the usage record is durable and the response is kept."""
        numbers = count()

        def framed(event: Numbered) -> bytes:
            return event_frame(replace(event, sequence_number=next(numbers)))

        begun = self._begun()
        yield framed(ResponseCreated(response=begun))
        yield framed(ResponseInProgress(response=begun))
        output = Output(self.request_id)
        try:
            async for delta in invocation:
                for event in output.push(delta):
                    yield framed(event)
            record = completed(invocation)
        except PilotlightError as error:
            yield framed(ResponseFailed(response=_failed(begun, output, error)))
            return
        is_cut = _is_cut(record)
        for event in output.end("incomplete" if is_cut else "completed"):
            yield framed(event)
        response = await self._kept(_finished(begun, output.items, record))
        yield framed(ResponseIncomplete(response=response) if is_cut else ResponseCompleted(response=response))

    async def whole(self, invocation: Invocation) -> ResponseObject:
        """Return the response, once its usage record is durable and it is kept.

        Raises:
            EngineError: the model run failed.
            RequestCancelled: the invocation was cancelled.
            LedgerUnavailable: the usage record could not be written.
        """
        output = Output(self.request_id)
        begun = self._begun()
        async for delta in invocation:
            output.push(delta)
        record = completed(invocation)
        output.end("incomplete" if _is_cut(record) else "completed")
        return await self._kept(_finished(begun, output.items, record))

    def _begun(self) -> ResponseObject:
        body = self.body
        return ResponseObject(
            id=f"resp_{self.request_id}",
            created_at=int(time.time()),
            status="in_progress",
            model=body.model,
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            previous_response_id=body.previous_response_id,
            store=body.store,
            temperature=body.temperature,
            text=body.text,
            tools=body.tools,
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls,
            top_p=body.top_p,
        )

    async def _kept(self, response: ResponseObject) -> ResponseObject:
        """Keep a response if it is to be kept, and return it; ``store`` tells whether it was."""
        if not response.store:
            return response
        stored = StoredResponse(
            response=msgspec.json.encode(response),
            input_items=msgspec.json.encode(_identified(self.body.input, self.request_id)),
            conversation=self.messages + _messages(response.output),
        )
        if await self.store.put(self.owner, response.id, stored):
            return response
        return replace(response, store=False)


def _tool_use(body: ResponsesBody) -> ToolUse | None:
    tools = [
        Tool(tool.name, tool.description, tool.parameters, f"tools[{index}]") for index, tool in enumerate(body.tools)
    ]
    if isinstance(body.tool_choice, CalledByName):
        return checked_use(tools, "required", body.tool_choice.name, parallel=False)
    return checked_use(tools, body.tool_choice, None, parallel=body.parallel_tool_calls)


def _grammar(text: TextConfig) -> str | None:
    match text.format:
        case JsonObject():
            return json_object_grammar()
        case JsonSchema(schema=schema):
            return json_schema_grammar(schema, "text.format.schema")
        case _:
            return None


def _owner(caller: Caller) -> str:
    """Return whose responses a caller makes and sees: those of its tenant, or of its key where it has none."""
    return caller.tenant or caller.key_id or ""


def _messages(given: str | list[InputItem] | list[OutputItem]) -> Messages:
    """Return items as chat templates know them: calls belong to the assistant's message before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: Messages = []
    for item in given:
        if isinstance(item, InputMessage | OutputMessage):
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item)})
        elif isinstance(item, FunctionCall):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            calls = template_calls([{"id": item.call_id, "function": function}], "input")
            messages[-1].setdefault("tool_calls", []).extend(calls)
        elif isinstance(item, FunctionCallOutput):
            output = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return messages


def _text(message: InputMessage | OutputMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in message.content)


def _identified(given: str | list[InputItem], request_id: str) -> list[InputItem]:
    """Return the input as the items that a client may ask for, each with an id."""
    items = [InputMessage("user", [InputText(given)])] if isinstance(given, str) else given
    return [replace(item, id=item.id or f"item_{request_id}_{index}") for index, item in enumerate(items)]


def _page(items: list[InputItem], query: ItemsQuery) -> ItemList:
    """Return the part of the items that a query asks for."""
    ordered = items if query.order == "asc" else items[::-1]
    ids = [item.id for item in ordered]
    start = ids.index(query.after) + 1 if query.after in ids else 0
    page = ordered[start : start + query.limit]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return ItemList(page, first, last, has_more=start + len(page) < len(ordered))


def _is_cut(record: UsageRecord) -> bool:
    """Whether an answer ended before its end: a deadline is one more limit on the length."""
    return record.finish_reason is not FinishReason.STOP


def _finished(begun: ResponseObject, output: list[OutputItem], record: UsageRecord) -> ResponseObject:
    is_cut = _is_cut(record)
    return replace(
        begun,
        completed_at=int(time.time()),
        status="incomplete" if is_cut else "completed",
        incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
        output=output,
        usage=_usage(record),
    )


def _failed(begun: ResponseObject, output: Output, error: PilotlightError) -> ResponseObject:
    output.end("incomplete")
    code = "server_error" if error.status >= 500 else error.code or "invalid_prompt"
    return replace(begun, status="failed", output=output.items, error=ResponseError(code, error.message), store=False)


def _usage(record: UsageRecord) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=record.prompt_tokens,
        input_tokens_details=InputTokensDetails(record.cached_tokens),
        output_tokens=record.completion_tokens,
        output_tokens_details=OutputTokensDetails(record.reasoning_tokens),
        total_tokens=record.prompt_tokens + record.completion_tokens,
        pilotlight=metered(record),
    )
