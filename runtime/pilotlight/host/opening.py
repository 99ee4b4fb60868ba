"""Opening the artifact of a function: from its directory, or with a key where it is sealed."""

from __future__ import annotations

from pathlib import Path

from pilotlight.artifact import Artifact, Grant, open_artifact
from pilotlight.config import NOT_CONFIDENTIAL, ConfidentialSettings, FunctionSettings


def open_for(name: str, settings: FunctionSettings, confidential: ConfidentialSettings = NOT_CONFIDENTIAL) -> Artifact:
    """Open a function's artifact; where it is sealed, its key is asked for.

    Raises:
        ArtifactError: it is damaged, or sealed with another key or by another publisher.
        ConfigError: the settings do not say where the key comes from, or the extra is not installed.
        KeyNotReleased: whoever has the key does not give it.
    """
    path = Path(settings.artifact)
    if not settings.unseal:
        return open_artifact(path)
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.confidential.key_release import Unsealing
    from pilotlight.confidential.locked_memory import harden_process

    harden_process()
    return Unsealing.parse(settings.unseal, f"functions.{name}.unseal", confidential).open(path)


def reopen_artifact(path: Path, grant: Grant | None) -> Artifact:
    """Open an artifact once more, in a replica.

    Raises:
        ArtifactError: it is damaged, or not the one that the host has opened.
    """
    if grant is None:
        return open_artifact(path)
    from pilotlight.confidential.locked_memory import harden_process
    from pilotlight.confidential.sealed_contents import open_sealed

    harden_process()
    return open_sealed(path, grant)
