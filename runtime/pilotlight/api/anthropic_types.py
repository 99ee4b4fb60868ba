"""The wire types of ``/v1/messages``: bodies, answers and stream events of the Anthropic API.

Blocks ignore fields they do not name (``cache_control``, ``citations``): none of them changes an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from pilotlight.api.objects import GenerationHeaders, Metered
from pilotlight.api.openai_tools import MAX_TOOLS, Name
from pilotlight.api.wire import Body, ResumableBody

MAX_STOP_SEQUENCES = 16
Version = Literal["2023-06-01", "2026-10-21"]
"""What the two differ in does not concern what is served here, except that sampling parameters stay possible."""

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "request_too_large",
    "rate_limit_error",
    "api_error",
    "timeout_error",
    "overloaded_error",
]


class TextBlock(msgspec.Struct, frozen=True, tag="text"):
    text: str


class OnlyTextBlock(msgspec.Struct, frozen=True):
    """A text block where no other kind may stand; msgspec would not insist on the tag of the only kind there is."""

    type: Literal["text"]
    text: str


class ToolUseBlock(msgspec.Struct, frozen=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[OnlyTextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(msgspec.Struct, frozen=True, tag="thinking"):
    """Thinking of an earlier turn, which models do not read again."""

    thinking: str


class RedactedThinkingBlock(msgspec.Struct, frozen=True, tag="redacted_thinking"):
    data: str


InputBlock = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock
Text = str | list[OnlyTextBlock]


class Turn(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class ToolDefinition(msgspec.Struct, frozen=True):
    """A tool of the client's own; none runs here."""

    name: Name
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None


class AutoChoice(msgspec.Struct, frozen=True, tag="auto"):
    disable_parallel_tool_use: bool = False


class AnyChoice(msgspec.Struct, frozen=True, tag="any"):
    disable_parallel_tool_use: bool = False


class ToolNamed(msgspec.Struct, frozen=True, tag="tool"):
    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(msgspec.Struct, frozen=True, tag="none"):
    pass


Choice = AutoChoice | AnyChoice | ToolNamed | NoChoice
ToolDefinitions = Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)]


class SchemaFormat(msgspec.Struct, frozen=True):
    """JSON that is valid under a schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    """``effort`` has no effect."""

    format: SchemaFormat | None = None
    effort: str | None = None


IGNORED = frozenset(
    "cache_control container diagnostics inference_geo metadata service_tier speed user_profile_id workspace_id".split()
)
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mcp_servers": ([],),
    "thinking": ({"type": "disabled"},),
}


class Headers(GenerationHeaders, frozen=True, rename="kebab"):
    anthropic_version: Version = "2026-10-21"


class CountHeaders(msgspec.Struct, frozen=True, rename="kebab"):
    anthropic_version: Version = "2026-10-21"


class MessagesBody(ResumableBody, frozen=True, kw_only=True):
    """What ``POST /v1/messages`` takes; the sampling parameters after ``top_k`` are extensions."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)]
    system: Text | None = None
    tools: ToolDefinitions | None = None
    tool_choice: Choice | None = None
    output_config: OutputConfig | None = None
    stop_sequences: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=MAX_STOP_SEQUENCES)] | None = (
        None
    )
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None

    @property
    def resumable(self) -> bool:
        return not self.tools  # a block cannot be begun in one message and ended in another


class CountTokensBody(Body, frozen=True, kw_only=True):
    """What ``POST /v1/messages/count_tokens`` takes."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: Text | None = None
    tools: ToolDefinitions | None = None
    tool_choice: Choice | None = None
    output_config: OutputConfig | None = None


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


class MessageUsage(msgspec.Struct, frozen=True, omit_defaults=True):
    """``input_tokens`` are those that were not read from a cache; ``pilotlight`` is an extension."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: Literal[0]
    pilotlight: Metered | None = None


class MessageObject(msgspec.Struct, frozen=True):
    id: str
    model: str
    content: list[TextBlock | ToolUseBlock]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class MessageStart(msgspec.Struct, frozen=True, tag="message_start"):
    message: MessageObject


class BlockStart(msgspec.Struct, frozen=True, tag="content_block_start"):
    index: int
    content_block: TextBlock | ToolUseBlock


class TextBlockDelta(msgspec.Struct, frozen=True, tag="text_delta"):
    text: str


class InputJsonDelta(msgspec.Struct, frozen=True, tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag="content_block_delta"):
    index: int
    delta: TextBlockDelta | InputJsonDelta


class BlockStop(msgspec.Struct, frozen=True, tag="content_block_stop"):
    index: int


class StopDelta(msgspec.Struct, frozen=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag="message_delta"):
    """The end of a message; its usage is that of the whole message."""

    delta: StopDelta
    usage: MessageUsage


class MessageStop(msgspec.Struct, frozen=True, tag="message_stop"):
    pass


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class MessageError(msgspec.Struct, frozen=True):
    type: ErrorType
    message: str


class ErrorEvent(msgspec.Struct, frozen=True, tag="error"):
    """What a refused request gets, and what ends a broken stream."""

    error: MessageError
    request_id: str | None = None


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | ErrorEvent
