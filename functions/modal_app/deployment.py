"""What Modal is asked for, from the settings that every other way to serve a function reads, too. Pure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pilotlight.artifact import open_artifact
from pilotlight.config import FunctionSettings, HostSettings, ModalSettings, Settings, load_settings
from pilotlight.errors import ConfigError
from pilotlight.host.shelf import name_of
from pilotlight.tee import TeeLabel, require_hardware

SHELF = "/artifacts"
"""Where containers see the volume."""
MOUNTED_CONFIG = "/etc/pilotlight/pilotlight.toml"
PORT = 8000
NOTICE_S = 30.0
"""How long ahead Modal tells a container that it is preempted."""
CLOSING_S = 8.0
"""What of that is kept back for the records and last frames of streams that cannot finish."""
SCRATCH_LEDGER = "/tmp/pilotlight.db"  # noqa: S108 - a container's own, and nobody else's


@dataclass(frozen=True, slots=True)
class Deployment:
    """One function on Modal. ``digest`` names the artifact that its containers load."""

    name: str
    function: FunctionSettings
    host: HostSettings
    modal: ModalSettings
    digest: str
    config_path: Path

    @property
    def gpu(self) -> list[str] | None:
        """Kinds of GPU, the first one that is free."""
        return list(self.modal.gpu) if self.function.provider == "cuda" else None

    @property
    def gpu_snapshot(self) -> bool:
        return self.modal.memory_snapshot and self.modal.gpu_snapshot and self.gpu is not None

    @property
    def target_concurrency(self) -> int:
        """A container's slots: with more requests than that, another container is worth starting."""
        return self.function.num_slots

    @property
    def max_concurrency(self) -> int:
        """Slots and queue; beyond them Modal answers 429."""
        return self.function.num_slots + self.function.max_queued_requests

    @property
    def max_containers(self) -> int:
        return max(self.function.max_replicas, self.function.min_replicas)

    @property
    def scaledown_window_s(self) -> int:
        """Modal takes 2 seconds to an hour."""
        return min(max(round(self.function.idle_timeout_s), 2), 3600)

    @property
    def drain_timeout_s(self) -> float:
        """How long running streams may go on when the container has to end, within what a preemption leaves."""
        return min(self.host.drain_timeout_s, NOTICE_S - CLOSING_S)

    @property
    def exit_grace_s(self) -> int:
        return math.ceil(self.drain_timeout_s + CLOSING_S)

    @property
    def timeout_s(self) -> int:
        """The longest that an answer outside HTTP may take."""
        return math.ceil(min(self.function.max_duration_s, 86_400 - CLOSING_S) + CLOSING_S)

    @property
    def artifact(self) -> str:
        """The artifact's directory in a container."""
        return f"{SHELF}/{name_of(self.digest)}"

    @property
    def environment(self) -> dict[str, str]:
        """What a container has to know to come to the same deployment."""
        return {"PILOTLIGHT_CONFIG": MOUNTED_CONFIG, "PILOTLIGHT_ARTIFACT": self.artifact}


def load_deployment(environment: Mapping[str, str] = os.environ) -> Deployment:
    """Read PILOTLIGHT_CONFIG, here or in a container, where PILOTLIGHT_ARTIFACT names the artifact.

    Raises:
        ConfigError: there is not one function, or a setting is malformed.
        ArtifactError: the function's artifact is not here.
    """
    path = Path(environment.get("PILOTLIGHT_CONFIG", "pilotlight.toml"))
    settings = load_settings(path, environment)
    require_hardware(settings.confidential.require_tee, TeeLabel.NONE)  # the platform has nothing to prove it with
    if len(settings.functions) != 1:
        raise ConfigError(f"{path}: defines {len(settings.functions)} functions; a Modal app serves one")
    ((name, function),) = settings.functions.items()
    if placed := environment.get("PILOTLIGHT_ARTIFACT"):
        digest = Path(placed).name.replace("-", ":", 1)
    else:
        digest = open_artifact(Path(function.artifact)).digest
        placed = function.artifact
    _check(path, function, settings)
    return Deployment(
        name,
        msgspec.structs.replace(function, artifact=placed),
        _host(settings.host, environment),
        settings.modal,
        digest,
        path,
    )


def _check(path: Path, function: FunctionSettings, settings: Settings) -> None:
    if function.provider == "cuda" and not settings.modal.gpu:
        raise ConfigError(f"{path}: modal.gpu is empty; the provider 'cuda' needs at least one kind of GPU")
    wanted = settings.confidential.encrypted_prompts
    if wanted != "off":
        raise ConfigError(f"{path}: confidential.encrypted_prompts is {wanted!r}; on Modal they are not supported")


def _host(host: HostSettings, environment: Mapping[str, str]) -> HostSettings:
    """Keep to a container's own disk what is not said to lie elsewhere."""
    is_default = host.ledger == HostSettings().ledger and "PILOTLIGHT_LEDGER" not in environment
    return msgspec.structs.replace(host, ledger=SCRATCH_LEDGER) if is_default else host
