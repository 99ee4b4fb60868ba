"""Tool calls in the text of an answer, read as it comes: names as soon as they stand, arguments as they are written.

What surrounds a call differs from family to family; a call itself is a JSON object with a name and with arguments
nearly everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from pilotlight.text.tool_syntax import ToolSyntax

NAME = "name"
ARGUMENTS = ("arguments", "parameters")
KEYS = (NAME, *ARGUMENTS, "id", "type")
SPACE = " \t\r\n"
BETWEEN = SPACE + "[],;`"
"""What may stand between two calls: they come as a list, one behind the other, or with semicolons."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of an answer's ``index``-th tool call: the first has ``id`` and ``name``, the arguments' text adds up."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Parsed:
    """What a piece of text turned out to be."""

    text: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class NotACall(Exception):
    """What was read cannot be a call."""


class JsonValue:
    """Finds the end of one JSON value. It trusts what comes to be JSON, and only counts brackets and quotes."""

    def __init__(self, first: str) -> None:
        self._closing = 0
        self._in_string = False
        self._escaped = False
        self.is_string = first == '"'
        self._is_bare = first not in '"{['
        self.complete = False
        self._count(first)

    def push(self, char: str) -> bool:
        """Return whether ``char`` belongs to the value."""
        if self._is_bare and char in SPACE + ",]}":
            self.complete = True
            return False
        self._count(char)
        return True

    def _count(self, char: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._closing += 1
        elif char in "}]":
            self._closing -= 1
        self.complete = not self._is_bare and self._closing == 0 and not self._in_string


class CallReader:
    """Reads one ``{"name": …, "arguments": …}``, in either order, character by character."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.complete = False
        self.has_arguments = False
        self._arguments = ""
        self._read: Callable[[str], None] = self._open
        self._key = ""
        self._text = ""
        self._value: JsonValue | None = None

    def push(self, char: str) -> None:
        """Read one character.

        Raises:
            NotACall: no call begins like this.
        """
        self._read(char)

    def take_arguments(self) -> str:
        """Return what came of the arguments since the last time."""
        arguments, self._arguments = self._arguments, ""
        return arguments

    def _open(self, char: str) -> None:
        self._expect(char, {"{": self._next_key})

    def _next_key(self, char: str) -> None:
        if char == "}":
            self._close()
        elif char == '"':
            self._value, self._text, self._read = JsonValue(char), char, self._in_key
        elif char not in SPACE:
            raise NotACall

    def _in_key(self, char: str) -> None:
        assert self._value is not None
        self._value.push(char)
        self._text += char
        if self._value.complete:
            self._key = _string(self._text)
            if self._key not in KEYS:
                raise NotACall
            self._read = self._colon

    def _colon(self, char: str) -> None:
        self._expect(char, {":": self._begin_value})

    def _begin_value(self, char: str) -> None:
        if char in SPACE:
            return
        self._value, self._text, self._read = JsonValue(char), char, self._in_value
        self._note(char)

    def _in_value(self, char: str) -> None:
        assert self._value is not None
        if self._value.push(char):
            self._text += char
            self._note(char)
        else:
            self._read = self._after_value
            self._after_value(char)

    def _note(self, char: str) -> None:
        assert self._value is not None
        quoted = self._value.is_string
        self.has_arguments |= self._key in ARGUMENTS
        if self._key in ARGUMENTS and not quoted:
            self._arguments += char
        if self._value.complete:
            if self._key == NAME:
                self.name = _string(self._text)
            elif self._key in ARGUMENTS and quoted:
                self._arguments += _string(self._text)  # some models write JSON in JSON
            self._read = self._after_value

    def _after_value(self, char: str) -> None:
        if char == "}":
            self._close()
        else:
            self._expect(char, {",": self._next_key})

    def _close(self) -> None:
        if self.name is None:
            raise NotACall
        self.complete = True

    def _expect(self, char: str, after: dict[str, Callable[[str], None]]) -> None:
        if char in after:
            self._read = after[char]
        elif char not in SPACE:
            raise NotACall


class NamedCallReader:
    """Reads ``name[ARGS]{…}``, ``name[CALL_ID]id[ARGS]{…}`` or ``name{…}``."""

    has_arguments = True

    def __init__(self) -> None:
        self.name: str | None = None
        self.complete = False
        self._head = ""
        self._value: JsonValue | None = None
        self._arguments = ""

    def push(self, char: str) -> None:
        if self._value is not None:
            self._value.push(char)
        elif char == "{":
            self.name = self._head.partition("[")[0].strip()
            self._value = JsonValue(char)
            if not self.name:
                raise NotACall
        else:
            self._head += char
            return
        self._arguments += char
        self.complete = self._value.complete

    def take_arguments(self) -> str:
        """Return what came of the arguments since the last time."""
        arguments, self._arguments = self._arguments, ""
        return arguments


class ToolCallParser:
    """Splits an answer into text and tool calls.

    What turns out to be no call is given out as text, as it came. A call of a tool that the request does not have is
    believed behind a marker only, since any JSON object may have a name.
    """

    def __init__(self, syntax: ToolSyntax, names: frozenset[str]) -> None:
        self._syntax = syntax
        self._names = names
        self._num_calls = 0
        self._held = ""
        self._tail = ""
        self._reader: CallReader | NamedCallReader | None = None
        self._announced = False
        self._read = self._in_text if syntax.begin else self._at_start

    def push(self, text: str) -> Parsed:
        """Return what this text adds."""
        parsed = Parsed()
        for char in text:
            self._read(char, parsed)
        return parsed

    def finish(self) -> Parsed:
        """Return what was held back as text, now that nothing more will come. A call that began is never text."""
        nothing = self._announced or (self._num_calls and not self._held.strip(BETWEEN))
        held, self._held = self._held, ""
        return Parsed("" if nothing else held)

    def _in_text(self, char: str, parsed: Parsed) -> None:
        """Pass text on, but hold back spaces and what may become the marker."""
        begin = self._syntax.begin
        self._held += char
        if self._held.endswith(begin):
            parsed.text += self._held[: -len(begin)].rstrip()
            self._held, self._tail, self._read = begin, "", self._between
        else:
            shown = self._held[: len(self._held) - _overlap_chars(self._held, begin)].rstrip()
            parsed.text += shown
            self._held = self._held[len(shown) :]

    def _at_start(self, char: str, parsed: Parsed) -> None:
        """Look whether an answer without markers begins like a call."""
        self._held += char
        begun = self._held.lstrip()
        if any(noise.startswith(begun) for noise in self._syntax.noise):
            return
        for noise in self._syntax.noise:
            begun = begun.removeprefix(noise).lstrip()
        if begun in ("{", "["):
            self._tail, self._read = "", self._between
            self._go_between(begun, parsed)
        elif begun:
            self._give_up(parsed)

    def _between(self, char: str, parsed: Parsed) -> None:
        self._held += char
        self._go_between(char, parsed)

    def _go_between(self, char: str, parsed: Parsed) -> None:
        """Read what stands before, between and behind calls, up to the next call or the end marker."""
        begin, end = self._syntax.begin, self._syntax.end
        self._tail += char
        rest, marker = self._tail.lstrip(BETWEEN), self._tail.lstrip(BETWEEN.replace("[", ""))
        if end and rest == end:
            self._held, self._read = "", self._in_text
        elif begin and marker == begin:
            self._tail = ""
        elif rest and not end.startswith(rest) and not (marker and begin.startswith(marker)):
            by_name = self._syntax.names_first and not rest.startswith("{")
            self._reader, self._announced = NamedCallReader() if by_name else CallReader(), False
            self._read = self._in_call
            for each in rest:
                self._go_on(each, parsed)

    def _in_call(self, char: str, parsed: Parsed) -> None:
        self._held += char
        self._go_on(char, parsed)

    def _go_on(self, char: str, parsed: Parsed) -> None:
        """Read one character of a call."""
        if (reader := self._reader) is None:
            return
        try:
            reader.push(char)
            self._report(reader, parsed)
        except NotACall:
            self._give_up(parsed)

    def _report(self, reader: CallReader | NamedCallReader, parsed: Parsed) -> None:
        if reader.name is not None and not self._announced:
            if not self._syntax.begin and reader.name not in self._names:
                raise NotACall
            parsed.calls.append(ToolCallDelta(self._num_calls, "", self._syntax.new_call_id(), reader.name))
            self._announced = True
            self._num_calls += 1
        if self._announced and (arguments := reader.take_arguments()):
            parsed.calls.append(ToolCallDelta(self._num_calls - 1, arguments))
        if reader.complete:
            if not reader.has_arguments:
                parsed.calls.append(ToolCallDelta(self._num_calls - 1, "{}"))
            self._reader, self._announced = None, False
            self._held, self._tail, self._read = "", "", self._between

    def _give_up(self, parsed: Parsed) -> None:
        """Take what was held for text; in an answer without markers, so is all that follows."""
        if not self._announced:
            parsed.text += self._held
        self._held, self._reader, self._announced = "", None, False
        self._read = self._in_text if self._syntax.begin else self._pass_on

    def _pass_on(self, char: str, parsed: Parsed) -> None:
        parsed.text += char


def _overlap_chars(text: str, marker: str) -> int:
    longest = min(len(marker) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise NotACall from error
    if not isinstance(value, str):
        raise NotACall
    return value
