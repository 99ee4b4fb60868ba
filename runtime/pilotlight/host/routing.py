"""Which replica a sequence goes to: the one with the least work, unless another holds its prefix. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

BLOCK_TOKENS = 64
MAX_REMEMBERED_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica with a free place: the tokens it has yet to compute, and how many of the prompt's it has computed."""

    num_outstanding_tokens: int
    num_known_tokens: int


def route(choices: Items[Choice]) -> int:
    """Return the index of the best replica. A known prefix is worth as many tokens as it has."""
    return min(range(len(choices)), key=lambda i: choices[i].num_outstanding_tokens - choices[i].num_known_tokens)


def prefix_blocks(token_ids: Items[int]) -> list[int]:
    """Return a hash for each prefix of ``token_ids`` that is a whole number of blocks long, the shortest first."""
    hashes: list[int] = []
    running = 0
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        running = hash((running, tuple(token_ids[start : start + BLOCK_TOKENS])))
        hashes.append(running)
    return hashes


class KnownPrefixes:
    """The prefixes that a replica has computed lately."""

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}

    def add(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > MAX_REMEMBERED_BLOCKS:
            del self._blocks[next(iter(self._blocks))]

    def num_tokens(self, blocks: Iterable[int]) -> int:
        """Return how many tokens of a prompt with these blocks are known."""
        known = 0
        for block in blocks:
            if block not in self._blocks:
                break
            known += BLOCK_TOKENS
        return known
