"""What a client sees of a peer's speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stream:
    """One streamed answer; instants are monotonic seconds."""

    sent_at: float
    token_times: list[float]

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent_at


def prompt_ids(length: int, vocab_size: int, seed: int) -> list[int]:
    """Return a random prompt, a new one for each seed, so that no server can reuse what it has cached."""
    ids: list[int] = np.random.default_rng(seed).integers(300, vocab_size, length).tolist()
    return ids


def decode_tokens_per_s(answer: Stream) -> float:
    """Return the speed between the first and the last token."""
    return (len(answer.token_times) - 1) / (answer.token_times[-1] - answer.token_times[0])


def total_tokens_per_s(answers: Sequence[Stream]) -> float:
    """Return all tokens over the time from the first request to the last token, prefill included."""
    start = min(answer.sent_at for answer in answers)
    end = max(answer.token_times[-1] for answer in answers)
    return sum(len(answer.token_times) for answer in answers) / (end - start)


def steady_tokens_per_s(answers: Sequence[Stream]) -> float:
    """Return the tokens per second while every stream was decoding: after the last prefill, before the first end."""
    start = max(answer.token_times[0] for answer in answers)
    end = min(answer.token_times[-1] for answer in answers)
    count = sum(start < at <= end for answer in answers for at in answer.token_times)
    return count / (end - start) if end > start else float("nan")
