"""An answer as it comes out of a model: choices, and the deltas that add to them. No wire format knows more than this.

A choice is one sequence's continuation of the prompt; a request may ask for several, which end independently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from pilotlight.request import FinishReason, TokenEvent, TokenLogprobs
from pilotlight.text.detokenizer import TextStream
from pilotlight.text.reasoning import ReasoningCount
from pilotlight.text.tokenizer import Tokenizer
from pilotlight.text.tool_calls import Parsed, ToolCallParser
from pilotlight.text.tool_calls import ToolCallDelta as ToolCallDelta


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's own bytes, and its log probability; a token can hold a part of a character only."""

    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What the model held of one generated token, and the tokens it held likeliest in that place."""

    token: ScoredToken
    top: tuple[ScoredToken, ...]


class Delta(msgspec.Struct, frozen=True):
    """What one token added to a choice; the text is empty while it could still be part of a stop string."""

    text: str
    token_ids: tuple[int, ...]
    choice: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(slots=True)
class ToolCall:
    """A whole tool call; ``arguments`` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Choice:
    """One choice, whole: what its deltas add up to, and why it ended."""

    index: int
    finish: FinishReason
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        for part in delta.tool_calls:
            if part.name is not None:
                self.tool_calls.append(ToolCall(part.id or "", part.name, ""))
            self.tool_calls[part.index].arguments += part.arguments


class ChoiceStream:
    """Turns one sequence's token events into deltas, up to its end or to a stop string."""

    def __init__(
        self,
        index: int,
        sequence_id: str,
        stop_ids: frozenset[int],
        text: TextStream,
        calls: ToolCallParser | None = None,
        reasoning: ReasoningCount | None = None,
    ) -> None:
        self.index = index
        self.sequence_id = sequence_id
        self.finish: FinishReason | None = None
        self.stop_detail: str | None = None
        self.token_ids: list[int] = []
        self.begun_calls: list[ToolCall] = []
        self._stop_ids = stop_ids
        self._text = text
        self._calls = calls
        self._reasoning = reasoning
        self._last_at: float | None = None

    @property
    def num_reasoning_tokens(self) -> int:
        """How many of the tokens that were generated here the model thought aloud."""
        return 0 if self._reasoning is None else self._reasoning.num_tokens

    def count(self, token_id: int) -> None:
        """Count a token that was generated here."""
        if self._reasoning is not None:
            self._reasoning.push(token_id)

    def gap_s(self, event: TokenEvent) -> float | None:
        """Return the seconds since the choice's previous token, None for its first."""
        previous, self._last_at = self._last_at, event.at
        return None if previous is None else event.at - previous

    def push(self, event: TokenEvent, tokenizer: Tokenizer) -> Delta:
        """Return what a token adds. The one that ends an answer by its id has no text, but releases what was held."""
        assert event.token_id is not None
        self.token_ids.append(event.token_id)
        stops = event.token_id in self._stop_ids
        text = "" if stops else self._text.push(event.token_id)
        if event.finish is not None:
            text += self._text.finish()
        scored = event.logprobs if not stops else None
        logprobs = () if scored is None else (_logprobs(event.token_id, scored, tokenizer),)
        if self._text.stopped_by is not None:
            self.finish, self.stop_detail = FinishReason.STOP, self._text.stopped_by
        ended = event.finish is not None or self.finish is not None
        return self._delta(text, (event.token_id,), logprobs, _parsed_end if ended else ToolCallParser.push)

    def replay(self, token_ids: Iterable[int], tokenizer: Tokenizer) -> None:
        """Take in the part of the answer that its client has already; what it held back is held back again."""
        begun = Choice(self.index, FinishReason.LENGTH)
        for token_id in token_ids:
            begun.add(self.push(TokenEvent(token_id, 0.0), tokenizer))
        self.begun_calls = begun.tool_calls

    def cut(self) -> Delta:
        """End the choice where it stands, and return what was held back."""
        return self._delta(self._text.finish(), (), (), _parsed_end)

    def _delta(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[Logprobs, ...],
        parse: Callable[[ToolCallParser, str], Parsed],
    ) -> Delta:
        if self._calls is None:
            return Delta(text, token_ids, self.index, logprobs)
        parsed = parse(self._calls, text)
        return Delta(parsed.text, token_ids, self.index, logprobs, tuple(parsed.calls))


def _parsed_end(calls: ToolCallParser, text: str) -> Parsed:
    """Return what the last piece of text turned out to be, with all that was held back."""
    parsed = calls.push(text)
    parsed.text += calls.finish().text
    return parsed


def _logprobs(token_id: int, scored: TokenLogprobs, tokenizer: Tokenizer) -> Logprobs:
    token = ScoredToken(tokenizer.token_bytes(token_id), scored.logprob)
    top = tuple(ScoredToken(tokenizer.token_bytes(other), logprob) for other, logprob in scored.top)
    return Logprobs(token, top)


SEVEREST_FIRST = (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.LENGTH)


def overall_finish(finishes: list[FinishReason]) -> FinishReason:
    """Return the one reason of an invocation with several choices: the one that cut an answer short, if any did."""
    return next((reason for reason in SEVEREST_FIRST if reason in finishes), FinishReason.STOP)
