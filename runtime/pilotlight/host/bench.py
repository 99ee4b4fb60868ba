"""An artifact's own speed on this machine, without a server around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilotlight.artifact import open_artifact
from pilotlight.config import HostSettings
from pilotlight.engine import profile
from pilotlight.engine.pace import Pace
from pilotlight.engine.profile import PROMPT_TOKENS, StepProfile
from pilotlight.engine.session import OnnxSession
from pilotlight.host.sizing import num_cores
from pilotlight.request import SamplingParams

__all__ = ["Bench", "StepProfile"]

CHUNK_SIZES = (16, 32, 64, 128, 256, 512)
BATCHES = (1, 2, 3, 4, 6, 8, 16, 32)
ROUNDS = 5


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
        session = self._session(max(streams), PROMPT_TOKENS + num_steps + 3 * max(streams) + 16)
        found = []
        for num_streams in streams:
            timed = profile.profile_steps(session, sampling, num_streams, num_steps)
            graph = Pace(has_batch_graph=session.has_batch_graph).graph_for(num_streams)
            shares = profile.operator_shares(artifact, self.threads, graph, num_streams, num_steps)
            found.append(replace(timed, run_shares=shares))
        return found

    def rates(self) -> dict[str, Any]:
        """Return tokens per second of prefill by chunk size and of decode by batch, as JSON has them."""
        longest = open_artifact(self.artifact).manifest.shapes.max_context_tokens
        sizes = tuple(size for size in CHUNK_SIZES if size <= longest)
        session = self._session(max(BATCHES), max(*sizes, PROMPT_TOKENS + 1))
        prefill = profile.prefill_rates(session, sizes, ROUNDS)
        decode = profile.decode_rates(session, BATCHES, ROUNDS)
        return {
            "num_threads": self.threads,
            "prompt_tokens": PROMPT_TOKENS,
            "prefill_tokens_per_s": {str(size): round(rate, 1) for size, rate in prefill.items()},
            "decode_tokens_per_s": {
                graph.value: {str(rows): round(rate, 1) for rows, rate in rates.items()}
                for graph, rates in decode.items()
            },
            "min_batch_rows": _crossing([*decode.values()]),
        }

    def _session(self, num_slots: int, num_tokens: int) -> OnnxSession:
        artifact = open_artifact(self.artifact)
        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else None
        context = min(num_tokens, artifact.manifest.shapes.max_context_tokens)
        return OnnxSession(artifact, num_slots, context, self.threads, cache_dir)


def _crossing(rates: list[dict[int, float]]) -> int | None:
    """Return from how many rows on the second graph is faster; None without one, or if it never is."""
    if len(rates) < 2:
        return None
    main, batch = rates
    slower = [rows for rows in main if batch[rows] <= main[rows]]
    return next((rows for rows in main if rows > max(slower, default=0)), None)
