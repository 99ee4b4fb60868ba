"""What one invocation used: token counts and times."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The counts that are charged for.

    ``cached_tokens`` are those of ``prompt_tokens`` which were not computed again. ``delivered_tokens`` of the
    ``completion_tokens`` reached the client. ``recomputed_tokens`` were computed again after a preemption or a move and
    are not charged, and ``migrations`` counts such moves. ``reasoning_tokens`` are those of the ``completion_tokens``
    that lie between the model's think markers; after a crash, those of the last checkpoint. ``busy_ms`` is the time in
    prefill and decode.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    delivered_tokens: int = 0
    recomputed_tokens: int = 0
    busy_ms: int = 0
    reasoning_tokens: int = 0
    migrations: int = 0


class Timings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long an invocation spent in each stage, by one monotonic clock.

    ``cold_start_ms`` is how long it waited for a replica to start, the five after it the stages of that start. A stage
    that was not reached took 0; ``ttft_ms`` (the time to the first token) is None without a token.
    """

    queue_ms: float = 0.0
    cold_start_ms: float = 0.0
    fork_ms: float = 0.0
    map_ms: float = 0.0
    session_ms: float = 0.0
    unseal_ms: float = 0.0
    warm_up_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float | None = None
    decode_ms: float = 0.0
    total_ms: float = 0.0
