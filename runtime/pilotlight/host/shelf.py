"""A directory of artifacts by their digests: what lies on it was verified when it was put there."""

from __future__ import annotations

import shutil
from pathlib import Path

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.errors import ArtifactError

INCOMING = "incoming"


def name_of(digest: str) -> str:
    """Return the name of an artifact's directory."""
    return digest.replace(":", "-")


def place(shelf: Path, digest: str) -> Artifact:
    """Verify the artifact of that digest in the shelf's ``incoming``, and put it on the shelf. Once is enough.

    Raises:
        ArtifactError: it is not there, is another one, or is damaged.
    """
    target, source = shelf / name_of(digest), shelf / INCOMING / name_of(digest)
    if target.exists():
        shutil.rmtree(source, ignore_errors=True)
        return _verified(target, digest)
    found = _verified(source, digest)
    source.rename(target)
    return Artifact(target, found.manifest, found.digest)


def _verified(path: Path, digest: str) -> Artifact:
    artifact = open_artifact(path)
    if artifact.digest != digest:
        raise ArtifactError(path, f"is {artifact.digest} and not {digest}")
    artifact.verify()
    return artifact
