"""AIR: an Attested Inference Receipt, a signed CBOR token about one inference.

It says which model answered what to what, by their hashes, and which evidence stands behind the key that signs. Its
claims are a closed list, and so are the platforms it knows: AWS Nitro and Intel TDX. For SEV-SNP (and the simulator of
it) we write a measurement type of our own, ``sev-snp``, which a verifier of the draft has to refuse, and ours takes.

Source: draft-tsyrulnikov-rats-attested-inference-receipt-02; RFC 9052 (COSE_Sign1); RFC 8392 (CWT).
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cbor2

from pilotlight.errors import PilotlightError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from pilotlight.metering.signing import Signer

PROFILE = "https://spec.cyntrisec.com/air/v1"
POLICY_VERSION = "pilotlight-1"
MAX_BYTES = 64 * 1024
_TAG = 18
_PROTECTED = cbor2.dumps({1: -8, 3: 61}, canonical=True)
_NAMES = {
    1: "iss",
    6: "iat",
    7: "cti",
    10: "eat_nonce",
    265: "eat_profile",
    -65537: "model_id",
    -65538: "model_version",
    -65539: "model_hash",
    -65540: "request_hash",
    -65541: "response_hash",
    -65542: "attestation_doc_hash",
    -65543: "enclave_measurements",
    -65544: "policy_version",
    -65545: "sequence_number",
    -65546: "execution_time_ms",
    -65547: "memory_peak_mb",
    -65548: "security_mode",
    -65549: "model_hash_scheme",
}
_LABELS = {name: label for label, name in _NAMES.items()}
_OPTIONAL = {"eat_nonce", "model_hash_scheme"}
_HASHES = ("model_hash", "request_hash", "response_hash", "attestation_doc_hash")
_TEXTS = ("iss", "model_id", "model_version", "policy_version", "security_mode")
_COUNTS = ("iat", "sequence_number", "execution_time_ms", "memory_peak_mb")
_REGISTERS = {
    "nitro-pcr": ({"pcr0", "pcr1", "pcr2"}, {"pcr8"}),
    "tdx-mrtd-rtmr": ({"pcr0", "pcr1", "pcr2"}, set()),
    "sev-snp": ({"measurement"}, set()),
}
_SCHEMES = {"sha256-single", "sha256-concat", "sha256-manifest"}


class NotAnAir(PilotlightError):
    """A receipt is malformed, was altered, or was signed with another key."""


@dataclass(frozen=True, slots=True)
class Inference:
    """What an AIR says. Hashes are 32 bytes, ``issued_at`` seconds since 1970."""

    issuer: str
    issued_at: int
    model_id: str
    model_version: str
    model_hash: bytes
    request_hash: bytes
    response_hash: bytes
    attestation_doc_hash: bytes
    measurements: Mapping[str, bytes | str]
    sequence_number: int
    execution_time_ms: int
    memory_peak_mb: int
    security_mode: str


def sign_air(inference: Inference, signer: Signer) -> bytes:
    """Return the signed token."""
    claims = {
        "iss": inference.issuer,
        "iat": inference.issued_at,
        "cti": uuid.uuid4().bytes,
        "eat_profile": PROFILE,
        "model_id": inference.model_id,
        "model_version": inference.model_version,
        "model_hash": inference.model_hash,
        "request_hash": inference.request_hash,
        "response_hash": inference.response_hash,
        "attestation_doc_hash": inference.attestation_doc_hash,
        "enclave_measurements": dict(inference.measurements),
        "policy_version": POLICY_VERSION,
        "sequence_number": inference.sequence_number,
        "execution_time_ms": inference.execution_time_ms,
        "memory_peak_mb": inference.memory_peak_mb,
        "security_mode": inference.security_mode,
        "model_hash_scheme": "sha256-manifest",
    }
    payload = cbor2.dumps({_LABELS[name]: value for name, value in claims.items()}, canonical=True)
    signature = signer.sign_bytes(_signed_bytes(payload))
    return cbor2.dumps(cbor2.CBORTag(_TAG, [_PROTECTED, {}, payload, signature]), canonical=True)


def verify_air(content: bytes, key: Ed25519PublicKey) -> dict[str, Any]:
    """Return the claims of a token by their names.

    Raises:
        NotAnAir: it is malformed, not in the one form that it may have, altered, or signed with another key.
    """
    from cryptography.exceptions import InvalidSignature

    protected, unprotected, payload, signature = _parts(content)
    if protected != _PROTECTED or unprotected != {}:
        raise NotAnAir("the AIR has other headers than it may")
    try:
        key.verify(signature, _signed_bytes(payload))
    except InvalidSignature as error:
        raise NotAnAir("the AIR was altered, or signed with another key") from error
    claims = _claims(payload)
    _check(claims)
    return claims


def _signed_bytes(payload: bytes) -> bytes:
    return cbor2.dumps(["Signature1", _PROTECTED, b"", payload])


def _parts(content: bytes) -> tuple[bytes, Any, bytes, bytes]:
    outer = _decoded(content)
    if not isinstance(outer, cbor2.CBORTag) or outer.tag != _TAG or not isinstance(outer.value, list | tuple):
        raise NotAnAir("the AIR is not a tagged COSE_Sign1")
    if len(outer.value) != 4:
        raise NotAnAir("the AIR has not four parts")
    protected, unprotected, payload, signature = outer.value
    if not all(isinstance(part, bytes) for part in (protected, payload, signature)):
        raise NotAnAir("the AIR's parts are not bytes")
    return protected, unprotected, payload, signature


def _claims(payload: bytes) -> dict[str, Any]:
    decoded = _decoded(payload)
    if not isinstance(decoded, dict) or not all(type(label) is int for label in decoded):
        raise NotAnAir("the AIR's claims are not a map of integers")
    unknown = decoded.keys() - _NAMES.keys()
    if unknown:
        raise NotAnAir("the AIR has a claim that is not known")
    if cbor2.dumps(decoded, canonical=True) != payload:  # which a map with a key twice does not come back from either
        raise NotAnAir("the AIR's claims are not in their one encoding")
    return {_NAMES[label]: value for label, value in decoded.items()}


def _decoded(content: bytes) -> Any:
    """Decode one CBOR item that is all there is."""
    if len(content) > MAX_BYTES:
        raise NotAnAir(f"the AIR has more than {MAX_BYTES:,} bytes")
    stream = io.BytesIO(content)
    try:
        found = cbor2.CBORDecoder(stream).decode()
    except (cbor2.CBORDecodeError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise NotAnAir("the AIR is not CBOR") from error
    if stream.tell() != len(content):
        raise NotAnAir("there is something behind the AIR")
    return found


def _check(claims: dict[str, Any]) -> None:
    missing = set(_LABELS) - _OPTIONAL - claims.keys()
    if missing:
        raise NotAnAir(f"the AIR has no {min(missing)}")
    if claims["eat_profile"] != PROFILE:
        raise NotAnAir("the AIR is of another profile")
    well_formed = (
        all(isinstance(claims[name], bytes) and len(claims[name]) == 32 for name in _HASHES)
        and any(claims["model_hash"])
        and all(isinstance(claims[name], str) for name in _TEXTS)
        and all(type(claims[name]) is int and claims[name] >= 0 for name in _COUNTS)
        and isinstance(claims["cti"], bytes)
        and len(claims["cti"]) == 16
        and claims.get("model_hash_scheme", "sha256-manifest") in _SCHEMES
    )
    if not well_formed:
        raise NotAnAir("a claim of the AIR has another form than it may")
    _check_measurements(claims["enclave_measurements"])


def _check_measurements(measurements: Any) -> None:
    kind = measurements.get("measurement_type") if isinstance(measurements, dict) else None
    if not isinstance(kind, str) or kind not in _REGISTERS:
        raise NotAnAir("the AIR is of an unknown platform")
    required, optional = _REGISTERS[kind]
    registers = measurements.keys() - {"measurement_type"}
    if not required <= registers <= required | optional:
        raise NotAnAir("the AIR's measurements are not those of its platform")
    if not all(isinstance(measurements[name], bytes) and len(measurements[name]) == 48 for name in registers):
        raise NotAnAir("a measurement of the AIR has not 48 bytes")
