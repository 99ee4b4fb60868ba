"""Which tokens of an answer are reasoning: those between the markers with which a model thinks aloud.

Source: the chat templates of Qwen3 and SmolLM3, whose ``<think>`` and ``</think>`` are one token each. A template may
open the block itself, at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pilotlight.text.tokenizer import Tokenizer

OPENS, CLOSES = "<think>", "</think>"


class ThinkMarkers(NamedTuple):
    """The ids of the two markers, and of what ends a turn, beyond which no block reaches."""

    opens_id: int
    closes_id: int
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> ThinkMarkers | None:
        """Return the markers of a model; None where they are not one token each, so that there is nothing to count."""
        opens_id, closes_id = tokenizer.id_of(OPENS), tokenizer.id_of(CLOSES)
        return None if opens_id is None or closes_id is None else cls(opens_id, closes_id, stop_ids)

    def are_left_open(self, known_ids: Sequence[int]) -> bool:
        """Say whether what comes next lies inside a block."""
        for token_id in reversed(known_ids):
            if token_id == self.opens_id:
                return True
            if token_id == self.closes_id or token_id in self.stop_ids:
                return False
        return False


class ReasoningCount:
    """Counts the tokens of one answer that lie between the markers, which don't count themselves."""

    def __init__(self, markers: ThinkMarkers, known_ids: Sequence[int]) -> None:
        """Begin behind a prompt, and behind what was emitted of the answer before."""
        self._markers = markers
        self._inside = markers.are_left_open(known_ids)
        self.num_tokens = 0

    def push(self, token_id: int) -> None:
        """Take in the next token of the answer."""
        if token_id == self._markers.opens_id:
            self._inside = True
        elif token_id == self._markers.closes_id or token_id in self._markers.stop_ids:
            self._inside = False
        else:
            self.num_tokens += self._inside
