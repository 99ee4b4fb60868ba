"""How an engine shares its steps, its cache and its memory: the part of a function's settings that it acts on."""

from __future__ import annotations

from dataclasses import dataclass

from pilotlight.config import FunctionSettings

MAX_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """What a step may use.

    ``max_chunk_tokens`` of a prompt are read in one step at most, fewer where a running stream would wait longer than
    ``max_inter_token_ms`` for its next token. ``kv_budget_tokens`` bounds the tokens in all slots together; None: the
    slots alone bound them.

    ``deterministic``: nothing that a sequence's numbers depend on may depend on its neighbours, so every decode step
    runs on one graph and on two rows at least, chunks end at multiples of ``max_chunk_tokens``, and an answer that was
    preempted is replayed by decode steps, as it was made.

    ``prefix_cache_bytes`` hold the beginnings of prompts for the next ones that begin the same; 0: none are kept.
    ``share_prefixes``: also between tenants, who could then find out by the time that an answer takes what others ask.

    ``speculates``: tokens that can be guessed are run together where that pays (``engine.speculation``), unless the
    function is deterministic, because kernels may round otherwise with more tokens.
    """

    max_chunk_tokens: int = 128
    max_inter_token_ms: float | None = None
    kv_budget_tokens: int | None = None
    deterministic: bool = False
    prefix_cache_bytes: int = 0
    share_prefixes: bool = False
    speculates: bool = False

    @property
    def prefix_block_tokens(self) -> int:
        """How many tokens are reused together. Fixed chunks stay where they are if whole ones are reused."""
        return self.max_chunk_tokens if self.deterministic else min(self.max_chunk_tokens, MAX_BLOCK_TOKENS)

    @classmethod
    def from_settings(cls, settings: FunctionSettings) -> Policy:
        """Return what a function's settings ask of its engine."""
        return cls(
            max_chunk_tokens=settings.max_chunk_tokens,
            max_inter_token_ms=settings.max_inter_token_ms,
            kv_budget_tokens=settings.kv_budget_tokens,
            deterministic=settings.deterministic,
            prefix_cache_bytes=settings.prefix_cache_mb << 20,
            share_prefixes=settings.share_prefixes,
            speculates=settings.speculation == "auto" and not settings.deterministic,
        )

    def num_slots(self, asked: int) -> int:
        """Return how many slots a session needs: a lone stream runs beside a row of padding if it is deterministic."""
        return max(asked, 2) if self.deterministic else asked


DEFAULT_POLICY = Policy()
