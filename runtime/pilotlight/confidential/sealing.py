"""Sealing an artifact: encrypt it under a fresh key, wrap the key for its recipients, sign what all may know."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pilotlight.artifact import MANIFEST, Artifact
from pilotlight.confidential.chunks import NUM_KEY_BYTES, NUM_SEAL_ID_BYTES, FileCipher, Layout, commitment
from pilotlight.confidential.recipients import KBS_URI, EncryptAtAws, recipient_of
from pilotlight.confidential.sealed_manifest import (
    CHUNK_BYTES,
    SEALED_SUFFIX,
    SealedFile,
    SealedManifest,
    write_signed,
)
from pilotlight.errors import ArtifactError, ConfigError
from pilotlight.metering.signing import write_private
from pilotlight.scratch import scratch

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class Publisher:
    """Who signs, for whom it is sealed, and where the key goes for recipients that are resources of a key server."""

    signing_key: Ed25519PrivateKey
    recipients: Sequence[str]
    keys_dir: Path | None
    encrypt_at_aws: EncryptAtAws


def seal(artifact: Artifact, target: Path, publisher: Publisher, chunk_bytes: int = CHUNK_BYTES) -> SealedManifest:
    """Seal an artifact into the new directory ``target``, which is there complete or not at all.

    Raises:
        ArtifactError: the artifact was altered, or the directory exists or cannot be written.
        ConfigError: a recipient cannot get the key.
    """
    artifact.verify()
    content_key, seal_id = secrets.token_bytes(NUM_KEY_BYTES), secrets.token_bytes(NUM_SEAL_ID_BYTES)
    recipients = [recipient_of(one, content_key, seal_id, publisher.encrypt_at_aws) for one in publisher.recipients]
    uris = [recipient.id for recipient in recipients if recipient.kind == "kbs"]
    if uris and publisher.keys_dir is None:
        raise ConfigError(f"{uris[0]} needs a directory for the key: --keys DIR, as `pilotlight keyserver` reads it")
    with _appearing(target) as directory:
        files = {}
        for name in (MANIFEST, *artifact.manifest.files):
            layout = Layout((artifact.path / name).stat().st_size, chunk_bytes)
            cipher = FileCipher(content_key, seal_id, artifact.digest, name, layout)
            files[name] = _seal_file(artifact.path / name, directory / f"{name}{SEALED_SUFFIX}", cipher, layout)
        manifest = SealedManifest(
            format_version=1,
            artifact_digest=artifact.digest,
            seal_id=seal_id.hex(),
            key_commitment=commitment(content_key, seal_id).hex(),
            chunk_bytes=chunk_bytes,
            files=files,
            recipients=recipients,
        )
        write_signed(directory, manifest, publisher.signing_key)
        for uri in uris:
            assert publisher.keys_dir is not None
            _keep_key(publisher.keys_dir, uri, content_key)
    return manifest


def _seal_file(source: Path, target: Path, cipher: FileCipher, layout: Layout) -> SealedFile:
    digests = []
    with source.open("rb") as file, target.open("wb") as sealed:
        for index in range(layout.num_chunks):
            chunk = cipher.seal(index, file.read(layout.chunk_bytes))
            digests.append(hashlib.sha256(chunk).hexdigest())
            sealed.write(chunk)
    return SealedFile(layout.size_bytes, digests)


def _keep_key(directory: Path, uri: str, content_key: bytes) -> None:
    match = KBS_URI.fullmatch(uri)
    assert match is not None
    path = directory.joinpath(*match.groups())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, content_key)
    except FileExistsError as error:
        raise ConfigError(f"{path}: there is a key already; choose another tag") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a directory beside ``target`` that becomes it when the block ends without an error."""
    if target.exists():
        raise ArtifactError(target, "exists already")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with scratch(f".{target.name}.seal-", target.absolute().parent) as directory:
            (sealed := directory / "sealed").mkdir()
            yield sealed
            sealed.rename(target)
    except OSError as error:
        raise ArtifactError(Path(error.filename or target), f"cannot be read or written ({error.strerror})") from error
