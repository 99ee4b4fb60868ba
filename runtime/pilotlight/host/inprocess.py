"""A function whose engine runs in this process: on one machine, for one prompt, and on the serverless platforms.

Where a platform keeps a started process as a snapshot, ``prepare`` does what belongs into it: nothing of that holds a
socket, an id, a random number or a device.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pilotlight.artifact import Artifact
from pilotlight.config import FunctionSettings, HostSettings
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession, Session
from pilotlight.function import Function, Observer, Texts, UsageLedger
from pilotlight.host.opening import open_for
from pilotlight.host.sizing import max_context_tokens, num_cores
from pilotlight.metering.price_schedule import PriceSchedule
from pilotlight.metering.record import Capacity


@dataclass(frozen=True, slots=True)
class Prepared:
    """A function whose artifact is verified and whose text side is loaded."""

    name: str
    settings: FunctionSettings
    artifact: Artifact
    prices: PriceSchedule
    texts: Texts
    max_context_tokens: int


def prepare(name: str, settings: FunctionSettings) -> Prepared:
    """Verify an artifact and load its texts.

    Raises:
        ArtifactError: the artifact is damaged.
        ConfigError: a setting does not fit the artifact.
    """
    prices = PriceSchedule.from_config(settings.prices, f"functions.{name}.prices")
    artifact = open_for(name, settings)
    artifact.verify()
    return Prepared(name, settings, artifact, prices, Texts.of(artifact), max_context_tokens(name, settings, artifact))


def open_session(prepared: Prepared, host: HostSettings) -> Session:
    """Load a function's model and allocate its cache, on the processor or on the GPU.

    Raises:
        ArtifactError: the artifact cannot be loaded.
        ConfigError: there is no GPU, or it is too small.
    """
    settings, policy = prepared.settings, Policy.from_settings(prepared.settings)
    num_slots, num_threads = policy.num_slots(settings.num_slots), settings.num_threads or num_cores()
    if settings.provider == "cuda":
        from pilotlight.host.gpu import open_on_gpu

        return open_on_gpu(prepared.name, settings, prepared.artifact, num_slots, prepared.max_context_tokens)
    cache_dir = Path(host.cache_dir).expanduser() if host.cache_dir else None
    return OnnxSession(prepared.artifact, num_slots, prepared.max_context_tokens, num_threads, cache_dir)


def start(
    prepared: Prepared,
    session: Session,
    host: HostSettings,
    ledger: UsageLedger,
    observer: Observer | None = None,
) -> Function:
    """Start a function's engine on the running event loop."""
    settings, policy = prepared.settings, Policy.from_settings(prepared.settings)
    backend = EngineBackend(session, settings.max_queued_requests, policy, Grammars.of(prepared.artifact))
    function = Function(
        prepared.name,
        prepared.artifact,
        backend,
        ledger,
        prepared.prices,
        max_context_tokens=session.max_context_tokens,
        max_duration_s=settings.max_duration_s,
        max_answer_tokens=settings.max_answer_tokens,
        capacity=Capacity(host.capacity),
        observer=observer,
        texts=prepared.texts,
        provider=settings.provider,
    )
    backend.start()
    return function


def open_function(
    name: str, settings: FunctionSettings, host: HostSettings, ledger: UsageLedger, observer: Observer | None = None
) -> Function:
    """Verify an artifact, load it and start its engine on the running event loop.

    Raises:
        ArtifactError: the artifact is damaged or cannot be loaded.
        ConfigError: a setting does not fit the artifact or the machine.
    """
    prepared = prepare(name, settings)
    function = start(prepared, open_session(prepared, host), host, ledger, observer)
    function.started(process_age_ms())
    return function


def process_age_ms() -> float:
    """Return how long ago this process was started, in milliseconds, where the system tells (else 0)."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return 0.0
    return max(0.0, round((uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")) * 1000, 3))
