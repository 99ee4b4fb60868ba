"""A function whose engine runs in this process: on one machine, for one prompt, and on the serverless platforms."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pilotlight.config import FunctionSettings, HostSettings
from pilotlight.engine.backend import EngineBackend
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.function import Function, Observer, UsageLedger
from pilotlight.host.opening import open_for
from pilotlight.host.sizing import max_context_tokens, num_cores
from pilotlight.metering.price_schedule import PriceSchedule
from pilotlight.metering.record import Capacity


def open_function(
    name: str, settings: FunctionSettings, host: HostSettings, ledger: UsageLedger, observer: Observer | None = None
) -> Function:
    """Verify an artifact, load it and start its engine on the running event loop.

    Raises:
        ArtifactError: the artifact is damaged or cannot be loaded.
        ConfigError: a setting does not fit the artifact.
    """
    prices = PriceSchedule.from_config(settings.prices, f"functions.{name}.prices")
    artifact = open_for(name, settings)
    artifact.verify()
    context = max_context_tokens(name, settings, artifact)
    num_threads = settings.num_threads or num_cores()
    cache_dir = Path(host.cache_dir).expanduser() if host.cache_dir else None
    policy = Policy.from_settings(settings)
    session = OnnxSession(artifact, policy.num_slots(settings.num_slots), context, num_threads, cache_dir)
    backend = EngineBackend(session, settings.max_queued_requests, policy, Grammars.of(artifact))
    function = Function(
        name,
        artifact,
        backend,
        ledger,
        prices,
        max_context_tokens=context,
        max_duration_s=settings.max_duration_s,
        capacity=Capacity(host.capacity),
        observer=observer,
    )
    backend.start()
    function.started(_process_age_ms())
    return function


def _process_age_ms() -> float:
    """Return how long ago this process was started, in milliseconds, where the system tells (else 0)."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return 0.0
    return max(0.0, round((uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")) * 1000, 3))
