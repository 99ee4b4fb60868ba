"""``sealed.json``: what anybody may know of a sealed artifact, signed by its publisher.

The signature lies beside it in ``sealed.json.sig`` (64 bytes, Ed25519, over ``SIGNED_CONTEXT`` and the file). It covers
the SHA-256 of every encrypted chunk and the commitment to the key, and so everything that the chunks decrypt to.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from pilotlight.artifact import FILE_NAME, MANIFEST, SEALED_MANIFEST
from pilotlight.confidential.chunks import MAX_CHUNKS, Layout
from pilotlight.errors import ArtifactError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = f"{SEALED_MANIFEST}.sig"
SIGNED_CONTEXT = b"pilotlight sealed artifact v1\0"
SEALED_SUFFIX = ".sealed"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
CHUNK_BYTES = 4 * 1024 * 1024

Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
ChunkBytes = Annotated[int, Meta(ge=16, le=64 * 1024 * 1024)]


class SealedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The size of a file as it was, and the SHA-256 of each of its chunks as they lie on the disk."""

    size_bytes: Annotated[int, Meta(ge=0, le=2**50)]
    chunks: list[Hex32]


class Recipient(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who can get the content key, and how.

    ``x25519`` and ``rsa``: ``wrapped`` is the key for the holder of the private key named ``id``. ``kbs``: it is the
    resource ``id`` of a key server. ``azure``: ``wrapped`` is for the RSA key in a vault whose URL is ``id``. ``aws``:
    it is what AWS KMS encrypted under the key ``id``.
    """

    kind: Literal["x25519", "rsa", "kbs", "azure", "aws"]
    id: str
    wrapped: str = ""


class SealedManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``artifact_digest`` is that of the ``manifest.json`` inside."""

    format_version: Literal[1]
    artifact_digest: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
    seal_id: Hex32
    key_commitment: Hex32
    chunk_bytes: ChunkBytes
    files: dict[str, SealedFile]
    recipients: list[Recipient]

    def layout(self, name: str) -> Layout:
        return Layout(self.files[name].size_bytes, self.chunk_bytes)

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


def decode_sealed_manifest(raw: bytes, path: Path) -> SealedManifest:
    """Parse the bytes of a ``sealed.json``; ``path`` is only named in errors.

    Raises:
        ArtifactError: it is none, or lists what cannot be.
    """
    try:
        manifest = msgspec.json.decode(raw, type=SealedManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(path, f"is not a sealed manifest ({error})") from error
    if MANIFEST not in manifest.files:
        raise ArtifactError(path, f"does not list {MANIFEST}")
    for name, file in manifest.files.items():
        if not FILE_NAME.fullmatch(name):
            raise ArtifactError(path, f"lists {name!r}, which is not a plain file name")
        if len(file.chunks) != manifest.layout(name).num_chunks or len(file.chunks) > MAX_CHUNKS:
            raise ArtifactError(path, f"lists {len(file.chunks)} chunks of {name}, which is not its size")
    return manifest


def write_signed(directory: Path, manifest: SealedManifest, key: Ed25519PrivateKey) -> None:
    raw = manifest.encode()
    (directory / SEALED_MANIFEST).write_bytes(raw)
    (directory / SIGNATURE).write_bytes(key.sign(SIGNED_CONTEXT + raw))


def read_raw(directory: Path) -> bytes:
    """Return the bytes of a ``sealed.json``, which nothing says to be genuine.

    Raises:
        ArtifactError: it is missing, cannot be read, or is far too large.
    """
    path = directory / SEALED_MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactError(path, f"has more than {MAX_MANIFEST_BYTES:,} bytes")
    return raw


def read_signed(directory: Path, publisher: Ed25519PublicKey) -> bytes:
    """Return the bytes of a ``sealed.json`` that the publisher signed.

    Raises:
        ArtifactError: it or its signature is missing, altered, or of another publisher.
    """
    from cryptography.exceptions import InvalidSignature

    raw = read_raw(directory)
    path = directory / SIGNATURE
    try:
        publisher.verify(path.read_bytes(), SIGNED_CONTEXT + raw)
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
    except InvalidSignature as error:
        raise ArtifactError(directory / SEALED_MANIFEST, "was altered, or signed by another publisher") from error
    return raw


def digest_of(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"
