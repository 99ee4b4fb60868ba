"""Measure an artifact's steps: their timeline by stage and operator, and the rates that follow from them."""

from __future__ import annotations

import json
import queue
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pilotlight.artifact import Artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.policy import DEFAULT_POLICY
from pilotlight.engine.session import OnnxSession
from pilotlight.engine.timeline import StageTimes
from pilotlight.request import SamplingParams, Sequence
from pilotlight.scratch import scratch

PROMPT_TOKENS = 128
WARM_UP_STEPS = 5
ENOUGH_S = 12.0
"""No further round begins when the rounds have taken so long: a run of seconds needs no median of seven."""

BETWEEN_OPERATORS = "(between operators)"


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The mean decode step of so many streams: milliseconds by stage, and what part of ``run`` each operator took."""

    num_streams: int
    step_ms: float
    stages_ms: dict[str, float]
    run_shares: dict[str, float]

    @property
    def named(self) -> float:
        """The part of a step's wall time that has a name."""
        return sum(self.stages_ms.values()) / self.step_ms

    @property
    def python(self) -> float:
        """The part of a step's wall time outside the graph."""
        return 1 - self.stages_ms["run"] / self.step_ms


class _Recorder:
    """Takes an engine's events, and times the steps in which all streams decode."""

    def __init__(self, num_streams: int, num_steps: int) -> None:
        self.times = StageTimes()
        self.done = threading.Event()
        self.failure: str | None = None
        self._num_streams, self._num_steps = num_streams, num_steps
        self._seen = 0
        self._sink: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()

    def emit(self, events: list[Event]) -> None:
        self._sink.put(events)
        self.failure = next((event.error for _, event in events if event.error), self.failure)
        if len(events) == self._num_streams and not any(event.prefill_started_at for _, event in events):
            self._seen += 1
        if self._seen == WARM_UP_STEPS:
            self._seen += 1
            self.times.start()
        elif self._seen == WARM_UP_STEPS + 1 + self._num_steps and not self.done.is_set():
            self.times.stop()
            self.done.set()
        if self.failure:
            self.done.set()


def profile_steps(session: OnnxSession, sampling: SamplingParams, num_streams: int, num_steps: int) -> StepProfile:
    """Return where the time of a decode step goes, as the engine runs it, operators left out."""
    recorder = _Recorder(num_streams, num_steps)
    engine = Engine(session, recorder.emit, DEFAULT_POLICY, timeline=recorder.times)
    engine.start()
    try:
        num_new = WARM_UP_STEPS + num_steps + 2 + 2 * num_streams
        for number in range(num_streams):
            engine.submit(Sequence(f"s{number}", _prompt(number), num_new, sampling=sampling))
        recorder.done.wait()
        if recorder.failure:
            raise RuntimeError(recorder.failure)
    finally:
        engine.close()
    stages = {stage: seconds / num_steps * 1000 for stage, seconds in recorder.times.seconds.items()}
    return StepProfile(num_streams, recorder.times.wall_s / num_steps * 1000, stages, {})


def operator_shares(
    artifact: Artifact, num_threads: int, graph: DecodeGraph, num_streams: int, num_steps: int
) -> dict[str, float]:
    """Return what part of a decode run each kind of operator takes, by ONNX Runtime's own profile."""
    with scratch("pilotlight-profile-") as directory:
        context = PROMPT_TOKENS + num_steps + 1
        session = OnnxSession(artifact, num_streams, context, num_threads, profile_prefix=f"{directory}/profile")
        for slot in range(num_streams):
            session.prefill(slot, np.array(_prompt(slot), np.int64), 0)
        for step in range(num_steps):
            session.decode(np.full(num_streams, 1), np.full(num_streams, PROMPT_TOKENS + step), graph)
        paths = session.end_profiles()
        path = paths[-1] if graph is DecodeGraph.BATCH else paths[0]
        return _shares(json.loads(path.read_text()), num_steps // 2)


def _shares(events: list[dict[str, object]], num_runs: int) -> dict[str, float]:
    """Return the shares of the last ``num_runs`` runs in a profile of ONNX Runtime."""
    runs = [event for event in events if event.get("name") == "model_run"][-num_runs:]
    begun_us = min(int(str(run["ts"])) for run in runs)
    whole_us = sum(int(str(run["dur"])) for run in runs)
    times: Counter[str] = Counter()
    for event in events:
        arguments = event.get("args")
        is_kernel = event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time")
        if is_kernel and isinstance(arguments, dict) and int(str(event["ts"])) >= begun_us:
            times[str(arguments["op_name"])] += int(str(event["dur"]))
    times[BETWEEN_OPERATORS] = max(0, whole_us - times.total())
    return {name: us / whole_us for name, us in times.most_common()}


def prefill_times(session: OnnxSession, chunks: list[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """Return the seconds of a chunk by its size and the tokens behind which it is read."""
    times: dict[tuple[int, int], list[float]] = {chunk: [] for chunk in chunks}
    for _ in _rounds(rounds):
        for (size, past_tokens), found in times.items():
            session.prefill(0, np.array(_prompt(size, size), np.int64), past_tokens)
            found.append(session.run_s)
    return {chunk: statistics.median(found[1:]) for chunk, found in times.items()}


def decode_times(
    session: OnnxSession, batches: tuple[int, ...], contexts: tuple[int, ...], rounds: int
) -> dict[DecodeGraph, dict[tuple[int, int], float]]:
    """Return the seconds of a decode step by graph, rows, and the tokens before each row.

    Every round is of all of them: a processor that is slower for some seconds is so to each alike.
    """
    graphs = [DecodeGraph.MAIN, *([DecodeGraph.BATCH] if session.has_batch_graph else [])]
    cells = [(graph, rows, context) for rows in batches for context in contexts for graph in graphs]
    times: dict[tuple[DecodeGraph, int, int], list[float]] = {cell: [] for cell in cells}
    for _ in _rounds(rounds):
        for (graph, rows, context), seconds in times.items():
            for _ in range(2):  # the first run after another kind finds its weights out of the processor's cache
                session.decode(np.full(rows, 1), np.full(rows, context), graph)
            seconds.append(session.run_s)
    return {
        graph: {(rows, context): statistics.median(times[graph, rows, context][1:])
                for rows in batches for context in contexts}
        for graph in graphs
    }  # fmt: skip


def _now_s() -> float:
    return time.monotonic()


def _rounds(num_rounds: int) -> Iterator[int]:
    """Count a round that warms up and up to so many more, of which there is always one."""
    begun_at = _now_s()
    for number in range(num_rounds + 1):
        if number < 2 or _now_s() - begun_at < ENOUGH_S:
            yield number


def _prompt(seed: int, length: int = PROMPT_TOKENS) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, 400), k=length))
