"""The names of prompt beginnings: the engine keeps blocks under them, the host sends prompts where they are kept."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from hashlib import blake2b

Scope = tuple[str | None, str | None]
"""Tenant and cache key: nothing is found from another scope."""

PrefixChanges = dict[bytes, bool]
"""Blocks that came (True) or went (False) since somebody last asked."""


def block_keys(scope: Scope, tokens: Items[int], block_tokens: int) -> list[bytes]:
    """Return the key of each whole block of a prompt whose last token is still to be computed."""
    ids = memoryview(array("q", tokens)).cast("B")
    chain = blake2b(repr(scope).encode(), digest_size=16)
    keys = []
    for end in range(block_tokens, len(tokens), block_tokens):
        chain.update(ids[8 * (end - block_tokens) : 8 * end])
        keys.append(chain.digest())
    return keys
