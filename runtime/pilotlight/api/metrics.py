"""Prometheus metrics, under the names that other model servers use (vLLM's, with our prefix)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pilotlight.function import Function
from pilotlight.metering.record import UsageRecord
from pilotlight.request import Signals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

STAGES = ("fork", "map", "unseal", "session", "warm_up")

GAUGES: dict[str, tuple[str, Callable[[Signals], float]]] = {
    "pilotlight_num_requests_waiting": ("Requests in the queue.", lambda s: s.num_waiting),
    "pilotlight_num_requests_running": ("Requests in a slot.", lambda s: s.num_running),
    "pilotlight_slots_used_ratio": ("Share of the slots in use.", lambda s: s.num_running / max(1, s.num_slots)),
    "pilotlight_prefill_backlog_tokens": ("Prompt tokens not yet computed.", lambda s: s.num_prefill_backlog_tokens),
    "pilotlight_kv_used_bytes": ("KV cache in use.", lambda s: s.kv_used_bytes),
    "pilotlight_num_preemptions": ("Sequences that had to make room.", lambda s: s.num_preemptions),
    "pilotlight_prefix_cache_queries": ("Prompt tokens looked up.", lambda s: s.num_prefix_query_tokens),
    "pilotlight_prefix_cache_hits": ("Prompt tokens not computed again.", lambda s: s.num_prefix_hit_tokens),
    "pilotlight_prefix_cache_bytes": ("Memory of kept prompt beginnings.", lambda s: s.prefix_cache_bytes),
    "pilotlight_speculation_drafted_tokens": ("Tokens guessed and computed.", lambda s: s.num_drafted_tokens),
    "pilotlight_speculation_accepted_tokens": ("Guessed tokens that came true.", lambda s: s.num_accepted_tokens),
    "pilotlight_kv_reserved_bytes": ("KV cache allocated.", lambda s: s.kv_reserved_bytes),
}


@dataclass(frozen=True, slots=True)
class HbmUse:
    """A GPU's memory: what its driver says of all of it, and what a function's part of it is for."""

    used_bytes: int
    total_bytes: int
    weights_bytes: int
    kv_reserved_bytes: int
    kv_used_bytes: int
    workspace_bytes: int


HBM_GAUGES: dict[str, tuple[str, Callable[[HbmUse], int]]] = {
    "pilotlight_hbm_used_bytes": ("GPU memory in use, by anyone.", lambda h: h.used_bytes),
    "pilotlight_hbm_total_bytes": ("GPU memory.", lambda h: h.total_bytes),
    "pilotlight_hbm_weights_bytes": ("GPU memory of weights.", lambda h: h.weights_bytes),
    "pilotlight_hbm_kv_reserved_bytes": ("GPU memory allocated for the KV cache.", lambda h: h.kv_reserved_bytes),
    "pilotlight_hbm_kv_used_bytes": ("GPU memory of cached tokens.", lambda h: h.kv_used_bytes),
    "pilotlight_hbm_workspace_bytes": ("GPU memory that runs may take.", lambda h: h.workspace_bytes),
}


class Stages(Protocol):
    """How long each stage of a replica's start took."""

    @property
    def fork_ms(self) -> float: ...
    @property
    def map_ms(self) -> float: ...
    @property
    def session_ms(self) -> float: ...
    @property
    def warm_up_ms(self) -> float: ...
    @property
    def unseal_ms(self) -> float: ...


