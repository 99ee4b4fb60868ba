"""A function's session on an NVIDIA GPU: sized from the memory that is free, and seen by metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pilotlight.api.metrics import HbmUse, Metrics
from pilotlight.artifact import Artifact
from pilotlight.config import FunctionSettings
from pilotlight.engine.device import Device, DeviceSession, Kind
from pilotlight.engine.hbm import Demand, HbmPlan, plan_hbm
from pilotlight.engine.nvml import Gpu
from pilotlight.engine.session import Session
from pilotlight.errors import ConfigError
from pilotlight.function import Function
from pilotlight.request import Signals

KIND: Kind = "cuda"


@dataclass(frozen=True, slots=True)
class Sized:
    """A GPU and what of its memory a session takes."""

    gpu: Gpu
    plan: HbmPlan

    def use(self, signals: Signals) -> HbmUse:
        """Return how the GPU's memory is used now."""
        reading = self.gpu.read()
        return HbmUse(
            used_bytes=reading.used_bytes,
            total_bytes=reading.total_bytes,
            weights_bytes=self.plan.weights_bytes,
            kv_reserved_bytes=self.plan.kv_bytes,
            kv_used_bytes=signals.kv_used_bytes,
            workspace_bytes=self.plan.workspace_bytes,
        )


class GpuSession(DeviceSession):
    """A session on the first GPU that this process may see."""

    def __init__(self, artifact: Artifact, sized: Sized, num_threads: int) -> None:
        self.sized = sized
        plan = sized.plan
        device = Device(KIND, 0, plan.arena_bytes, num_threads)
        super().__init__(artifact, plan.num_slots, plan.max_context_tokens, device)


def open_on_gpu(
    name: str, settings: FunctionSettings, artifact: Artifact, num_slots: int, max_context_tokens: int
) -> GpuSession:
    """Load an artifact onto the GPU, with as many slots and as much context as fit.

    Raises:
        ArtifactError: the artifact is not made for a GPU.
        ConfigError: there is no GPU, or it is too small.
    """
    sized = size(name, settings, artifact, num_slots, max_context_tokens, lambda: Gpu())
    return GpuSession(artifact, sized, settings.num_threads or 1)


def size(
    name: str,
    settings: FunctionSettings,
    artifact: Artifact,
    num_slots: int,
    max_context_tokens: int,
    find_gpu: Callable[[], Gpu],
) -> Sized:
    """Share out the GPU's free memory.

    Raises:
        ConfigError: there is no GPU, or it is too small.
    """
    try:
        gpu = find_gpu()
    except LookupError as error:
        raise ConfigError(f"functions.{name}.provider is 'cuda', but {error}") from error
    free_bytes = gpu.read().free_bytes
    if settings.hbm_budget_mb:
        free_bytes = min(free_bytes, settings.hbm_budget_mb * 1_000_000)
    is_fixed = settings.max_context_tokens is not None
    return Sized(
        gpu, plan_hbm(free_bytes, artifact, Demand(num_slots, max_context_tokens, settings.max_chunk_tokens, is_fixed))
    )


def watch(metrics: Metrics, function: Function, session: Session) -> None:
    """Have metrics show the memory of a function's GPU."""
    assert isinstance(session, GpuSession)
    sized = session.sized
    metrics.watch_hbm(function.name, lambda: sized.use(function.backend.signals()))
