"""What a replica's evidence is bound to: its keys and its artifact, by the 64 bytes that hardware signs for it.

    REPORT_DATA = SHA-512(label ‖ nonce ‖ HPKE key ‖ SHA-256 of the TLS key ‖ receipt key ‖ manifest digest)

Every part has 32 bytes, so that no two bindings can have the same text. A part that a replica does not have is zero.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

LABEL = b"pilotlight attestation v1\0"
NUM_NONCE_BYTES = 32
NUM_REPORT_DATA_BYTES = 64
NO_PART = bytes(32)


@dataclass(frozen=True, slots=True)
class Bindings:
    """The keys of one replica: raw X25519 key, SHA-256 of the TLS certificate's SubjectPublicKeyInfo, raw Ed25519 key,
    and the SHA-256 of its artifact's manifest."""

    hpke_key: bytes = NO_PART
    tls_key_hash: bytes = NO_PART
    receipt_key: bytes = NO_PART
    manifest_digest: bytes = NO_PART

    def __post_init__(self) -> None:
        for part in (self.hpke_key, self.tls_key_hash, self.receipt_key, self.manifest_digest):
            if len(part) != len(NO_PART):
                raise ValueError(f"every part of a binding has {len(NO_PART)} bytes, and one has {len(part)}")


def report_data(nonce: bytes, bindings: Bindings) -> bytes:
    """Return the 64 bytes for a report; they are also the ``nonce`` to appraise its evidence with."""
    if len(nonce) != NUM_NONCE_BYTES:
        raise ValueError(f"a nonce has {NUM_NONCE_BYTES} bytes, and this one {len(nonce)}")
    parts = (bindings.hpke_key, bindings.tls_key_hash, bindings.receipt_key, bindings.manifest_digest)
    return hashlib.sha512(b"".join((LABEL, nonce, *parts))).digest()


def device_nonce(nonce: bytes) -> bytes:
    """Return the 32-byte nonce of the GPUs beside a report, which makes one composite of them."""
    return hashlib.sha256(nonce).digest()
