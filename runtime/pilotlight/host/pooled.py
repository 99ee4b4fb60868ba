"""A function whose engine runs in replicas: nothing of it is loaded before it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pilotlight.api.metrics import Metrics
from pilotlight.artifact import Artifact
from pilotlight.config import NOT_CONFIDENTIAL, ConfidentialSettings, FunctionSettings, HostSettings
from pilotlight.engine.policy import Policy as EnginePolicy
from pilotlight.errors import ConfigError
from pilotlight.function import Function, UsageLedger
from pilotlight.host.autoscaler import Policy
from pilotlight.host.link import Launcher
from pilotlight.host.machine import Machine
from pilotlight.host.opening import open_for
from pilotlight.host.pool import Pool
from pilotlight.host.pool_settings import PoolSettings
from pilotlight.host.sizing import kv_bytes, max_context_tokens, num_cores, weights_bytes
from pilotlight.host.verified import Verified
from pilotlight.host.wire import ReplicaSpec
from pilotlight.metering.price_schedule import PriceSchedule
from pilotlight.metering.record import Capacity
from pilotlight.tee import TeeLabel


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all functions of a host share."""

    host: HostSettings
    ledger: UsageLedger
    metrics: Metrics
    launcher: Launcher
    machine: Machine
    verified: Verified
    tee: TeeLabel = TeeLabel.NONE
    confidential: ConfidentialSettings = NOT_CONFIDENTIAL


def open_pooled(name: str, settings: FunctionSettings, around: Surroundings) -> tuple[Function, Pool]:
    """Verify an artifact and load its text side; its replicas start when they are needed.

    Raises:
        ArtifactError: the artifact is damaged.
        ConfigError: a setting does not fit the artifact.
    """
    if settings.provider != "cpu":
        raise ConfigError(
            f"functions.{name}.provider is {settings.provider!r}; replicas run on processors (GPUs: docs/modal.md)"
        )
    prices = PriceSchedule.from_config(settings.prices, f"functions.{name}.prices")
    artifact = open_for(name, settings, around.confidential)
    around.verified.verify(artifact)
    context = max_context_tokens(name, settings, artifact)
    pool = Pool(_pool_settings(name, settings, around.host, artifact, context), around.launcher, around.machine,
                around.metrics)  # fmt: skip
    function = Function(
        name,
        artifact,
        pool,
        around.ledger,
        prices,
        max_context_tokens=context,
        max_duration_s=settings.max_duration_s,
        max_answer_tokens=settings.max_answer_tokens,
        capacity=Capacity(around.host.capacity),
        tee=around.tee,
        observer=around.metrics,
    )
    return function, pool


def cache_dir(host: HostSettings) -> Path | None:
    """Return where things are kept from one start to the next, if anywhere."""
    return Path(host.cache_dir).expanduser() if host.cache_dir else None


def replica_spec(
    name: str, settings: FunctionSettings, host: HostSettings, artifact: Artifact, context: int
) -> ReplicaSpec:
    """Return what a function's replicas are made from."""
    directory = cache_dir(host)
    policy = EnginePolicy.from_settings(settings)
    return ReplicaSpec(
        replica_id=name,
        artifact=str(artifact.path.resolve()),
        num_slots=policy.num_slots(settings.num_slots),
        max_context_tokens=context,
        policy=policy,
        num_threads=settings.num_threads or num_cores(),
        cache_dir=str(directory) if directory is not None else None,
        asked_at=0.0,
        grant=artifact.grant,
    )


def _pool_settings(
    name: str, settings: FunctionSettings, host: HostSettings, artifact: Artifact, context: int
) -> PoolSettings:
    spec = replica_spec(name, settings, host, artifact, context)
    return PoolSettings(
        name=name,
        spec=spec,
        policy=Policy.from_settings(settings, spec.num_slots),
        weights_bytes=weights_bytes(artifact),
        kv_bytes=kv_bytes(artifact, spec.num_slots, context),
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        hang_ticks=max(1, round(host.hang_timeout_s)),
    )
