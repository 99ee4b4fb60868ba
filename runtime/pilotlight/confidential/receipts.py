"""Receipts of invocations: what was asked, answered, used and paid, on which evidence; signed, and verified offline.

A receipt is a JSON object of three parts:

===============  ====================================================================================================
``profile``      a JSON Web Signature by the receipt key: the usage record (tokens, cost, …), the SHA-256 of request and
                 response as the client has them in clear, the artifact, the label, and the digests of the other parts
``air``          an AIR (``air.py``) in base64, by the same key; null where there is no evidence
``attestation``  the evidence that is bound to the receipt key and the artifact, as ``GET /attestation`` gave it; null
                 where there is none
===============  ====================================================================================================

So whoever knows the policy needs no server and no key to verify one: the evidence vouches for the key.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pilotlight.confidential.air import Inference, NotAnAir, sign_air, verify_air
from pilotlight.confidential.appraisal import Appraisal, Kind
from pilotlight.confidential.attested import parse_attestation
from pilotlight.confidential.remote import RemotePolicy, prove
from pilotlight.errors import PilotlightError
from pilotlight.metering.record import UsageRecord
from pilotlight.metering.signing import NotAReceipt, Signer, Verifier
from pilotlight.metering.signing import receipt as compact
from pilotlight.tee import Attestation, TeeLabel

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PROFILE = "pilotlight receipt v1"
RECEIPT_TYPE = "application/vnd.pilotlight.receipt+json"
MAX_RECEIPT_BYTES = 16 * 1024 * 1024


class ReceiptRefused(PilotlightError):
    """A receipt is malformed, was altered, is of something else, or its evidence is not good enough."""

    status = 502
    code = "receipt_refused"


@dataclass(slots=True)
class Exchange:
    """The hashes of a request and of its response, in clear; the response's grows with it."""

    request_sha256: str
    _response: Any = field(default_factory=hashlib.sha256)

    @classmethod
    def of(cls, request: bytes) -> Exchange:
        return cls(hashlib.sha256(request).hexdigest())

    def received(self, piece: bytes) -> None:
        self._response.update(piece)

    @property
    def response_sha256(self) -> str:
        return str(self._response.hexdigest())


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What we sign beside the AIR."""

    profile: Literal["pilotlight receipt v1"] = "pilotlight receipt v1"
    issued_at: int
    record: UsageRecord
    request_sha256: str
    response_sha256: str
    tee: TeeLabel
    evidence_digest: str | None
    attestation_sha256: str | None
    air_sha256: str | None

    @property
    def request_id(self) -> str:
        return self.record.request_id

    @property
    def artifact_digest(self) -> str:
        return self.record.artifact_digest


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The three parts. ``attestation`` is the text of its JSON, so that its digest is certain."""

    profile: str
    air: str | None
    attestation: str | None

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


@dataclass(frozen=True, slots=True)
class Standing:
    """The evidence that this process cites in all of its receipts for one artifact."""

    attestation: str
    evidence_digest: str
    kind: Kind
    measurements: Mapping[str, bytes | str] | None


def issue(
    record: UsageRecord, exchange: Exchange, signer: Signer, standing: Standing | None, sequence_number: int
) -> Receipt:
    """Return the receipt of a finished invocation. Its evidence is the very text that ``standing`` holds."""
    issued_at = int(datetime.now(UTC).timestamp())
    air = None
    if standing is not None and standing.measurements is not None:
        air = sign_air(_inference(record, exchange, standing, sequence_number, issued_at), signer)
    profile = Profile(
        issued_at=issued_at,
        record=record,
        request_sha256=exchange.request_sha256,
        response_sha256=exchange.response_sha256,
        tee=record.tee,
        evidence_digest=None if standing is None else standing.evidence_digest,
        attestation_sha256=None if standing is None else _sha256(standing.attestation.encode()),
        air_sha256=None if air is None else _sha256(air),
    )
    text = msgspec.json.encode(profile).decode()
    return Receipt(
        compact(text, signer.sign(text)),
        None if air is None else base64.b64encode(air).decode(),
        None if standing is None else standing.attestation,
    )


def _inference(
    record: UsageRecord, exchange: Exchange, standing: Standing, sequence_number: int, issued_at: int
) -> Inference:
    assert standing.measurements is not None
    return Inference(
        issuer="pilotlight",
        issued_at=issued_at,
        model_id=record.function,
        model_version=record.artifact_digest,
        model_hash=bytes.fromhex(record.artifact_digest.removeprefix("sha256:")),
        request_hash=bytes.fromhex(exchange.request_sha256),
        response_hash=bytes.fromhex(exchange.response_sha256),
        attestation_doc_hash=hashlib.sha256(_body_of(standing.attestation)).digest(),
        measurements=standing.measurements,
        sequence_number=sequence_number,
        execution_time_ms=round(record.total_ms),
        memory_peak_mb=0,
        security_mode=str(record.tee),
    )


def verify_receipt(content: bytes, key: Ed25519PublicKey, exchange: Exchange | None = None) -> Profile:
    """Return what a receipt says, if this key signed it, and all of its parts belong together.

    ``exchange`` is what was asked and answered, where that is known.

    Raises:
        ReceiptRefused: anything else.
    """
    receipt = parse_receipt(content)
    try:
        profile = Verifier(key).verify_content(receipt.profile, Profile)
    except NotAReceipt as error:
        raise ReceiptRefused(f"the receipt {error.message}") from error
    attestation = None if receipt.attestation is None else receipt.attestation.encode()
    _same("attestation", profile.attestation_sha256, attestation)
    air = _air_bytes(receipt)
    _same("AIR", profile.air_sha256, air)
    if air is not None:
        _check_air(air, key, profile, receipt)
    if profile.tee is not profile.record.tee:
        raise ReceiptRefused("the receipt and its usage record have different labels")
    if exchange is not None:
        if profile.request_sha256 != exchange.request_sha256:
            raise ReceiptRefused("the receipt is of another request")
        if profile.response_sha256 != exchange.response_sha256:
            raise ReceiptRefused("the receipt is of another response")
    return profile


