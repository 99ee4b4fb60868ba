"""This project's engine without its host: asked in its own process, as the libraries beside it are.

python pilotlight_worker.py     answer lines (line_protocol.py)
"""

from __future__ import annotations

import itertools
import queue
import time
from pathlib import Path

from line_protocol import Load, TokenIds, serve

from pilotlight.artifact import open_artifact
from pilotlight.config import FunctionSettings
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.request import SamplingParams, Sequence

PACKAGES = ("pilotlight", "onnxruntime")
ANSWER_TIMEOUT_S = 300
SETTINGS = FunctionSettings(artifact="", prefix_cache_mb=0, speculation="off")


class PilotlightGenerator:
    """An engine as a replica has it, prompt cache and drafts off."""

    def __init__(self, load: Load) -> None:
        cache_dir = Path(load.options["cache_dir"])
        artifact = open_artifact(load.model)
        session = OnnxSession(artifact, load.num_slots, load.max_context_tokens, load.num_threads, cache_dir)
        self._steps: queue.SimpleQueue[tuple[float, list[Event]]] = queue.SimpleQueue()
        self._engine = Engine(session, self._emit, Policy.from_settings(SETTINGS))
        self._engine.start()
        self._names = map(str, itertools.count())

    def _emit(self, events: list[Event]) -> None:
        self._steps.put((time.monotonic(), events))

    def generate(self, prompts: list[TokenIds], num_tokens: int) -> list[list[float]]:
        times: dict[str, list[float]] = {}
        for name, prompt in zip(self._names, prompts, strict=False):
            times[name] = []
            self._engine.submit(Sequence(name, tuple(prompt), num_tokens, sampling=SamplingParams(temperature=0.0)))
        num_ended = 0
        while num_ended < len(prompts):
            at, events = self._steps.get(timeout=ANSWER_TIMEOUT_S)
            for name, event in events:
                times[name].append(at)
                num_ended += event.finish is not None
        return list(times.values())


if __name__ == "__main__":
    serve(PilotlightGenerator, PACKAGES)
