"""The other side of ``GET /attestation``: what a client learns from an answer."""

from __future__ import annotations

from datetime import datetime

import msgspec

from pilotlight.confidential.appraisal import (
    MAX_EVIDENCE_BYTES,
    Appraisal,
    MalformedEvidence,
    Policy,
    Roots,
    from_wire,
)
from pilotlight.confidential.binding import Bindings, report_data
from pilotlight.confidential.verify import appraise
from pilotlight.tee import Attestation, BindingsObject


def appraise_attestation(
    content: bytes, *, nonce: bytes, policy: Policy, at: datetime, roots: Roots
) -> tuple[Bindings, Appraisal]:
    """Return the keys that a replica claims, and whether its evidence is bound to them and to our nonce.

    The keys count only if the appraisal is accepted.

    Raises:
        MalformedEvidence: it is no attestation, or holds no evidence.
    """
    attestation = parse_attestation(content)
    if attestation.evidence is None:
        raise MalformedEvidence(f"there is no evidence; the other side's own label is {attestation.tee}")
    bindings = _bindings(attestation.bindings)
    evidence = from_wire(attestation.evidence)
    expected = report_data(nonce, bindings)
    return bindings, appraise(evidence, nonce=expected, policy=policy, at=at, roots=roots)


def parse_attestation(content: bytes) -> Attestation:
    """Read the answer of ``GET /attestation``.

    Raises:
        MalformedEvidence: it is none.
    """
    if len(content) > MAX_EVIDENCE_BYTES:
        raise MalformedEvidence(f"the attestation has more than {MAX_EVIDENCE_BYTES:,} bytes")
    try:
        return msgspec.json.decode(content, type=Attestation)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvidence(f"the attestation cannot be read ({error})") from error


def _bindings(on_wire: BindingsObject) -> Bindings:
    try:
        return Bindings(*(bytes.fromhex(part) for part in msgspec.structs.astuple(on_wire)))
    except ValueError as error:
        raise MalformedEvidence(f"the bindings cannot be read ({error})") from error
