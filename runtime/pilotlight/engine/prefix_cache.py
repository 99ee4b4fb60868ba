"""Keys and values of prompt beginnings that were computed before, for the next prompt that begins the same. Pure.

A prompt is cut into blocks of ``block_tokens``. A block is found by all tokens up to its end, and only by the tenant
that paid for it. What a block holds is the session's business; here it has a size and a cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from pilotlight.engine.prefix_keys import PrefixChanges, Scope, block_keys

ATTENTION_TOKENS = 2048
"""At about this position a token's attention costs as much as the rest of it. Only evictions depend on it."""


class Held(Protocol):
    """Keys and values of a block, out of the cache."""

    @property
    def nbytes(self) -> int: ...


@dataclass(slots=True)
class Block:
    """``num_children`` blocks continue it, so it cannot go before them."""

    key: bytes
    parent: bytes | None
    start: int
    end: int
    held: Held
    worth: float
    num_uses: int = 0
    num_children: int = 0


class PrefixCache:
    """Blocks within ``max_bytes``.

    What goes first is the block whose computing again would cost least, by how often it was used, on top of the worth
    at which the last one went, so that what was popular once does not stay for ever.

    Source: Cao and Irani 1997 (GreedyDual-Size), with frequency.
    """

    def __init__(self, block_tokens: int, max_bytes: int) -> None:
        self.block_tokens = block_tokens
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.changes: PrefixChanges | None = None
        """What came and went, where somebody wants to know and takes it out."""
        self._blocks: dict[bytes, Block] = {}
        self._level = 0.0

    def keys(self, scope: Scope, tokens: Items[int]) -> list[bytes]:
        """Return the key of each whole block of a prompt whose last token is still to be computed."""
        return block_keys(scope, tokens, self.block_tokens) if self.max_bytes else []

    def find(self, keys: Items[bytes]) -> list[Block]:
        """Return the blocks that are here, from the first one on without a gap; they are worth more from now on."""
        found = [self._blocks[key] for key in takewhile(self._blocks.__contains__, keys)]
        for block in found:
            block.num_uses += 1
            block.worth = self._worth(block)
        return found

    def missing(self, keys: Items[bytes], past_tokens: int, end: int) -> Iterator[int]:
        """Yield the blocks which the prompt's tokens from ``past_tokens`` to ``end`` have completed and nobody kept.

        Whoever does not add one has to stop asking.
        """
        for index in range(past_tokens // self.block_tokens, min(end // self.block_tokens, len(keys))):
            if self.lacks(keys, index):
                yield index

    def lacks(self, keys: Items[bytes], index: int) -> bool:
        """Whether a block is missing here, and the one before it is not."""
        return keys[index] not in self._blocks and (index == 0 or keys[index - 1] in self._blocks)

    def add(self, keys: Items[bytes], index: int, held: Held) -> None:
        """Keep a block that was missing, where there is or can be room for it."""
        assert self.lacks(keys, index)
        parent = keys[index - 1] if index else None
        while self.num_bytes + held.nbytes > self.max_bytes and self._evict(parent):
            pass
        if self.num_bytes + held.nbytes > self.max_bytes:
            return
        start = index * self.block_tokens
        block = Block(keys[index], parent, start, start + self.block_tokens, held, worth=0.0)
        block.worth = self._worth(block)
        self._blocks[block.key] = block
        self.num_bytes += held.nbytes
        self._note(block.key, is_kept=True)
        if parent is not None:
            self._blocks[parent].num_children += 1

    def _note(self, key: bytes, *, is_kept: bool) -> None:
        if self.changes is not None:
            self.changes[key] = is_kept

    def _worth(self, block: Block) -> float:
        return self._level + (1 + block.num_uses) * (1 + block.start / ATTENTION_TOKENS)

    def _evict(self, spared: bytes | None) -> bool:
        """Let the least worthy block go that none continues; False when there is none but the spared one."""
        leaves = (b for b in self._blocks.values() if b.num_children == 0 and b.key != spared)
        block = min(leaves, key=lambda leaf: leaf.worth, default=None)
        if block is None:
            return False
        self._level = max(self._level, block.worth)
        self.num_bytes -= block.held.nbytes
        del self._blocks[block.key]
        self._note(block.key, is_kept=False)
        if block.parent is not None:
            self._blocks[block.parent].num_children -= 1
        return True
