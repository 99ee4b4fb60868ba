"""Tool calls are found however the text arrives, and what is no call is text to the last character."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.errors import InvalidRequest
from pilotlight.text.grammar import check_grammar, json_object_grammar, regex_grammar
from pilotlight.text.tool_calls import ToolCallParser
from pilotlight.text.tool_syntax import (
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    PHI4,
    Tool,
    ToolSyntax,
    ToolUse,
    syntax_of,
)

NAMES = frozenset({"f", "get_weather"})
SYNTAXES = (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, PHI4, GENERIC)
Calls = list[tuple[str, str]]


def parse(syntax: ToolSyntax, pieces: list[str]) -> tuple[str, Calls]:
    parser = ToolCallParser(syntax, NAMES)
    text = ""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for parsed in [*map(parser.push, pieces), parser.finish()]:
        text += parsed.text
        for call in parsed.calls:
            if call.name is not None:
                assert call.id
                names[call.index] = call.name
            arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert list(names) == list(range(len(names)))
    return text, [(names[index], arguments[index]) for index in names]


CASES: list[tuple[ToolSyntax, str, str, Calls]] = [
    (
        HERMES,
        'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": "}<tool_call>\\"", "b": [1, {"c": 2}]}}\n</tool_call>',
        "Sure.",
        [("f", '{"a": "}<tool_call>\\"", "b": [1, {"c": 2}]}')],
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"arguments": {"x": 1}, "name": "g"}'
        "\n</tool_call>\n",
        "",
        [("f", "{}"), ("g", '{"x": 1}')],
    ),
    (HERMES, '<tool_call>{"name": "f"}</tool_call> after', " after", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    (HERMES, "<tool_call>\nnot json</tool_call> ok", "<tool_call>\nnot json</tool_call> ok", []),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
    (HERMES, "a < b <tool no", "a < b <tool no", []),
    (HERMES, "trailing spaces \n", "trailing spaces \n", []),
    (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (LLAMA3, '{"name": "get_weather", "parameters": {"city": "Bern"}}', "", [("get_weather", '{"city": "Bern"}')]),
    (
        LLAMA3,
        ' <|python_tag|>{"type": "function", "name": "f", "parameters": {}}; {"name": "f", "parameters": {"a": null}}',
        "",
        [("f", "{}"), ("f", '{"a": null}')],
    ),
    (LLAMA3, '{"answer": 42} and so on', '{"answer": 42} and so on', []),
    (LLAMA3, '{"name": "unknown", "parameters": {}} tail', '{"name": "unknown", "parameters": {}} tail', []),
    (LLAMA3, 'Hello {"name": "f", "parameters": {}}', 'Hello {"name": "f", "parameters": {}}', []),
    (LLAMA3, '{"name": "f", "parameters": {}}\nThere.', "\nThere.", [("f", "{}")]),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abc123def"}]', "", [("f", '{"a": 1}')]),
    (
        MISTRAL_NAMED,
        '[TOOL_CALLS]f[ARGS]{"a": [1]}[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{"b": "x"}',
        "",
        [("f", '{"a": [1]}'), ("get_weather", '{"b": "x"}')],
    ),
    (MISTRAL_NAMED, 'Hm. [TOOL_CALLS]f{"a": 1}', "Hm.", [("f", '{"a": 1}')]),
    (MISTRAL_NAMED, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    (PHI4, '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>', "", [("f", '{"a": 1}')]),
    (GENERIC, '```json\n{"name": "f", "arguments": {"a": 1}}\n```', "", [("f", '{"a": 1}')]),
    (
        GENERIC,
        '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]',
        "",
        [("f", '{"a": 1}'), ("f", '{"a": 2}')],
    ),
    (GENERIC, "[1, 2, 3]", "[1, 2, 3]", []),
    (GENERIC, "``` code", "``` code", []),
    (GENERIC, "[citation] text", "[citation] text", []),
    (GENERIC, "", "", []),
]


@pytest.mark.parametrize(("syntax", "answer", "text", "calls"), CASES, ids=lambda value: str(value)[:30])
@given(cuts=st.lists(st.integers(1, 9), max_size=60))
def test_calls_and_text_are_told_apart(
    syntax: ToolSyntax, answer: str, text: str, calls: Calls, cuts: list[int]
) -> None:
    pieces, rest = [], answer
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert parse(syntax, [*pieces, rest]) == (text, calls)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.family)
@given(text=st.text(alphabet='<tool_ca>[]{}":,;` ne\\mTOOL_CALLS1'))
def test_nothing_is_lost_of_what_is_no_call(syntax: ToolSyntax, text: str) -> None:
    shown, calls = parse(syntax, list(text))
    assert calls or shown == text


def test_arguments_are_streamed_as_they_are_written() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    (named,) = parser.push('<tool_call>\n{"name": "f", "argum').calls
    assert (named.name, named.arguments) == ("f", "")
    pieces = [parser.push(char).calls for char in 'ents": {"a": 12']
    assert "".join(call.arguments for calls in pieces for call in calls) == '{"a": 12'
    assert all(len(call.arguments) == 1 for calls in pieces for call in calls)


def test_ids_are_fresh_and_of_the_family() -> None:
    assert HERMES.new_call_id() != HERMES.new_call_id()
    short = MISTRAL.new_call_id()
    assert len(short) == 9
    assert short.isalnum()


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral-named"),
        ("{{ '<|python_tag|>' }}", "llama3"),
        ("Environment: ipython", "llama3"),
        ("<|tool_call|>", "phi4"),
        ("{{ messages }}", "generic"),
        (None, "generic"),
    ],
)
def test_the_template_tells_the_family(template: str | None, family: str) -> None:
    assert syntax_of(template).family == family


class TestForcedCalls:
    TOOLS = (
        Tool("f", None, {"properties": {"a": {"type": "integer"}}, "required": ["a"]}, "tools[0].function"),
        Tool('odd"name', None, None, "tools[1].function"),
    )

    @pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.family)
    @pytest.mark.parametrize(
        "use",
        [ToolUse(TOOLS, "required"), ToolUse(TOOLS, "required", "f"), ToolUse(TOOLS, "required", parallel=False)],
        ids=["any", "named", "single"],
    )
    def test_every_family_has_a_grammar_for_them(self, syntax: ToolSyntax, use: ToolUse) -> None:
        special_ids = {marker: 3 + number for number, marker in enumerate(syntax.markers)}
        for ids in ({}, special_ids):
            check_grammar(syntax.forced_grammar(use, ids), "tools")
            beside = syntax.grammar_beside(json_object_grammar(), use, ids)
            assert beside is not None
            check_grammar(beside, "tools")
        assert syntax.grammar_beside(regex_grammar("a"), use, {}) is None

    def test_a_schema_that_cannot_be_held_is_refused_by_its_place(self) -> None:
        tools = (*self.TOOLS, Tool("g", None, {"properties": {"a": 5}}, "tools[2].function"))
        with pytest.raises(InvalidRequest) as caught:
            check_grammar(HERMES.forced_grammar(ToolUse(tools, "required"), {}), "tools")
        assert caught.value.param is not None
        assert caught.value.param.startswith("tools")

    def test_what_the_model_is_told_of_a_tool(self) -> None:
        told = Tool("f", "Does it.", {"type": "object"}).for_template()
        assert json.loads(json.dumps(told))["function"] == {
            "name": "f",
            "description": "Does it.",
            "parameters": {"type": "object"},
        }
