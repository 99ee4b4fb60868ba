"""Token ids to text, one token at a time: never a broken character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pilotlight.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 64


class Detokenizer:
    """Turns one answer's token ids into text as they come.

    A decoder needs the neighbours of a token (a leading space, the other bytes of a character), so each step decodes
    a window: the tokens of the last piece of text, as context, and those which came after. A window that ends in an
    incomplete character is held until it is complete, or for ``MAX_HELD_TOKENS``, because a model can fail by
    repeating one broken byte.

    ``tokenizers.decoders.DecodeStream`` has the same window, but cannot hand out what it holds when an answer ends,
    and raises where invalid bytes follow a character that was made of byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str] | None = None) -> None:
        """``shown`` are special tokens that have a text here, which they don't have otherwise."""
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._context_ids: list[int] = []
        self._context = ""
        self._held_ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, or the empty string."""
        if token_id in self._shown:
            return self._show(self._shown[token_id])
        if token_id in self._tokenizer.special_ids:
            return ""
        self._held_ids.append(token_id)
        text = self._held_text()
        if text.endswith(REPLACEMENT) and len(self._held_ids) < MAX_HELD_TOKENS:
            return ""
        self._context_ids, self._held_ids = self._held_ids, []
        self._context = self._tokenizer.text_of(tuple(self._context_ids))
        return text

    def _show(self, special: str) -> str:
        text = self.finish() + special
        self._context_ids, self._context = [], ""
        return text

    def finish(self) -> str:
        """Return what is held, without the incomplete character at its end.

        A U+FFFD which the model itself wrote there looks the same, and is dropped too.
        """
        text = self._held_text().rstrip(REPLACEMENT)
        self._held_ids = []
        return text

    def _held_text(self) -> str:
        window = self._tokenizer.decode([*self._context_ids, *self._held_ids])
        if window.startswith(self._context):
            return window[len(self._context) :]
        # A byte-fallback decoder takes back a whole run of byte tokens when the run turns out to be invalid.
        return self._tokenizer.decode(self._held_ids)


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may still become one.

    The match that is complete first wins, and of two that end together the longer one, so the result doesn't depend on
    how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return the text that may be shown now; nothing once a stop string was matched."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        _end, start, self.matched = min(self._matches(text), default=(0, 0, None))
        if self.matched is not None:
            self._held = ""
            return text[:start]
        shown = len(text) - self._num_held_chars(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return what was held back, now that no more text will come."""
        held, self._held = self._held, ""
        return held

    def _matches(self, text: str) -> list[tuple[int, int, str]]:
        starts = [(text.find(stop), stop) for stop in self._stops]
        return [(start + len(stop), start, stop) for start, stop in starts if start >= 0]

    def _num_held_chars(self, text: str) -> int:
        return max((_overlap_chars(text, stop) for stop in self._stops), default=0)


class TextStream:
    """The text of one answer, as far as it may be shown: detokenized, and cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), shown: Mapping[int, str] | None = None) -> None:
        self._detokenizer = Detokenizer(tokenizer, shown)
        self._stops = StopStrings(stops)

    @property
    def stopped_by(self) -> str | None:
        """The stop string which ended the text."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """Return the text that may be shown after this token; nothing once a stop string was matched."""
        return self._stops.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return the rest of the text. Call it once, after the last token."""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()


def _overlap_chars(text: str, stop: str) -> int:
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