def verify_by_evidence(
    content: bytes, policy: RemotePolicy, exchange: Exchange | None = None
) -> tuple[Profile, Appraisal]:
    """Return what a receipt says, if its own evidence vouches for its key, and its appraisal.

    The evidence is appraised as of the receipt's time. That it was fresh then is the signer's word.

    Raises:
        ReceiptRefused: a part is missing, altered, or does not belong to the others.
        PilotlightError: the evidence is not good enough.
    """
    receipt = parse_receipt(content)
    if receipt.attestation is None:
        raise ReceiptRefused("the receipt has no evidence: its label is none")
    attestation = _attestation(receipt.attestation)
    claimed = _unverified(receipt.profile)
    try:
        at = datetime.fromtimestamp(claimed.issued_at, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ReceiptRefused("the receipt's time is none") from error
    try:
        nonce = bytes.fromhex(attestation.nonce)
        proven = prove(receipt.attestation.encode(), nonce, policy, at)
    except ValueError as error:
        raise ReceiptRefused("the receipt's evidence has no nonce") from error
    profile = verify_receipt(content, proven.receipt_key, exchange)
    if profile.artifact_digest != proven.artifact_digest:
        raise ReceiptRefused("the receipt is of another artifact than its evidence")
    if profile.tee is not proven.appraisal.label:
        raise ReceiptRefused(f"the receipt says {profile.tee}, and its evidence {proven.appraisal.label}")
    if profile.evidence_digest != proven.appraisal.evidence_digest:
        raise ReceiptRefused("the receipt cites other evidence")
    return profile, proven.appraisal


def parse_receipt(content: bytes) -> Receipt:
    """Raises ReceiptRefused where it is none."""
    if len(content) > MAX_RECEIPT_BYTES:
        raise ReceiptRefused(f"the receipt has more than {MAX_RECEIPT_BYTES:,} bytes")
    try:
        return msgspec.json.decode(content, type=Receipt)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ReceiptRefused("this is not a receipt") from error


def measurements_of(appraisal: Appraisal) -> dict[str, bytes | str] | None:
    """Return what an AIR says of the code that ran, from the claims of evidence; None where it has no word for it."""
    registers = {
        Kind.SIMULATED: ("sev-snp", {"measurement": "measurement"}),
        Kind.SEV_SNP: ("sev-snp", {"measurement": "measurement"}),
        Kind.NITRO: ("nitro-pcr", {"pcr0": "pcr0", "pcr1": "pcr1", "pcr2": "pcr2"}),
        Kind.TDX: ("tdx-mrtd-rtmr", {"pcr0": "mr_td", "pcr1": "rtmr0", "pcr2": "rtmr1"}),
    }
    if appraisal.kind not in registers:
        return None
    kind, names = registers[appraisal.kind]
    found = {ours: bytes.fromhex(str(appraisal.claims[theirs])) for ours, theirs in names.items()}
    return {**found, "measurement_type": kind}


def _check_air(air: bytes, key: Ed25519PublicKey, profile: Profile, receipt: Receipt) -> None:
    try:
        claims = verify_air(air, key)
    except NotAnAir as error:
        raise ReceiptRefused(error.message) from error
    if receipt.attestation is None:
        raise ReceiptRefused("the AIR cites evidence that is not there")
    expected = {
        "model_hash": profile.artifact_digest.removeprefix("sha256:"),
        "request_hash": profile.request_sha256,
        "response_hash": profile.response_sha256,
        "attestation_doc_hash": _sha256(_body_of(receipt.attestation)),
    }
    for name, value in expected.items():
        if claims[name].hex() != value:
            raise ReceiptRefused(f"the AIR's {name} is not the receipt's")


def _body_of(attestation: str) -> bytes:
    """Return the report, quote or document in an attestation."""
    evidence = _attestation(attestation).evidence
    if evidence is None:
        raise ReceiptRefused("the receipt's attestation holds no evidence")
    try:
        return base64.b64decode(evidence.body, validate=True)
    except ValueError as error:
        raise ReceiptRefused("the receipt's evidence is not base64") from error


def _attestation(text: str) -> Attestation:
    try:
        return parse_attestation(text.encode())
    except (PilotlightError, UnicodeEncodeError) as error:
        raise ReceiptRefused("the receipt's attestation is none") from error


def _unverified(profile: str) -> Profile:
    """Return what a profile says before anybody vouches for it: at which time to look at the evidence."""
    try:
        part = profile.split(".")[1]
        return msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)), type=Profile)
    except (IndexError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise ReceiptRefused("this is not a receipt") from error


def _air_bytes(receipt: Receipt) -> bytes | None:
    if receipt.air is None:
        return None
    try:
        return base64.b64decode(receipt.air, validate=True)
    except ValueError as error:
        raise ReceiptRefused("the receipt's AIR is not base64") from error


def _same(name: str, digest: str | None, content: bytes | None) -> None:
    if digest != (None if content is None else _sha256(content)):
        raise ReceiptRefused(f"the {name} is not the one that the receipt was signed with")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
