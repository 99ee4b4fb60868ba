"""One file as a sequence of encrypted chunks: none can be altered, left out, moved, or taken from another file.

A file has a key of its own, from the artifact's content key and the file's name. Chunk i is AES-256-GCM under the nonce
``0⁷ ‖ i (4 bytes) ‖ is_last (1 byte)``, and is bound to artifact, file, size and place by its associated data. AES-GCM
does not commit to a key, so the artifact does: see ``commitment``.

Source: Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance"
(STREAM); RFC 5869.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NUM_KEY_BYTES = 32
NUM_SEAL_ID_BYTES = 32
NUM_TAG_BYTES = 16
MAX_CHUNKS = 2**32 - 1


class AlteredChunk(ValueError):
    """A chunk is not what was sealed here."""


def commitment(content_key: bytes, seal_id: bytes) -> bytes:
    """Return 32 bytes that name a key without telling it; two keys have never the same."""
    return _derive(content_key, seal_id, b"pilotlight sealed key commitment v1")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file of ``size_bytes`` is cut. An empty file is one empty chunk."""

    size_bytes: int
    chunk_bytes: int

    @property
    def num_chunks(self) -> int:
        return max(1, -(-self.size_bytes // self.chunk_bytes))

    @property
    def sealed_bytes(self) -> int:
        return self.size_bytes + NUM_TAG_BYTES * self.num_chunks

    def place(self, index: int) -> tuple[int, int]:
        """Return where a chunk's text begins and ends."""
        start = index * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.size_bytes)

    def sealed_place(self, index: int) -> tuple[int, int]:
        """Return where a sealed chunk begins and ends."""
        start, end = self.place(index)
        return start + NUM_TAG_BYTES * index, end + NUM_TAG_BYTES * (index + 1)


class FileCipher:
    """Seals and opens the chunks of one file."""

    def __init__(self, content_key: bytes, seal_id: bytes, artifact_digest: str, name: str, layout: Layout) -> None:
        self._cipher = AESGCM(_derive(content_key, seal_id, b"pilotlight sealed file v1\0" + name.encode()))
        of_file = hashlib.sha256(f"{artifact_digest}\0{name}".encode()).digest()
        self._context = b"pilotlight sealed chunk v1\0" + seal_id + of_file
        self._layout = layout

    def seal(self, index: int, text: bytes) -> bytes:
        return self._cipher.encrypt(self._nonce(index), text, self._bound_to(index))

    def open_into(self, index: int, sealed: bytes | memoryview, target: memoryview) -> None:
        """Write the text of a chunk to ``target``, which has exactly its size.

        Raises:
            AlteredChunk: it is not what was sealed as this chunk of this file.
        """
        try:
            self._cipher.decrypt_into(self._nonce(index), sealed, self._bound_to(index), target)
        except (InvalidTag, ValueError) as error:
            raise AlteredChunk from error

    def _nonce(self, index: int) -> bytes:
        return struct.pack(">7xI?", index, index == self._layout.num_chunks - 1)

    def _bound_to(self, index: int) -> bytes:
        return self._context + struct.pack(">QQQ", self._layout.size_bytes, self._layout.chunk_bytes, index)


def _derive(content_key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), NUM_KEY_BYTES, salt, info).derive(content_key)
