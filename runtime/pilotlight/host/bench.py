"""An artifact's own speed on this machine, without a server around it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from pilotlight.artifact import PREFILL_GRAPH, open_artifact
from pilotlight.config import HostSettings
from pilotlight.engine import profile
from pilotlight.engine.pace import Pace
from pilotlight.engine.profile import PROMPT_TOKENS, StepProfile
from pilotlight.engine.session import ALL_GRAPHS, OnnxSession, quickest_graphs
from pilotlight.host.mix_bench import after_prefill_factor
from pilotlight.host.mixed_load import Speeds
from pilotlight.host.rates import ArtifactSize, ChunkTime, Rates, StepRates, StepTime
from pilotlight.host.service_bench import ServiceBench
from pilotlight.host.sizing import num_cores, weights_bytes
from pilotlight.host.stolen import StolenTime
from pilotlight.request import SamplingParams

__all__ = ["Bench", "StepProfile"]

CHUNK_SIZES = (16, 32, 64, 128, 256, 512)
PASTS = (0, 32, 128, 256)
BATCHES = (1, 2, 3, 4, 6, 8, 16, 32)
CONTEXTS = (PROMPT_TOKENS, 384, 640)
MEASURED_TOKENS = 768
"""What is longer goes on in proportion."""

OVERHEAD_STREAMS = (1, 8)
OVERHEAD_STEPS = 60
MIXED_SLOTS = 8
GREEDY = SamplingParams(temperature=0.0)
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Bench:
    """What to measure, and with how many threads."""

    artifact: Path
    num_threads: int | None = None
    cache_dir: str = HostSettings().cache_dir

    @property
    def threads(self) -> int:
        return self.num_threads or num_cores()

    def profiles(self, sampling: SamplingParams, streams: tuple[int, ...], num_steps: int) -> list[StepProfile]:
        """Return the timeline of decode steps with so many streams each."""
        artifact = open_artifact(self.artifact)
        session = self._session(max(streams), PROMPT_TOKENS + num_steps + 3 * max(streams) + 16, self.threads)
        found = []
        for num_streams in streams:
            timed = profile.profile_steps(session, sampling, num_streams, num_steps)
            graph = Pace(has_batch_graph=session.has_batch_graph).graph_for(num_streams)
            shares = profile.operator_shares(artifact, self.threads, graph, num_streams, num_steps)
            found.append(replace(timed, run_shares=shares))
        return found

    def rates(self) -> dict[str, Any]:
        """Return what `pilotlight plan` reads, and beside it tokens per second for people, as JSON has them.

        Raises:
            StartFailed: no server can be started with the artifact.
        """
        artifact, stolen = open_artifact(self.artifact), StolenTime()
        longest = artifact.manifest.shapes.max_context_tokens
        quickest = quickest_graphs(artifact.manifest)
        lean_session = self._session(max(BATCHES), MEASURED_TOKENS, 1, quickest)
        lean = whole = self._step_rates(lean_session, 1, quickest, longest)
        grow_ms, kv_bytes_per_token = 0.0, lean_session.kv_bytes_per_token
        if self.threads > 1 or PREFILL_GRAPH in artifact.manifest.files:
            begun_at = time.monotonic()
            whole_session = self._session(max(BATCHES), MEASURED_TOKENS, self.threads, ALL_GRAPHS, lean_session)
            grow_ms = 1000 * (time.monotonic() - begun_at)
            whole = self._step_rates(whole_session, self.threads, ALL_GRAPHS, longest)
            del whole_session
        del lean_session
        served = ServiceBench(artifact, self.threads, self.cache_dir).measure(Speeds(lean, whole), grow_ms / 1000)
        rates = Rates(
            artifact=ArtifactSize(
                name=self.artifact.name,
                digest=artifact.digest,
                max_context_tokens=longest,
                weights_bytes=weights_bytes(artifact),
                kv_bytes_per_token=kv_bytes_per_token,
                replica_bytes=served.replica_bytes,
            ),
            lean=lean,
            whole=whole,
            starts=msgspec.structs.replace(served.starts, grow_ms=round(grow_ms, 3)),
            host=served.host,
            stolen_share=round(stolen.share(), 4),
        )
        return {**_for_people(whole), **msgspec.to_builtins(rates)}

    def _step_rates(self, session: OnnxSession, num_threads: int, graphs: tuple[str, ...], longest: int) -> StepRates:
        """Measure the runs of a session, and what the engine takes around them."""
        room = min(MEASURED_TOKENS, longest)
        chunks = [(size, past) for size in CHUNK_SIZES for past in PASTS if size + past <= room]
        contexts = tuple(context for context in CONTEXTS if context < room)
        prefill = profile.prefill_times(session, chunks, ROUNDS)
        decode = profile.decode_times(session, BATCHES, contexts, ROUNDS)
        few, many = (
            profile.profile_steps(session, GREEDY, num_streams, OVERHEAD_STEPS) for num_streams in OVERHEAD_STREAMS
        )
        around = [one.step_ms - one.stages_ms["run"] for one in (few, many)]
        row_ms = max(0.0, (around[1] - around[0]) / (many.num_streams - few.num_streams))
        rates = StepRates(
            num_threads=num_threads,
            decode=[
                StepTime(graph.value, rows, context, round(1000 * seconds, 4))
                for graph, times in decode.items()
                for (rows, context), seconds in times.items()
            ],
            prefill=[ChunkTime(size, past, round(1000 * seconds, 4)) for (size, past), seconds in prefill.items()],
            step_overhead_ms=round(max(0.0, around[0] - row_ms * few.num_streams), 4),
            row_overhead_ms=round(row_ms, 4),
        )
        mixed = self._session(MIXED_SLOTS, room, num_threads, graphs)
        factor = after_prefill_factor(mixed, rates, room)
        return msgspec.structs.replace(rates, after_prefill_factor=round(factor, 4))

    def _session(
        self,
        num_slots: int,
        num_tokens: int,
        num_threads: int,
        graphs: tuple[str, ...] = ALL_GRAPHS,
        beside: OnnxSession | None = None,
    ) -> OnnxSession:
        artifact = open_artifact(self.artifact)
        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else None
        context = min(num_tokens, artifact.manifest.shapes.max_context_tokens)
        return OnnxSession(artifact, num_slots, context, num_threads, cache_dir, graphs=graphs, beside=beside)


def _for_people(rates: StepRates) -> dict[str, Any]:
    """Return tokens per second of first chunks by size, and of decode by batch at the prompts' length."""
    by_graph: dict[str, dict[int, float]] = {}
    for one in rates.decode:
        if one.context_tokens == PROMPT_TOKENS:
            by_graph.setdefault(one.graph, {})[one.rows] = round(1000 * one.rows / one.ms, 1)
    return {
        "num_threads": rates.num_threads,
        "prompt_tokens": PROMPT_TOKENS,
        "prefill_tokens_per_s": {
            str(one.tokens): round(1000 * one.tokens / one.ms, 1) for one in rates.prefill if not one.past_tokens
        },
        "decode_tokens_per_s": {
            graph: {str(rows): rate for rows, rate in found.items()} for graph, found in by_graph.items()
        },
        "min_batch_rows": _crossing([*by_graph.values()]),
    }


def _crossing(rates: list[dict[int, float]]) -> int | None:
    """Return from how many rows on the second graph is faster; None without one, or if it never is."""
    if len(rates) < 2:
        return None
    main, batch = rates
    slower = [rows for rows in main if batch[rows] <= main[rows]]
    return next((rows for rows in main if rows > max(slower, default=0)), None)
