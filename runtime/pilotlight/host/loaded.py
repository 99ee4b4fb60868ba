"""An engine of a function in this process, for a replica that is not forked: on a cluster's node."""

from __future__ import annotations

import time
from pathlib import Path

from pilotlight.artifact import open_artifact
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.session import OnnxSession
from pilotlight.host.wire import ReplicaSpec, Stages

MAX_QUEUED_REQUESTS = 1_000_000
"""Whoever routes to a replica bounds what waits in it."""


class Loaded:
    """One function's engine in this process."""

    def __init__(self, spec: ReplicaSpec) -> None:
        """Verify and load an artifact.

        Raises:
            ArtifactError: the artifact is damaged or cannot be loaded.
        """
        begun_at = time.monotonic()
        artifact = open_artifact(Path(spec.artifact))
        artifact.verify()
        mapped_at = time.monotonic()
        cache_dir = Path(spec.cache_dir) if spec.cache_dir else None
        session = OnnxSession(artifact, spec.num_slots, spec.max_context_tokens, spec.num_threads, cache_dir)
        self.backend = EngineBackend(session, max_queued_requests=MAX_QUEUED_REQUESTS, policy=spec.policy,
                                     grammars=Grammars.of(artifact))  # fmt: skip
        loaded_at = time.monotonic()
        self.start_s = loaded_at - begun_at
        self.stages = Stages("ray", 0.0, (mapped_at - begun_at) * 1000, (loaded_at - mapped_at) * 1000, 0.0)

    def start(self) -> None:
        """Start the engine, which answers on the running event loop."""
        self.backend.start()

    async def close(self) -> None:
        """End what runs, which goes on elsewhere."""
        await self.backend.close()
