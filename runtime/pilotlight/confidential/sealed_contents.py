"""Opening a sealed artifact: its files in memory, checked chunk by chunk, and never on a disk."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pilotlight.artifact import MANIFEST, Artifact, Grant, decode_manifest
from pilotlight.confidential.chunks import NUM_KEY_BYTES, AlteredChunk, FileCipher, Layout, commitment
from pilotlight.confidential.locked_memory import allocate
from pilotlight.confidential.sealed_manifest import (
    SEALED_SUFFIX,
    SealedManifest,
    decode_sealed_manifest,
    digest_of,
    read_raw,
)
from pilotlight.errors import ArtifactError

MAX_THREADS = 4


class SealedContents:
    """The files of a sealed artifact, for whoever has its key."""

    def __init__(self, path: Path, manifest: SealedManifest, grant: Grant) -> None:
        """Begin to read.

        Raises:
            ArtifactError: the key is another one's.
        """
        seal_id = bytes.fromhex(manifest.seal_id)
        found = commitment(grant.key, seal_id) if len(grant.key) == NUM_KEY_BYTES else b""
        if not hmac.compare_digest(found, bytes.fromhex(manifest.key_commitment)):
            raise ArtifactError(path, "is sealed with another key")
        self.grant = grant
        self.read_s = 0.0
        self._path = path
        self._manifest = manifest
        self._seal_id = seal_id

    def read(self, name: str) -> memoryview:
        """Return a file's bytes in locked memory.

        Raises:
            ArtifactError: it is missing, or was truncated or altered.
            ConfigError: the memory cannot be locked where it has to be.
        """
        begun_at = time.monotonic()
        path, layout = check_size(self._path, self._manifest, name)
        target = allocate(layout.size_bytes)
        cipher = FileCipher(self.grant.key, self._seal_id, self._manifest.artifact_digest, name, layout)
        descriptor = _open(path)
        try:

            def open_chunk(index: int) -> None:
                start, end = layout.place(index)
                try:
                    cipher.open_into(index, _chunk(descriptor, *layout.sealed_place(index)), target[start:end])
                except (AlteredChunk, OSError) as error:
                    raise ArtifactError(path, f"was altered: chunk {index} is not the one that was sealed") from error

            _for_each(layout.num_chunks, open_chunk)
        finally:
            os.close(descriptor)
            self.read_s += time.monotonic() - begun_at
        return target

    def verify(self, name: str) -> None:
        verify_file(self._path, self._manifest, name)


def verify_chunks(directory: Path, manifest: SealedManifest) -> None:
    """Compare everything that is sealed with its checksums; no key is needed.

    Raises:
        ArtifactError: a file is missing, or was truncated or altered.
    """
    for name in manifest.files:
        verify_file(directory, manifest, name)


def verify_file(directory: Path, manifest: SealedManifest, name: str) -> None:
    """Compare the chunks of one file with the checksums that the publisher signed.

    Raises:
        ArtifactError: it is missing, or was truncated or altered.
    """
    path, layout = check_size(directory, manifest, name)
    expected = manifest.files[name].chunks
    descriptor = _open(path)
    try:

        def compare(index: int) -> None:
            found = hashlib.sha256(_chunk(descriptor, *layout.sealed_place(index))).hexdigest()
            if found != expected[index]:
                raise ArtifactError(path, f"was altered: the sha256 of chunk {index} is not the one in the manifest")

        _for_each(layout.num_chunks, compare)
    finally:
        os.close(descriptor)


def check_size(directory: Path, manifest: SealedManifest, name: str) -> tuple[Path, Layout]:
    """Return where a sealed file lies and how it is cut.

    Raises:
        ArtifactError: it is not sealed here, missing, truncated or too long.
    """
    path = directory / f"{name}{SEALED_SUFFIX}"
    if name not in manifest.files:
        raise ArtifactError(path, "is not listed in the sealed manifest")
    layout = manifest.layout(name)
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error
    if found != layout.sealed_bytes:
        problem = "is truncated" if found < layout.sealed_bytes else "is too long"
        raise ArtifactError(path, f"{problem}: {found:,} bytes instead of {layout.sealed_bytes:,}")
    return path, layout


def open_sealed(path: Path, grant: Grant) -> Artifact:
    """Open the artifact in a directory, whose sealed manifest has to be the one that was found genuine.

    Raises:
        ArtifactError: anything is missing, altered, of another artifact, or sealed with another key.
        ConfigError: memory cannot be locked where it has to be.
    """
    raw = read_raw(path)
    if digest_of(raw) != grant.sealed_digest:
        raise ArtifactError(path, "is not the sealed artifact that was found genuine")
    sealed = decode_sealed_manifest(raw, path)
    contents = SealedContents(path, sealed, grant)
    inner = bytes(contents.read(MANIFEST))
    if digest_of(inner) != sealed.artifact_digest:
        raise ArtifactError(path, "holds another artifact than its sealed manifest says")
    manifest = decode_manifest(inner, path / MANIFEST)
    sizes = {name: file.size_bytes for name, file in sealed.files.items() if name != MANIFEST}
    if sizes != {name: file.size_bytes for name, file in manifest.files.items()}:
        raise ArtifactError(path, "does not seal the files that its manifest lists")
    return Artifact(path, manifest, sealed.artifact_digest, contents)


def _for_each(num_chunks: int, act: Callable[[int], None]) -> None:
    """Do something with every chunk, several at a time: hashing and decrypting leave the interpreter to others."""
    if num_chunks == 1:
        act(0)
        return
    with ThreadPoolExecutor(min(MAX_THREADS, num_chunks, os.cpu_count() or 1), "pilotlight-unseal") as pool:
        for _ in pool.map(act, range(num_chunks)):
            pass


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ArtifactError(path, f"cannot be read ({error.strerror})") from error


def _chunk(descriptor: int, start: int, end: int) -> bytes:
    """Return the bytes from ``start`` to ``end``, or fewer where the file has got shorter."""
    found = os.pread(descriptor, end - start, start)
    while len(found) < end - start and (more := os.pread(descriptor, end - start - len(found), start + len(found))):
        found += more
    return found
