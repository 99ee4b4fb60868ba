"""What is measured: workloads, the figures that each gives, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from measure import Stream, decode_tokens_per_s, steady_tokens_per_s, total_tokens_per_s
from memory import Memory
from models import Shape

BITS_PER_WEIGHT = 4.5
"""Four bits and a 16-bit scale for each block of 32, as in Q4_0."""

BYTES_PER_CACHE_VALUE = 2


@dataclass(frozen=True)
class Measured:
    """What one run of a workload showed."""

    answers: Sequence[Stream]
    memory: Memory


@dataclass(frozen=True)
class Figure:
    """A number that is compared; the ratio asked is ours over the best peer's, for each shape.

    What is asked ``over_http`` is asked of the server alone: libraries have none.
    """

    name: str
    unit: str
    value: Callable[[Measured], float]
    better: Literal["more", "less", "neither"] = "more"
    asked: tuple[tuple[str, float], ...] = ()
    over_http: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}"


@dataclass(frozen=True)
class Workload:
    """Requests that are sent at the same time."""

    name: str
    num_streams: int
    num_prompt_tokens: int
    num_tokens: int
    figures: tuple[Figure, ...]

    @property
    def max_context_tokens(self) -> int:
        """How long a slot of a peer is: the same for all workloads on one number of slots."""
        return 2048 if self.num_streams == 1 else 512


def _asked(smollm2: float, qwen: float) -> tuple[tuple[str, float], ...]:
    return (("smollm2-135m", smollm2), ("qwen2.5-0.5b", qwen))


def _prefill(measured: Measured) -> float:
    return 512 / measured.answers[0].ttft_s


def _ttft_ms(measured: Measured) -> float:
    return 1000 * measured.answers[0].ttft_s


def _decode(measured: Measured) -> float:
    return decode_tokens_per_s(measured.answers[0])


def _single(context: int, asked: tuple[tuple[str, float], ...], *more: Figure) -> Workload:
    speed = Figure(f"decode, 1 stream, context {context}", "tok/s", _decode, asked=asked)
    return Workload(f"decode-{context}", 1, context, 64, (speed, *more))


def _streams(number: int, steady: float, total: float, qwen: float, memory: tuple[tuple[str, float], ...]) -> Workload:
    name = f"{number} streams"
    asked_steady, asked_total = _asked(steady, qwen), _asked(total, qwen)
    figures = (
        Figure(f"{name}, steady decode", "tok/s", lambda m: steady_tokens_per_s(m.answers), "more", asked_steady, True),
        Figure(
            f"{name}, prefill included", "tok/s", lambda m: total_tokens_per_s(m.answers), "more", asked_total, True
        ),
        Figure(f"{name}, peak anonymous memory", "MiB", lambda m: m.memory.anonymous_mib, "less", memory, True),
        Figure(f"{name}, mapped memory beside it", "MiB", lambda m: m.memory.mapped_mib, "neither"),
    )
    return Workload(f"streams-{number}", number, 128, 64, figures)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("prefill", 1, 512, 2, (Figure("prefill, 512 tokens", "tok/s", _prefill, asked=_asked(1.35, 1.8)),)),
        _single(128, _asked(1.0, 1.1), Figure("time to first token, 128 tokens", "ms", _ttft_ms, "less")),
        _single(1024, _asked(1.0, 1.2)),
        _streams(8, 1.6, 1.5, 1.75, _asked(1.0, 1.0)),
        _streams(32, 1.6, 1.6, 1.75, ()),
    )
}


def step_bytes(shape: Shape, context: int) -> int:
    """Return the fewest bytes that a decode step of one stream reads: 4-bit weights and a 16-bit cache.

    The same for every peer, whatever its weights and its cache really take, so that shares can be compared. An
    embedding that is the head as well is read once, whole.
    """
    weights = sum(_count(axes) for _, axes in shape.tensors() if len(axes) == 2)
    cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * context
    return int(weights * BITS_PER_WEIGHT / 8) + cache * BYTES_PER_CACHE_VALUE


def _count(axes: tuple[int, ...]) -> int:
    count = 1
    for axis in axes:
        count *= axis
    return count
