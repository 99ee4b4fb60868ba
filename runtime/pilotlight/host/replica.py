"""A replica: one artifact, one engine, one wire to the host. Ends when the host closes the wire, or asks for it.

It starts lean: one graph and one thread, which is sooner ready than everything. After the first token it builds the
rest in the background, on the same KV cache, and the engine moves over between two steps. A template is a process that
stops where a replica would begin to serve: replicas forked from it inherit its session. That works because a session of
one thread has no threads that a fork could lose.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pilotlight.artifact import GRAPH, PREFILL_GRAPH, Artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.heap import return_freed_memory
from pilotlight.engine.session import ALL_GRAPHS, OnnxSession, quickest_graphs
from pilotlight.errors import PilotlightError
from pilotlight.host.opening import reopen_artifact
from pilotlight.host.wire import Abort, Beat, BlockingWire, Close, Failed, ReplicaSpec, Stages, Started, Step, Submit

BEAT_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Loaded:
    """A lean session, what it is of, and how long each stage of its making took."""

    artifact: Artifact
    session: OnnxSession
    map_ms: float
    unseal_ms: float
    session_ms: float

    def stages(self, origin: str, fork_ms: float, warm_up_ms: float) -> Stages:
        return Stages(origin, fork_ms, self.map_ms, self.session_ms, warm_up_ms, self.unseal_ms)


def load(spec: ReplicaSpec, *, for_long: bool) -> Loaded:
    """Open an artifact, whose checksums the host has compared, and a lean session: the one that is ready soonest, or
    with ``for_long`` the one that answers soonest when it is there already.

    Raises:
        ArtifactError: the artifact is damaged or cannot be loaded.
    """
    begun_at = time.monotonic()
    artifact = reopen_artifact(Path(spec.artifact), spec.grant)
    mapped_at = time.monotonic()
    of_map_ms = _unseal_ms(artifact)
    # Where a request's tokens must not depend on what ran before it, they must not depend on the graph either.
    graphs = ALL_GRAPHS if spec.policy.deterministic else quickest_graphs(artifact.manifest)
    # The main graph's kernels take ten times as long where nothing laid out their weights; the others' do not.
    session = OnnxSession(
        artifact,
        spec.num_slots,
        spec.max_context_tokens,
        1,
        _cache_dir(spec),
        graphs=graphs,
        prepacks=for_long or GRAPH in graphs,
    )
    unseal_ms = _unseal_ms(artifact)
    map_ms = _ms(mapped_at - begun_at) - of_map_ms
    session_ms = _ms(time.monotonic() - mapped_at) - (unseal_ms - of_map_ms)
    return Loaded(artifact, session, round(map_ms, 3), unseal_ms, round(session_ms, 3))


def grow(spec: ReplicaSpec, loaded: Loaded) -> OnnxSession | None:
    """Return a session of all graphs and threads on the same cache, or None where the lean one is all there is.

    Raises:
        ArtifactError: a graph cannot be loaded.
    """
    if spec.num_threads == 1 and PREFILL_GRAPH not in loaded.artifact.manifest.files:
        return None
    slots, context = spec.num_slots, spec.max_context_tokens
    return OnnxSession(loaded.artifact, slots, context, spec.num_threads, _cache_dir(spec), beside=loaded.session)


def run(spec: ReplicaSpec, connection: socket.socket) -> None:
    """Serve one artifact until the host is gone or says that it is over."""
    fork_ms = _ms(time.monotonic() - spec.asked_at)
    wire = BlockingWire(connection)
    try:
        loaded = load(spec, for_long=False)
        warm_up_ms = warm_up(loaded.session) if spec.num_warm_up_tokens else 0.0
    except (PilotlightError, MemoryError) as error:
        wire.send(Failed(problem_of(spec, error)))
        return
    _serve(wire, loaded, spec, loaded.stages("zygote", fork_ms, warm_up_ms))


def run_from_template(spec: ReplicaSpec, connection: socket.socket, loaded: Loaded) -> None:
    """Serve on a session that was inherited."""
    fork_ms = _ms(time.monotonic() - spec.asked_at)
    _serve(BlockingWire(connection), loaded, spec, Stages("template", fork_ms))


def warm_up(session: OnnxSession) -> float:
    """Compute two tokens that nobody asked for, so that everything which is made at the first run is there."""
    begun_at = time.monotonic()
    session.prefill(0, np.zeros(2, np.int64), 0)
    session.decode(np.zeros(1, np.int64), np.full(1, 2, np.int64))
    return _ms(time.monotonic() - begun_at)


def problem_of(spec: ReplicaSpec, error: Exception) -> str:
    """Say what went wrong, for clients too: they need not know where artifacts lie."""
    return str(error).replace(f"{spec.artifact}/", "") or "there is not enough memory"


def _serve(wire: BlockingWire, loaded: Loaded, spec: ReplicaSpec, stages: Stages) -> None:
    """Report the start, then carry messages to the engine, and its events back."""
    threading.excepthook = _end_process
    outbox = _Outbox(wire, loaded, spec)
    engine = outbox.engine
    engine.start()
    wire.send(Started(os.getpid(), stages))
    if spec.num_warm_up_tokens:
        outbox.grow_in_background()
    while (messages := wire.receive(BEAT_INTERVAL_S)) is not None:
        for message in messages:
            if isinstance(message, Submit):
                engine.submit(message.sequence)
            elif isinstance(message, Abort):
                engine.abort(message.sequence_id)
            elif isinstance(message, Close):
                return  # and so ends the process; what ran was ended before
        outbox.beat()


class _Outbox:
    """The engine's events on their way to the host."""

    def __init__(self, wire: BlockingWire, loaded: Loaded, spec: ReplicaSpec) -> None:
        self.engine = Engine(loaded.session, self._emit, spec.policy, Grammars.of(loaded.artifact))
        self.engine.note_prefixes()
        self._wire = wire
        self._lean: Loaded | None = loaded
        self._spec = spec
        self._num_steps = 0
        self._next_beat_at = 0.0

    def beat(self) -> None:
        """Give a sign of life, if the last one is old enough."""
        now = time.monotonic()
        if now >= self._next_beat_at:
            self._next_beat_at = now + BEAT_INTERVAL_S / 2
            self._wire.send(Beat(self._num_steps, self.engine.signals()))

    def grow_in_background(self) -> None:
        """Build the whole session beside the lean one."""
        if self._lean is not None:
            lean, self._lean = self._lean, None
            threading.Thread(target=self._grow, args=(lean,), name="pilotlight-grow", daemon=True).start()

    def _grow(self, lean: Loaded) -> None:
        if (session := grow(self._spec, lean)) is not None:
            self.engine.replace_session(session)
            del lean
            return_freed_memory()

    def _emit(self, events: list[Event]) -> None:
        """Runs on the engine's thread, once a step, also where a step has no events."""
        self._num_steps += 1
        if events:
            self._wire.send(Step(events, self.engine.signals(), self.engine.take_prefix_changes()))
            self.grow_in_background()


def _cache_dir(spec: ReplicaSpec) -> Path | None:
    return Path(spec.cache_dir) if spec.cache_dir else None


def _end_process(args: object) -> None:
    """A replica whose engine died is no replica; the host sees its end and moves its sequences."""
    os._exit(70)


def _unseal_ms(artifact: Artifact) -> float:
    """Return how long decrypting has taken so far."""
    return 0.0 if artifact.contents is None else _ms(artifact.contents.read_s)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
