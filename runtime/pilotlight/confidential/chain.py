"""Certificate chains from a leaf to a pinned root, for every kind of evidence.

A chain is good if each certificate is signed by the next, valid at the instant, and all but the first are authorities;
and if the last one's public key is pinned. The root's own signature is checked too: a pinned key says nothing about a
certificate around it that somebody else made.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from pilotlight.confidential.appraisal import Problem, Refused

MAX_CERTIFICATES = 16
MAX_NAME = 200
DEFECTS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises at bytes that are no certificate or no list of revocations."""


def load_pem(content: bytes) -> list[x509.Certificate]:
    """Return the certificates of a PEM text, in its order; none for an empty one.

    Raises:
        Refused: it is not one, or has too many.
    """
    if content.count(b"-----BEGIN CERTIFICATE-----") > MAX_CERTIFICATES:
        raise Refused(Problem.MALFORMED, f"there are more than {MAX_CERTIFICATES} certificates")
    if not content.strip():
        return []
    _silence_warnings()
    try:
        return [_whole(certificate) for certificate in x509.load_pem_x509_certificates(content)]
    except DEFECTS as error:
        raise Refused(Problem.MALFORMED, f"the certificates cannot be read ({error})") from error


def load_der(content: bytes) -> x509.Certificate:
    """Return one certificate.

    Raises:
        Refused: it is none.
    """
    _silence_warnings()
    try:
        return _whole(x509.load_der_x509_certificate(content))
    except DEFECTS as error:
        raise Refused(Problem.MALFORMED, f"a certificate cannot be read ({error})") from error


def _whole(certificate: x509.Certificate) -> x509.Certificate:
    """Read every part now: cryptography reads them when they are asked for, and a defect would come up anywhere."""
    for part in (certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()):
        del part
    return certificate


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's public key (SubjectPublicKeyInfo), in hex: what roots are pinned by."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()


def verify_chain(
    leaf: x509.Certificate, others: Iterable[x509.Certificate], pinned: Collection[str], at: datetime
) -> tuple[x509.Certificate, ...]:
    """Return the chain from ``leaf`` up to a pinned root, both included.

    Raises:
        Refused: there is no such chain, or a certificate of it is not valid at ``at``.
    """
    chain = [leaf]
    rest = list(others)
    try:
        while not _is_root(chain[-1], pinned):
            issuer = next((candidate for candidate in rest if _issued(chain[-1], candidate)), None)
            if issuer is None:
                raise _no_issuer(chain[-1])
            rest.remove(issuer)
            chain.append(issuer)
        for depth, certificate in enumerate(chain):
            check_validity(certificate, at)
            if depth:
                _check_is_authority(certificate, num_below=depth - 1)
    except DEFECTS as error:
        raise Refused(Problem.CHAIN, f"a certificate is not well formed ({error})") from error
    return tuple(chain)


def check_validity(certificate: x509.Certificate, at: datetime) -> None:
    name = common_name(certificate)
    if at < certificate.not_valid_before_utc:
        raise Refused(Problem.NOT_YET_VALID, f"the certificate {name} is valid from {certificate.not_valid_before_utc}")
    if at > certificate.not_valid_after_utc:
        raise Refused(Problem.EXPIRED, f"the certificate {name} expired at {certificate.not_valid_after_utc}")


def check_not_revoked(chain: Sequence[x509.Certificate], crls: Iterable[bytes], at: datetime) -> None:
    """Compare a chain with lists of revocations (DER), each signed by an authority of that chain.

    Raises:
        Refused: a list is malformed, forged or out of date, or names a certificate of the chain.
    """
    for content in crls:
        try:
            _check_crl(chain, x509.load_der_x509_crl(content), at)
        except DEFECTS as error:
            raise Refused(Problem.COLLATERAL, f"a list of revocations cannot be read ({error})") from error


def common_name(certificate: x509.Certificate) -> str:
    """Return the subject's common name, or all of the subject where it has none."""
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return (str(names[0].value) if names else certificate.subject.rfc4514_string())[:MAX_NAME]


def verify_raw_ecdsa(
    key: PublicKeyTypes, curve: str, signature: bytes, message: bytes, algorithm: HashAlgorithm
) -> None:
    """Verify an ECDSA signature that is r ‖ s, both big-endian and equally long.

    Raises:
        Refused: the key is of another kind, or the signature is not of this key over this message.
    """
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != curve:
        raise Refused(Problem.KEY_MISMATCH, f"the signing key is not on the curve {curve}")
    size = (key.curve.key_size + 7) // 8
    if len(signature) != 2 * size:
        raise Refused(Problem.SIGNATURE, f"a signature of {curve} has {2 * size} bytes, this one {len(signature)}")
    r, s = int.from_bytes(signature[:size]), int.from_bytes(signature[size:])
    try:
        key.verify(encode_dss_signature(r, s), message, ECDSA(algorithm))
    except InvalidSignature:
        raise Refused(Problem.SIGNATURE, "the signature is not of the certified key over these bytes") from None


def _silence_warnings() -> None:
    """AMD numbers its leaf certificates 0, which cryptography will refuse one day; its version is capped for that.

    A name with a country of twenty letters is a stranger's to choose, and no reason to write on our standard error.
    Not by ``catch_warnings``, which changes what other threads see; the filter is set each time since tests reset it.
    """
    warnings.filterwarnings("ignore", category=CryptographyDeprecationWarning)
    warnings.filterwarnings("ignore", message="Attribute's length must be", category=UserWarning)


def _is_root(certificate: x509.Certificate, pinned: Collection[str]) -> bool:
    return fingerprint(certificate) in pinned and _issued(certificate, certificate)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *DEFECTS):
        return False
    return True


def _no_issuer(certificate: x509.Certificate) -> Refused:
    name = common_name(certificate)
    if certificate.subject == certificate.issuer:
        return Refused(Problem.UNKNOWN_ROOT, f"the root {name} is not one that is trusted for this kind of evidence")
    return Refused(Problem.CHAIN, f"no certificate here has signed {name}")


def _check_is_authority(certificate: x509.Certificate, num_below: int) -> None:
    """``num_below``: how many authorities stand between this one and the leaf."""
    name = common_name(certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise Refused(Problem.CHAIN, f"{name} is not an authority") from None
    if not constraints.ca or (constraints.path_length is not None and num_below > constraints.path_length):
        raise Refused(Problem.CHAIN, f"{name} is not an authority for this chain")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.key_cert_sign:
        raise Refused(Problem.CHAIN, f"{name} may not sign certificates")


def _check_crl(chain: Sequence[x509.Certificate], crl: x509.CertificateRevocationList, at: datetime) -> None:
    issuer = next((authority for authority in chain[1:] if authority.subject == crl.issuer), None)
    if issuer is None or not crl.is_signature_valid(issuer.public_key()):  # type: ignore[arg-type]
        raise Refused(Problem.COLLATERAL, "a list of revocations is not signed by an authority of the chain")
    if at < crl.last_update_utc:
        raise Refused(Problem.NOT_YET_VALID, f"the list of revocations is of {crl.last_update_utc}")
    if crl.next_update_utc is None or at > crl.next_update_utc:
        raise Refused(Problem.EXPIRED, f"the list of revocations was to be renewed by {crl.next_update_utc}")
    for certificate in chain:
        if certificate.issuer == crl.issuer and crl.get_revoked_certificate_by_serial_number(certificate.serial_number):
            raise Refused(Problem.REVOKED, f"the certificate {common_name(certificate)} is revoked")
