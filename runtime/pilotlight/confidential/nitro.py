"""Evidence of an AWS Nitro enclave: a COSE_Sign1 document whose chain ends in the pinned root of AWS.

``body`` is the document; it brings its own certificates, of which the last lives for three hours. The nonce is the
document's ``nonce``. A document whose PCR0 is zero is of an enclave in debug mode.
Source: aws/aws-nitro-enclaves-nsm-api, docs/attestation_process.md.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography.hazmat.primitives.hashes import SHA384

from pilotlight.confidential import cbor, chain
from pilotlight.confidential.appraisal import Claim, Evidence, Finding, Problem, Reason, Refused, Roots

ES384_HEADER = {1: -35}
PCR_SIZES = (32, 48, 64)
MAX_PCRS = 32
MAX_CERTIFICATE_BYTES = 1024
OPTIONAL = {"public_key": 1024, "user_data": 1024, "nonce": 1024}
"""Their greatest sizes, as the AWS Nitro Enclaves User Guide has them; the module's own notes have 512 for two."""
T = TypeVar("T")

FIELDS = {"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"}
MEASUREMENTS = ("pcr0", "pcr1", "pcr2", "pcr8")
"""The enclave's image, its kernel, its application, and the key that signed it."""
CLOCK_SKEW = timedelta(minutes=5)


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify a document and read it.

    Raises:
        Refused: it is none, or not one that AWS's root vouches for at that time.
    """
    protected, payload, signature = _message(evidence.body)
    document = _document(payload)
    leaf = chain.load_der(_of(document["certificate"], bytes))
    bundle = [chain.load_der(_of(authority, bytes)) for authority in _of(document["cabundle"], list)]
    chain.verify_chain(leaf, bundle, roots.keys.get(evidence.kind, frozenset()), at)
    message = cbor.sig_structure(protected, payload)
    chain.verify_raw_ecdsa(leaf.public_key(), "secp384r1", signature, message, SHA384())
    _check_time(_of(document["timestamp"], int), at)
    found = document.get("nonce")
    fresh = nonce is not None and len(nonce) > 0 and found == nonce
    problems = () if nonce is None or fresh else (Reason(Problem.NONCE, "the nonce is not what was asked for"),)
    return Finding(_claims(document), MEASUREMENTS, fresh, _of(document["module_id"], str), problems)


def _message(body: bytes) -> tuple[bytes, bytes, bytes]:
    match cbor.loads(body):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)] if not unprotected:
            if cbor.loads(protected) != ES384_HEADER:
                raise Refused(Problem.SIGNATURE, "the document is not signed by ES384")
            return protected, payload, signature
    raise Refused(Problem.MALFORMED, "the document is no COSE_Sign1")


def _document(payload: bytes) -> dict[str, cbor.Value]:
    content = cbor.loads(payload)
    if not isinstance(content, dict) or not FIELDS <= content.keys() <= FIELDS | OPTIONAL.keys():
        raise Refused(Problem.MALFORMED, "the document does not have the fields of an attestation")
    document: dict[str, cbor.Value] = {str(name): value for name, value in content.items()}
    pcrs = _of(document["pcrs"], dict)
    if document["digest"] != "SHA384" or not _of(document["module_id"], str):
        raise Refused(Problem.MALFORMED, "the document has no module, or another digest than SHA384")
    if not 1 <= len(pcrs) <= MAX_PCRS or not all(_is_pcr(index, value) for index, value in pcrs.items()):
        raise Refused(Problem.MALFORMED, "the document's PCRs are not as they should be")
    for certificate in (document["certificate"], *_of(document["cabundle"], list)):
        if not 1 <= len(_of(certificate, bytes)) <= MAX_CERTIFICATE_BYTES:
            raise Refused(Problem.MALFORMED, "a certificate in the document is empty or too long")
    if not 1 <= len(_of(document["cabundle"], list)) <= chain.MAX_CERTIFICATES:
        raise Refused(Problem.MALFORMED, "the document has no authorities, or too many")
    for name, limit in OPTIONAL.items():
        value = document.get(name)
        if value is not None and len(_of(value, bytes)) > limit:
            raise Refused(Problem.MALFORMED, f"the document's {name} is too long")
    return document


def _is_pcr(index: object, value: object) -> bool:
    is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < MAX_PCRS
    return is_index and isinstance(value, bytes) and len(value) in PCR_SIZES


def _of(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Refused(Problem.MALFORMED, f"the document has {type(value).__name__} for {kind.__name__}")
    return value


def _check_time(timestamp_ms: int, at: datetime) -> None:
    try:
        made_at = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise Refused(Problem.MALFORMED, "the document's time is none") from error
    if made_at - at > CLOCK_SKEW:
        raise Refused(Problem.NOT_YET_VALID, f"the document was made at {made_at}")


def _claims(document: dict[str, cbor.Value]) -> dict[str, Claim]:
    pcrs = _of(document["pcrs"], dict)
    claims: dict[str, Claim] = {f"pcr{index}": _of(value, bytes).hex() for index, value in pcrs.items()}
    for name in OPTIONAL:
        if document.get(name) is not None:
            claims[name] = _of(document[name], bytes).hex()
    pcr0 = pcrs.get(0)
    claims["debug"] = not isinstance(pcr0, bytes) or not any(pcr0)
    claims["module_id"] = _of(document["module_id"], str)
    claims["timestamp_ms"] = _of(document["timestamp"], int)
    return claims
