"""Which replica a sequence goes to: the one with the least work, unless another holds its prefix. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from pilotlight.engine.policy import Policy
from pilotlight.engine.prefix_keys import PrefixChanges, block_keys
from pilotlight.request import Sequence

PrefixKeys = Callable[[Sequence, Policy], list[bytes]]
"""See ``prefix_keys``."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica with a free place: the tokens it has yet to compute, and how many of the prompt's it has computed."""

    num_outstanding_tokens: int
    num_known_tokens: int


def route(choices: Items[Choice]) -> int:
    """Return the index of the best replica. A known prefix is worth as many tokens as it has."""
    return min(range(len(choices)), key=lambda i: choices[i].num_outstanding_tokens - choices[i].num_known_tokens)


def prefix_keys(sequence: Sequence, policy: Policy) -> list[bytes]:
    """Return the keys under which engines of this policy keep a prompt's beginnings, the shortest first."""
    if policy.prefix_cache_bytes == 0:
        return []
    tenant = None if policy.share_prefixes else sequence.tenant
    return block_keys((tenant, sequence.cache_key), sequence.prompt_ids, policy.prefix_block_tokens)


class KnownPrefixes:
    """The blocks of prompts that a replica holds, as it tells, and those that its open sequences are computing."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._kept: set[bytes] = set()
        self._coming: Counter[bytes] = Counter()

    def begin(self, keys: Iterable[bytes]) -> None:
        """A sequence with these blocks was sent there."""
        self._coming.update(keys)

    def end(self, keys: Iterable[bytes]) -> None:
        """That sequence is there no more."""
        for key in keys:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

    def change(self, changes: PrefixChanges) -> None:
        for key, is_kept in changes.items():
            if is_kept:
                self._kept.add(key)
            else:
                self._kept.discard(key)

    def num_tokens(self, keys: Iterable[bytes]) -> int:
        """Return how many tokens of a prompt with these blocks need not be computed again."""
        num_blocks = 0
        for key in keys:
            if key not in self._kept and key not in self._coming:
                break
            num_blocks += 1
        return num_blocks * self._block_tokens
