"""How a family of models writes tool calls: what the parser looks for, and what a forced call has to look like.

The chat template says which family it is, since a model was trained on what its template writes.

Source: the chat templates of Qwen 2.5 and 3, SmolLM3, Llama 3.1 to 3.3, Mistral 7B v0.3 to Small 3.2 and Phi-4-mini.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pilotlight.text.grammar import compiled_schema, lark_grammar

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is a JSON Schema, ``param`` where the client gave it."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    param: str = "tools"

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        function["parameters"] = self.parameters if self.parameters is not None else NO_ARGUMENTS
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request. ``required`` makes the answer a call; of the tool ``named``, where there is one."""

    tools: Sequence[Tool]
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    parallel: bool = True

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the model is told of."""
        return () if self.choice == "none" else self.tools

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """One family's way. ``begin`` and ``end`` enclose calls; without them an answer is calls or text from its start.

    ``opening``, ``separator`` and ``closing`` are what forced calls are written with; without a separator there is only
    one. ``noise`` may stand before a call that has no marker.
    """

    family: str
    begin: str = ""
    end: str = ""
    opening: str = ""
    separator: str | None = None
    closing: str = ""
    arguments_key: str = "arguments"
    names_first: bool = False
    noise: tuple[str, ...] = ()
    short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that the parser has to see even where they are special tokens."""
        return tuple(marker for marker in (self.begin, self.end, *self.noise, "[ARGS]", "[CALL_ID]") if marker)

    def new_call_id(self) -> str:
        """Return a fresh id; Mistral's templates refuse all but nine letters and digits."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def forced_grammar(self, use: ToolUse, special_ids: Mapping[str, int]) -> str:
        """Return the grammar of answers that are calls. ``special_ids`` are the special tokens among the markers.

        Raises:
            InvalidRequest: a tool's schema uses what cannot be guaranteed.
        """
        return lark_grammar("\n".join(("start: calls", *self._rules(use, special_ids))))

    def grammar_beside(self, answer: str, use: ToolUse, special_ids: Mapping[str, int]) -> str | None:
        """Return the grammar of answers that are calls, or in the grammar ``answer``; None where they don't mix.

        Raises:
            InvalidRequest: a tool's schema uses what cannot be guaranteed.
        """
        (held,) = json.loads(answer)["grammars"]
        if "json_schema" not in held:
            return None
        schema = f"answer: %json {json.dumps(held['json_schema'])}"
        return lark_grammar("\n".join(("start: answer | calls", schema, *self._rules(use, special_ids))))

    def _rules(self, use: ToolUse, special_ids: Mapping[str, int]) -> list[str]:
        tools = [tool for tool in use.tools if use.named in (None, tool.name)]
        many = use.parallel and use.named is None and self.separator is not None
        more = [f"({_lark(self.separator or '', special_ids)} call)*"] if many else []
        calls = [_lark(self.opening, special_ids), "call", *more, _lark(self.closing, special_ids)]
        rules = [f"calls: {' '.join(part for part in calls if part)}"]
        rules.append(f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}")
        for number, tool in enumerate(tools):
            before, after = self._around(tool.name)
            after = _lark(after, special_ids)
            rules.append(f"call_{number}: {_lark(before, special_ids)} arguments_{number} {after}".rstrip())
            rules.append(f"arguments_{number}: %json {json.dumps(_arguments_schema(tool))}")
        return rules

    def _around(self, name: str) -> tuple[str, str]:
        if self.names_first:
            return f"{name}[ARGS]", ""
        return f'{{"name": {json.dumps(name)}, "{self.arguments_key}": ', "}"


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    schema = NO_ARGUMENTS if tool.parameters is None else {"type": "object", **tool.parameters}
    return compiled_schema(schema, f"{tool.param}.parameters")


def _lark(text: str, special_ids: Mapping[str, int]) -> str:
    """Return text as Lark writes it, and special tokens in it by their ids."""
    if not text:
        return ""
    pattern = "|".join(map(re.escape, special_ids)) or r"(?!)"
    parts = re.split(f"({pattern})", text)
    return " ".join(
        f"<[{special_ids[part]}]>" if part in special_ids else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )


HERMES = ToolSyntax(
    "hermes",
    begin="<tool_call>",
    end="</tool_call>",
    opening="<tool_call>\n",
    separator="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
)
LLAMA3 = ToolSyntax("llama3", arguments_key="parameters", noise=("<|python_tag|>",))
MISTRAL = ToolSyntax(
    "mistral",
    begin="[TOOL_CALLS]",
    opening="[TOOL_CALLS] [",
    separator=", ",
    closing="]",
    short_ids=True,
)
MISTRAL_NAMED = ToolSyntax(
    "mistral-named",
    begin="[TOOL_CALLS]",
    opening="[TOOL_CALLS]",
    separator="[TOOL_CALLS]",
    names_first=True,
    short_ids=True,
)
PHI4 = ToolSyntax(
    "phi4",
    begin="<|tool_call|>",
    end="<|/tool_call|>",
    opening="<|tool_call|>[",
    separator=", ",
    closing="]<|/tool_call|>",
)
GENERIC = ToolSyntax("generic", separator="\n", noise=("```json",))


def syntax_of(template: str | None) -> ToolSyntax:
    """Return the family whose way of calling tools a chat template shows."""
    source = template or ""
    if "<|tool_call|>" in source:
        return PHI4
    if "<tool_call>" in source:
        return HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL_NAMED if "[ARGS]" in source else MISTRAL
    if "<|python_tag|>" in source or "ipython" in source:
        return LLAMA3
    return GENERIC


def described(tools: Sequence[Mapping[str, object]]) -> str:
    """Return what a model is told of its tools where its chat template has no words for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"You can call these functions:\n{listed}\n"
        'To call one, answer with nothing but {"name": "…", "arguments": {…}}, one call a line.'
    )
