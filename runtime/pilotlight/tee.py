"""What a replica says of the trusted execution environment that it runs in, if it does: one word, or its evidence.

Only words and wire types: what earns and what checks them is in ``pilotlight.confidential``.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from pilotlight.errors import ConfigError

TEE_HEADER = "x-pilotlight-tee"


class TeeLabel(StrEnum):
    """How much stands behind it. Only ``HARDWARE`` is a promise about the machine that answers.

    ``NONE``: there is no evidence, or it was refused. ``SIMULATED``: evidence of the simulator, which anybody can make.
    ``VECTOR_VERIFIED``: genuine evidence of a vendor's hardware that does not hold the verifier's nonce, so it may be
    of another machine and another day, or of a machine that is open to a debugger. ``HARDWARE``: genuine, fresh, and
    accepted by a policy.
    """

    NONE = "none"
    SIMULATED = "simulated"
    VECTOR_VERIFIED = "vector-verified"
    HARDWARE = "hardware"


class EvidenceObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evidence on the wire: bytes are base64, ``certificates`` PEM. See ``confidential.appraisal.Evidence``."""

    kind: str
    body: str
    certificates: str = ""
    collateral: dict[str, str] = {}
    devices: tuple[EvidenceObject, ...] = ()


class BindingsObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the evidence is bound to, each 32 bytes in hex; zeros where there is none.

    The raw X25519 key of encrypted requests, the SHA-256 of the TLS certificate's public key (SubjectPublicKeyInfo),
    the raw Ed25519 key that signs receipts, and the SHA-256 of the artifact's manifest.
    """

    hpke_key: str
    tls_key_hash: str
    receipt_key: str
    manifest_digest: str


class Attestation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replica answers to a nonce. ``tee`` is its own word; only the evidence proves anything."""

    tee: TeeLabel
    nonce: str
    bindings: BindingsObject
    evidence: EvidenceObject | None = None


def require_hardware(required: bool, label: TeeLabel) -> None:
    """Let a start go on only where it may.

    Raises:
        ConfigError: hardware is required, and the label is another one.
    """
    if required and label is not TeeLabel.HARDWARE:
        raise ConfigError(
            f"confidential.require_tee is set, and nothing here proves that this is a trusted execution environment: "
            f"the label is {label.value!r}, and 'hardware' is required"
        )
