"""The wire types of ``/v1/responses``: bodies, items, answers and stream events of OpenAI's Responses API.

Items ignore fields that they do not name: clients send answers back with everything that was in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from pilotlight.api.objects import Metered
from pilotlight.api.openai_tools import MAX_TOOLS, Name
from pilotlight.api.openai_types import TokenLogprobs
from pilotlight.api.wire import SamplingBody

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class InputText(msgspec.Struct, frozen=True, tag="input_text"):
    text: str


class OutputText(msgspec.Struct, frozen=True, tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] | None = None


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    refusal: str


class InputMessage(msgspec.Struct, frozen=True, tag="message", omit_defaults=True):
    """A message; ``type`` may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal]
    id: str | None = None
    status: ItemStatus | None = None


class FunctionCall(msgspec.Struct, frozen=True, tag="function_call"):
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: ItemStatus | None = None


class OnlyInputText(msgspec.Struct, frozen=True):
    """A text part where no other kind may stand; msgspec would not insist on the tag of the only kind there is."""

    type: Literal["input_text"]
    text: str


class FunctionCallOutput(msgspec.Struct, frozen=True, tag="function_call_output", omit_defaults=True):
    call_id: str
    output: str | list[OnlyInputText]
    id: str | None = None
    status: ItemStatus | None = None


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning", omit_defaults=True):
    """Reasoning of an earlier turn, which models do not read again."""

    summary: list[Any] = []
    id: str | None = None


InputItem = InputMessage | FunctionCall | FunctionCallOutput | Reasoning


class PlainText(msgspec.Struct, frozen=True, tag="text"):
    """Anything."""


class JsonObject(msgspec.Struct, frozen=True, tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, frozen=True, tag="json_schema", omit_defaults=True):
    """JSON that is valid under a schema, whether ``strict`` is asked for or not."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True):
    format: PlainText | JsonObject | JsonSchema | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CallableFunction(msgspec.Struct, frozen=True):
    """A function of the client's own that the model may call; no tool runs here."""

    type: Literal["function"]
    name: Name
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class CalledByName(msgspec.Struct, frozen=True):
    """The one function that has to be called."""

    type: Literal["function"]
    name: str


FunctionChoice = Literal["auto", "none", "required"] | CalledByName
CallableFunctions = Annotated[list[CallableFunction], Meta(max_length=MAX_TOOLS)]


class ResponseStreamOptions(msgspec.Struct, frozen=True):
    include_obfuscation: bool | None = None


class ResponsesBody(SamplingBody, frozen=True, kw_only=True):
    """What ``POST /v1/responses`` takes; the sampling parameters besides temperature and top_p are extensions."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        "max_tool_calls prompt_cache_options prompt_cache_retention reasoning "
        "safety_identifier service_tier user".split()
    )
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "background_options": ({},),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "prompt": (),
        "truncation": ("disabled",),
    }
    untyped: ClassVar[tuple[type[msgspec.Struct], ...]] = (InputMessage,)

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool = True
    tools: CallableFunctions = msgspec.field(default_factory=list)
    tool_choice: FunctionChoice = "auto"
    parallel_tool_calls: bool = True
    metadata: Metadata = msgspec.field(default_factory=dict)
    text: TextConfig = TextConfig()
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = msgspec.field(
        default_factory=list
    )
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream_options: ResponseStreamOptions | None = None
    prompt_cache_key: str | None = None

    @classmethod
    def normalized(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Call those items messages which have a role and no type."""
        if not isinstance(given.get("input"), list):
            return given
        return {**given, "input": [_typed(item) for item in given["input"]]}


def _typed(item: object) -> object:
    is_message = isinstance(item, dict) and "role" in item and "type" not in item
    return {**item, "type": "message"} if is_message else item  # type: ignore[dict-item]


class OutputMessage(msgspec.Struct, frozen=True, tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


OutputItem = OutputMessage | FunctionCall


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ResponseError(msgspec.Struct, frozen=True):
    code: str
    message: str


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """``pilotlight`` is an extension."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    pilotlight: Metered


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    model: str
    output: list[OutputItem]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: Metadata
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float | None
    text: TextConfig
    tool_choice: FunctionChoice
    tools: CallableFunctions
    top_p: float | None
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class DeletedResponse(msgspec.Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(msgspec.Struct, frozen=True):
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class StoredQuery(msgspec.Struct, frozen=True):
    """A response that was kept is not streamed again."""

    stream: Literal["false"] = "false"


class ItemsQuery(msgspec.Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str = ""


class Numbered(msgspec.Struct, frozen=True, kw_only=True):
    """A stream event; ``sequence_number`` counts from 0 within its stream."""

    sequence_number: int = 0


class OfResponse(Numbered, frozen=True, kw_only=True):
    response: ResponseObject


class ResponseCreated(OfResponse, frozen=True, tag="response.created"):
    pass


class ResponseInProgress(OfResponse, frozen=True, tag="response.in_progress"):
    pass


class ResponseCompleted(OfResponse, frozen=True, tag="response.completed"):
    pass


class ResponseIncomplete(OfResponse, frozen=True, tag="response.incomplete"):
    pass


class ResponseFailed(OfResponse, frozen=True, tag="response.failed"):
    pass


class OfItem(Numbered, frozen=True, kw_only=True):
    output_index: int
    item: OutputItem


class ItemAdded(OfItem, frozen=True, tag="response.output_item.added"):
    pass


class ItemDone(OfItem, frozen=True, tag="response.output_item.done"):
    pass


class OfText(Numbered, frozen=True, kw_only=True):
    item_id: str
    output_index: int
    content_index: int = 0


class PartAdded(OfText, frozen=True, tag="response.content_part.added", kw_only=True):
    part: OutputText


class TextDelta(OfText, frozen=True, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[TokenLogprobs]


class TextDone(OfText, frozen=True, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[TokenLogprobs]


class PartDone(OfText, frozen=True, tag="response.content_part.done", kw_only=True):
    part: OutputText


class ArgumentsDelta(Numbered, frozen=True, tag="response.function_call_arguments.delta", kw_only=True):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Numbered, frozen=True, tag="response.function_call_arguments.done", kw_only=True):
    item_id: str
    output_index: int
    name: str
    arguments: str


Event = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | ItemAdded
    | ItemDone
    | PartAdded
    | TextDelta
    | TextDone
    | PartDone
    | ArgumentsDelta
    | ArgumentsDone
)
