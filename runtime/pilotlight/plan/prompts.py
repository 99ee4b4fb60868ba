"""Prompts and token lists without tokens: what the scheduler, the router and the prefix cache ask of them, and no more.

A trace has lengths, and perhaps names for blocks of which it knows that they are the same. A million prompts of some
thousand ids each would be made for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from pilotlight.engine.policy import Policy
from pilotlight.engine.prefix_cache import PrefixCache
from pilotlight.engine.prefix_keys import Scope
from pilotlight.engine.scheduler import Active
from pilotlight.plan.trace import Arrival
from pilotlight.request import Sequence

TOKEN = 1
"""Stands for any token. No simulated sequence has it among its stop tokens."""


class Prompt(tuple[int, ...]):
    """A prompt's length, and a name for each beginning of it. A slice that ends at ``end`` is that beginning's name."""

    num_tokens: int
    number: int
    block_ids: tuple[int, ...]
    block_tokens: float

    @classmethod
    def of(cls, number: int, arrival: Arrival) -> Prompt:
        prompt = cls()
        prompt.num_tokens, prompt.number = arrival.num_prompt_tokens, number
        prompt.block_ids, prompt.block_tokens = arrival.block_ids, arrival.block_tokens
        return prompt

    def name(self, end: int) -> tuple[int, int]:
        """Return what stands for the first ``end`` tokens: the same for every prompt that is known to begin so."""
        if self.block_ids:
            index = int((end - 1) / self.block_tokens)
            if index < len(self.block_ids):
                return self.block_ids[index], end
        return -1 - self.number, end

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, index: Any) -> Any:
        return (self.name(index.stop),) if isinstance(index, slice) else TOKEN

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return self is other


class TokenCount(list[int]):
    """A list of tokens that only counts them."""

    def __init__(self, num_tokens: int, prompt: Prompt) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.prompt = prompt

    def __len__(self) -> int:
        return self.num_tokens

    def append(self, token: int) -> None:
        self.num_tokens += 1

    def __getitem__(self, index: Any) -> Any:
        return Known(self.prompt, min(index.stop, self.num_tokens)) if isinstance(index, slice) else TOKEN


class Known(list[int]):
    """The first tokens of a sequence, as the prefix cache gets them."""

    def __init__(self, prompt: Prompt, num_tokens: int) -> None:
        super().__init__()
        self.prompt, self.num_tokens = prompt, num_tokens

    def __len__(self) -> int:
        return self.num_tokens


class SimulatedActive(Active):
    """The scheduler's own record of a sequence, over counted tokens."""

    __slots__ = ("began_at", "max_tokens")

    tokens: TokenCount

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence)
        self.began_at: float | None = None
        self.max_tokens = len(sequence.prompt_ids) + sequence.max_new_tokens

    def __post_init__(self) -> None:
        prompt = self.sequence.prompt_ids
        assert isinstance(prompt, Prompt)
        self.tokens = TokenCount(len(prompt) + len(self.sequence.emitted_ids), prompt)

    @property
    def num_left(self) -> int:
        """How many tokens its answer may still get."""
        return self.max_tokens - self.tokens.num_tokens

    def advance(self, num_tokens: int) -> None:
        """Take over so many decode steps, each of which gave a new token."""
        self.num_cached += num_tokens
        self.tokens.num_tokens += num_tokens


class NamedPrefixes(PrefixCache):
    """The engine's prefix cache, whose keys come from the names of a prompt's beginnings instead of its tokens."""

    def keys(self, scope: Scope, tokens: Items[int]) -> list[bytes]:
        assert isinstance(tokens, Known)
        return _named(scope, tokens.prompt, len(tokens), self.block_tokens) if self.max_bytes else []


def named_keys(sequence: Sequence, policy: Policy) -> list[bytes]:
    """Return the keys under which these engines keep a prompt's beginnings, for the router."""
    assert isinstance(sequence.prompt_ids, Prompt)
    if policy.prefix_cache_bytes == 0:
        return []
    tenant = None if policy.share_prefixes else sequence.tenant
    prompt = sequence.prompt_ids
    return _named((tenant, sequence.cache_key), prompt, len(prompt), policy.prefix_block_tokens)


def _named(scope: Scope, prompt: Prompt, num_tokens: int, block_tokens: int) -> list[bytes]:
    return [repr((scope, prompt.name(end))).encode() for end in range(block_tokens, num_tokens, block_tokens)]


class HeldBytes:
    """A block of the prefix cache by its size."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
