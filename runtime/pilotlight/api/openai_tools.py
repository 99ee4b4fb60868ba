"""``tools`` and ``tool_choice``, and the tool calls of earlier answers, which come back as messages."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pilotlight.errors import InvalidRequest
from pilotlight.text.tool_syntax import Tool, ToolUse

MAX_TOOLS = 128
Choice = Literal["auto", "none", "required"]
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(msgspec.Struct, frozen=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, tag="function"):
    """A function that the model may call."""

    function: FunctionDefinition


class NamedFunction(msgspec.Struct, frozen=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, tag="function"):
    """The one function that has to be called."""

    function: NamedFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool
Tools = Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)]


def tool_use(tools: list[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """Return what a request says of tools; None where it has none.

    Raises:
        InvalidRequest: two tools have the same name, or the choice names none of them.
    """
    known = [_tool(tool.function, f"tools[{index}].function") for index, tool in enumerate(tools or ())]
    if isinstance(choice, NamedTool):
        return checked_use(known, "required", choice.function.name, parallel=False)
    return checked_use(known, choice or "auto", None, parallel=parallel is not False)


def checked_use(tools: list[Tool], choice: Choice, named: str | None, *, parallel: bool) -> ToolUse | None:
    """Return what a request says of tools, in whatever API's words it said it; None where it has none.

    Raises:
        InvalidRequest: two tools have the same name, or the choice names none of them.
    """
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        if tool.name in names[:index]:
            raise InvalidRequest(f"{tool.param}.name", f"{tool.param}.name: {tool.name!r} comes twice")
    if named is not None and tools and named not in names:
        raise InvalidRequest("tool_choice", f"tool_choice: there is no tool {named!r}")
    if tools:
        return ToolUse(tools, choice, named, parallel=parallel)
    if choice == "required":
        raise InvalidRequest("tool_choice", "tool_choice: requires tools")
    return None


def template_calls(calls: list[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    """Return an assistant message's tool calls as chat templates expect them: with arguments as an object.

    Raises:
        InvalidRequest: a call has no function name.
    """
    return [_template_call(call, f"{param}[{index}]") for index, call in enumerate(calls)]


def _template_call(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{param}.function", f"{param}.function: expected a function with a name")
    return {**call, "type": "function", "function": {**function, "arguments": _object(function.get("arguments"))}}


def _object(arguments: object) -> object:
    """Return arguments as an object; text that is none, such as a call that was cut off, stays text."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _tool(function: FunctionDefinition, param: str) -> Tool:
    return Tool(function.name, function.description, function.parameters, param)
