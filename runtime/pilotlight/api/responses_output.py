"""The output items of a response, built from deltas, with the events that tell of each step."""

from __future__ import annotations

from pilotlight.answer import Delta, ToolCallDelta
from pilotlight.api.openai_logprobs import chat_logprobs
from pilotlight.api.openai_types import TokenLogprobs
from pilotlight.api.responses_types import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    FunctionCall,
    ItemAdded,
    ItemDone,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    TextDelta,
    TextDone,
)


class Output:
    """At most one item is open at a time; the next one, or the end, closes it."""

    def __init__(self, request_id: str) -> None:
        self.items: list[OutputItem] = []
        self._request_id = request_id
        self._open: _Message | _Call | None = None

    def push(self, delta: Delta) -> list[Event]:
        """Return the events of one delta."""
        events: list[Event] = []
        if delta.text or delta.logprobs:
            if not isinstance(self._open, _Message):
                events += self._begin(_Message(f"msg_{self._request_id}_{len(self.items)}", self._num_begun))
            assert isinstance(self._open, _Message)
            events.append(self._open.push(delta))
        for part in delta.tool_calls:
            if part.name is not None:
                events += self._begin(_Call(f"fc_{self._request_id}_{part.index}", self._num_begun, part))
            assert isinstance(self._open, _Call)
            if part.arguments:
                events.append(self._open.push(part))
        return events

    def end(self, status: ItemStatus) -> list[Event]:
        """Return the events of the end; an answer of nothing is still one message."""
        events: list[Event] = []
        if self._open is None:
            events += self._begin(_Message(f"msg_{self._request_id}_0", 0))
        return events + self._close(status)

    @property
    def _num_begun(self) -> int:
        return len(self.items) + (self._open is not None)

    def _begin(self, item: _Message | _Call) -> list[Event]:
        events = self._close("completed")
        self._open = item
        return events + item.begin()

    def _close(self, status: ItemStatus) -> list[Event]:
        if self._open is None:
            return []
        item = self._open.item(status)
        events: list[Event] = [*self._open.end(), ItemDone(output_index=len(self.items), item=item)]
        self.items.append(item)
        self._open = None
        return events


class _Message:
    """A message with its one part, the text."""

    def __init__(self, item_id: str, index: int) -> None:
        self._id = item_id
        self._index = index
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    def begin(self) -> list[Event]:
        message = OutputMessage(self._id, "in_progress", [])
        return [
            ItemAdded(output_index=self._index, item=message),
            PartAdded(item_id=self._id, output_index=self._index, part=OutputText("")),
        ]

    def push(self, delta: Delta) -> Event:
        logprobs = chat_logprobs(delta.logprobs)
        self._texts.append(delta.text)
        self._logprobs += logprobs
        return TextDelta(item_id=self._id, output_index=self._index, delta=delta.text, logprobs=logprobs)

    def end(self) -> list[Event]:
        part = self._part()
        return [
            TextDone(item_id=self._id, output_index=self._index, text=part.text, logprobs=self._logprobs),
            PartDone(item_id=self._id, output_index=self._index, part=part),
        ]

    def item(self, status: ItemStatus) -> OutputItem:
        return OutputMessage(self._id, status, [self._part()])

    def _part(self) -> OutputText:
        return OutputText("".join(self._texts), logprobs=self._logprobs)


class _Call:
    """A call of one of the client's functions."""

    def __init__(self, item_id: str, index: int, first: ToolCallDelta) -> None:
        self._id = item_id
        self._index = index
        self._call_id = first.id or item_id
        self._name = first.name or ""
        self._arguments: list[str] = []

    def begin(self) -> list[Event]:
        return [ItemAdded(output_index=self._index, item=FunctionCall(self._call_id, self._name, "", self._id))]

    def push(self, part: ToolCallDelta) -> Event:
        self._arguments.append(part.arguments)
        return ArgumentsDelta(item_id=self._id, output_index=self._index, delta=part.arguments)

    def end(self) -> list[Event]:
        arguments = "".join(self._arguments)
        return [ArgumentsDone(item_id=self._id, output_index=self._index, name=self._name, arguments=arguments)]

    def item(self, status: ItemStatus) -> OutputItem:
        return FunctionCall(self._call_id, self._name, "".join(self._arguments), self._id, status)
