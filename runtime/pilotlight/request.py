"""What travels between a function and its backend: a sequence goes in, token events come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why an invocation ended; every usage record carries one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    REJECTED = "rejected"
    CRASHED = "crashed"


LEAST_TEMPERATURE = 1e-6
"""Below it a draw is greedy but for rounding, and logits divided by it leave float32."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    The random number of a token depends on ``seed`` and the token's place in the answer only, so a seeded request gives
    the same tokens whatever runs beside it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids to continue, until a token of ``stop_ids`` or ``max_new_tokens``, whichever comes first.

    Where ``num_top_logprobs`` is given, each token comes with its log probability and those of so many likeliest ones.
    ``emitted_ids`` is the part of the answer that was generated elsewhere already: it counts towards
    ``max_new_tokens``, and what follows is what would have followed there.
    A ``grammar``, in llguidance's serialized form, says which answers are possible at all; the sequence ends where
    nothing may follow.
    Sequences of one ``tenant`` with the same ``cache_key`` reuse each other's prompts where they begin the same.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = SamplingParams()
    num_top_logprobs: int | None = None
    emitted_ids: tuple[int, ...] = ()
    tenant: str | None = None
    grammar: str | None = None
    cache_key: str | None = None


@dataclass(frozen=True, slots=True)
class Continuation:
    """An answer that was cut off: what there is of it, and the seed that its random numbers come from.

    ``first_id`` is the request id of the invocation that began it. What was ``paid`` for is not billed again.
    """

    first_id: str
    emitted_ids: tuple[int, ...]
    seed: int
    paid: bool


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How likely the model held a token, before any sampling parameter, and what it held likeliest there."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Start(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The start of a replica that a sequence had to wait for; ``waited_ms`` is how long, the rest are its stages."""

    waited_ms: float
    fork_ms: float
    map_ms: float
    session_ms: float
    warm_up_ms: float
    unseal_ms: float = 0.0


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One generated token, or an end without a token. ``at`` is a monotonic instant in seconds.

    The event with a ``finish`` is the last one of its sequence. ``prefill_started_at`` is set on the first token. Where
    a sequence was moved or had to make room, the next event says how many tokens were computed again. So many of its
    prompt's as ``num_cached_tokens`` on the first token were not computed at all.
    ``retry_after_s`` goes with a start that failed and may do better by then, ``out_of_memory_retry_s`` with a run.
    """

    token_id: int | None
    at: float
    finish: FinishReason | None = None
    prefill_started_at: float | None = None
    error: str | None = None
    logprobs: TokenLogprobs | None = None
    retry_after_s: float | None = None
    out_of_memory_retry_s: float | None = None
    replica_id: str | None = None
    start: Start | None = None
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0


class Signals(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A backend's load at one instant, for admission, metrics and scaling."""

    num_waiting: int
    num_running: int
    num_slots: int
    num_prefill_backlog_tokens: int
    kv_used_bytes: int
    kv_reserved_bytes: int
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    prefix_cache_bytes: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