class Metrics:
    """One registry: counters and histograms fed by functions, gauges read from their backends when scraped."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        of = ("function",)
        self._invocations = Counter(
            "pilotlight_invocations", "Finished invocations.", (*of, "finish_reason"), registry=registry
        )
        self._prompt_tokens = Counter("pilotlight_prompt_tokens", "Prompt tokens metered.", of, registry=registry)
        self._ttft = Histogram(
            "pilotlight_time_to_first_token_seconds",
            "Receipt to first token.",
            of,
            registry=registry,
            buckets=TTFT_BUCKETS_S,
        )
        self._latency = Histogram(
            "pilotlight_e2e_request_latency_seconds",
            "Receipt to record.",
            of,
            registry=registry,
            buckets=TTFT_BUCKETS_S,
        )

        self._starts = Histogram(
            "pilotlight_replica_start_seconds",
            "Stages of a replica's start.",
            (*of, "stage"),
            registry=registry,
            buckets=TTFT_BUCKETS_S,
        )
        self._tokens = _Tokens()
        registry.register(self._tokens)
        self._losses = Counter("pilotlight_replicas_lost", "Replicas that died or hung.", of, registry=registry)

    def token(self, function: str, gap_s: float | None) -> None:
        self._tokens.count(function, gap_s)

    def finished(self, record: UsageRecord) -> None:
        self._invocations.labels(record.function, record.finish_reason.value).inc()
        self._prompt_tokens.labels(record.function).inc(record.prompt_tokens)
        self._latency.labels(record.function).observe(record.total_ms / 1000)
        if record.ttft_ms is not None:
            self._ttft.labels(record.function).observe(record.ttft_ms / 1000)

    def replica_started(self, function: str, stages: Stages) -> None:
        """A replica is ready after so many milliseconds in each stage of its start."""
        for stage in STAGES:
            self._starts.labels(function, stage).observe(getattr(stages, f"{stage}_ms") / 1000)

    def replica_lost(self, function: str) -> None:
        """A replica died that should not have."""
        self._losses.labels(function).inc()

    def watch(self, functions: Mapping[str, Function]) -> None:
        """Report the gauges of these functions from now on."""
        self._registry.register(_Gauges(functions))

    def watch_hbm(self, function: str, use: Callable[[], HbmUse]) -> None:
        """Report how the GPU's memory is used; ``use`` is called whenever that is asked for."""
        self._registry.register(_HbmGauges(function, use))

    def render(self) -> bytes:
        """Return the text exposition format."""
        return generate_latest(self._registry)


class _Tokens(Collector):
    """Tokens and the gaps between them. Counted with every token, so without the locks of a counter of the library."""

    def __init__(self) -> None:
        self._num_tokens: defaultdict[str, int] = defaultdict(int)
        self._num_gaps: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(TOKEN_BUCKETS_S) + 1))
        self._gaps_s: defaultdict[str, float] = defaultdict(float)

    def count(self, function: str, gap_s: float | None) -> None:
        self._num_tokens[function] += 1
        if gap_s is not None:
            self._num_gaps[function][bisect_left(TOKEN_BUCKETS_S, gap_s)] += 1
            self._gaps_s[function] += gap_s

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily("pilotlight_generation_tokens", "Tokens generated.", labels=["function"])
        for function, number in self._num_tokens.items():
            tokens.add_metric([function], number)
        yield tokens
        gaps = HistogramMetricFamily(
            "pilotlight_inter_token_latency_seconds", "Between two tokens.", labels=["function"]
        )
        bounds = [*map(str, TOKEN_BUCKETS_S), "+Inf"]
        for function, counts in self._num_gaps.items():
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            gaps.add_metric([function], buckets, self._gaps_s[function])
        yield gaps


class _Gauges(Collector):
    def __init__(self, functions: Mapping[str, Function]) -> None:
        self._functions = functions

    def collect(self) -> Iterable[Metric]:
        signals = {name: function.backend.signals() for name, function in self._functions.items()}
        for name, (description, value) in GAUGES.items():
            family = GaugeMetricFamily(name, description, labels=["function"])
            for function, of_function in signals.items():
                family.add_metric([function], value(of_function))
            yield family


class _HbmGauges(Collector):
    def __init__(self, function: str, use: Callable[[], HbmUse]) -> None:
        self._function = function
        self._use = use

    def collect(self) -> Iterable[Metric]:
        use = self._use()
        for name, (description, value) in HBM_GAUGES.items():
            family = GaugeMetricFamily(name, description, labels=["function"])
            family.add_metric([self._function], value(use))
            yield family
