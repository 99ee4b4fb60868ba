"""How an answer may go on where it repeats what was there before, and whether finding out pays. Pure.

A sequence whose last tokens have occurred earlier, in its prompt or its answer, may continue as it did there. Every
token that is generated scores this guess, whether or not anybody acted on it, so watching costs no run of the model.
When enough guesses come true, the tokens that are guessed next are run together with the next one, and kept as far as
the sampler draws them.

Source: Leviathan et al. 2023 (speculative decoding), with drafts as in Saxena 2023 (prompt lookup).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

Draft = tuple[int, ...]

DRAFT_TOKENS = (1, 3, 7, 15)
"""Few lengths, so that each one's time is known soon. A run has one token more than its draft."""
MAX_DRAFTING_ROWS = 4
"""Larger batches use the weights that they read too well already."""
MIN_GAIN = 1.1
"""A draft must promise so many times the tokens per second that a decode step gives."""

MATCH_TOKENS = 3
"""So many tokens have to occur again."""
NUM_DOUBTS = 4.0
"""The guesses, half of one of them right, that a sequence is taken to have made before its first."""
MEMORY = 0.95
"""What an older guess counts for beside the next newer one."""


class PromptLookup:
    """One sequence's tokens, the place from which it seems to be copying, and how its guesses did so far."""

    def __init__(self, tokens: Items[int]) -> None:
        self._tokens = list(tokens)
        self._ends = {match: end for end, match in enumerate(_matches(self._tokens[:-1]), MATCH_TOKENS)}
        self._hits, self._trials = 0.5, NUM_DOUBTS
        self._place = self._find()

    @property
    def acceptance(self) -> float:
        """How likely the next guess comes true."""
        return self._hits / self._trials

    @property
    def num_guessed(self) -> int:
        """How many tokens there are to guess."""
        return len(self._tokens) - self._place if self._place else 0

    def draft(self, num_tokens: int) -> Draft:
        """Return the next tokens as they are guessed."""
        return tuple(self._tokens[self._place : self._place + num_tokens]) if self._place else ()

    def push(self, token_id: int) -> None:
        """Go on behind a token that was generated."""
        hit = False
        if self._place:
            hit = self._tokens[self._place] == token_id
            self._hits, self._trials = MEMORY * self._hits + hit, MEMORY * self._trials + 1
        if len(self._tokens) >= MATCH_TOKENS:
            self._ends[tuple(self._tokens[-MATCH_TOKENS:])] = len(self._tokens)
        self._tokens.append(token_id)
        self._place = self._place + 1 if hit else self._find()

    def _find(self) -> int:
        """Return where the latest earlier occurrence of the last tokens ends, 0 where there is none."""
        return self._ends.get(tuple(self._tokens[-MATCH_TOKENS:]), 0)


def _matches(tokens: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield all runs of tokens that can be found again, in their order."""
    return zip(*(tokens[first:] for first in range(MATCH_TOKENS)), strict=False)


def drafts_that_pay(
    lookups: Items[PromptLookup], rooms: Items[int], step_s: float, verify_s: Callable[[int], float]
) -> tuple[Draft, ...]:
    """Return a draft for each sequence of a step if all of them gain by it, otherwise none.

    Drafts are verified one sequence after the other, in place of one step for all, which takes ``step_s``. A draft has
    at most ``rooms`` tokens; ``verify_s`` says how long a run of so many tokens takes.
    """
    lengths = [_best_length(lookup, room, verify_s) for lookup, room in zip(lookups, rooms, strict=True)]
    if 0 in lengths:
        return ()
    drafts_s = sum(verify_s(1 + length) for length in lengths)
    for lookup, length in zip(lookups, lengths, strict=True):
        if num_expected(lookup.acceptance, length) * step_s < MIN_GAIN * drafts_s:
            return ()
    return tuple(lookup.draft(length) for lookup, length in zip(lookups, lengths, strict=True))


def num_expected(acceptance: float, num_drafted: int) -> float:
    """Return how many tokens a run on a draft gives on average: those that come true, and the one behind them."""
    return sum(acceptance**place for place in range(num_drafted + 1))


def _best_length(lookup: PromptLookup, room: int, verify_s: Callable[[int], float]) -> int:
    """Return the length that promises most tokens per second, 0 where nothing can be drafted."""
    longest = min(room, lookup.num_guessed)
    rates = [
        (num_expected(lookup.acceptance, length) / verify_s(1 + length), length)
        for length in DRAFT_TOKENS
        if length <= longest
    ]
    return max(rates)[1] if rates else 0
