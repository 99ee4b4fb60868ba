"""Signed JSON tokens of attestation services, under keys that were pinned beforehand.

A token names its key (``kid``) and its issuer; both have to be among the pinned ones. Where it says that keys are to be
found (``jku``, ``x5u``, ``jwk``, ``x5c``) is never followed, and a ``jku`` outside the issuer's own address is refused.
Source: RFC 7515, 7518, 7519.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import Problem, Refused, Roots

MAX_TOKEN_BYTES = 256 * 1024
MIN_RSA_BITS = 2048
CLOCK_SKEW = timedelta(minutes=5)

Jwk = Mapping[str, str]
Claims = dict[str, Any]


def verify_token(token: str, algorithm: str, at: datetime, roots: Roots) -> Claims:
    """Return the claims of a token that a pinned key of its issuer has signed by ``algorithm``, and that is valid now.

    Raises:
        Refused: it is not such a token.
    """
    header, claims, signed, signature = _split(token)
    issuer = claims.get("iss")
    if not isinstance(issuer, str) or issuer not in roots.issuers:
        raise Refused(Problem.ISSUER, f"the issuer {str(issuer)[:200]!r} is not one that is trusted")
    _check_header(header, algorithm, issuer)
    key_id = header.get("kid")
    if not isinstance(key_id, str) or key_id not in roots.issuers[issuer]:
        raise Refused(Problem.ISSUER, f"the key {str(key_id)[:200]!r} is not one of {issuer} that is pinned")
    _verify(roots.issuers[issuer][key_id], algorithm, signed, signature)
    _check_time(claims, at)
    return claims


def _split(token: str) -> tuple[Claims, Claims, bytes, bytes]:
    parts = token.split(".")
    if len(token) > MAX_TOKEN_BYTES or len(parts) != 3 or not token.isascii():
        raise Refused(Problem.MALFORMED, "the token is no JSON Web Token")
    try:
        header, claims = (_object(_decoded(part)) for part in parts[:2])
        signature = _decoded(parts[2])
    except (ValueError, RecursionError) as error:
        raise Refused(Problem.MALFORMED, f"the token cannot be read ({str(error)[:200]})") from error
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise Refused(Problem.MALFORMED, "the token does not hold claims")
    return header, claims, f"{parts[0]}.{parts[1]}".encode(), signature


def _object(content: bytes) -> Any:
    found = json.loads(content, object_pairs_hook=_without_twins)
    json.dumps(found, ensure_ascii=False).encode()  # halves of characters could be neither logged nor answered with
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> Claims:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _check_header(header: Claims, algorithm: str, issuer: str) -> None:
    if header.get("alg") != algorithm:
        raise Refused(Problem.SIGNATURE, f"the token is signed by {str(header.get('alg'))[:40]!r}, not by {algorithm}")
    if "crit" in header:
        raise Refused(Problem.MALFORMED, "the token demands extensions that are not known")
    if "jku" in header and not _is_below(header["jku"], issuer):
        raise Refused(Problem.ISSUER, "the token names keys that are not its issuer's (jku)")


def _is_below(url: object, issuer: str) -> bool:
    if not isinstance(url, str):
        return False
    try:
        ours, theirs = urlsplit(issuer), urlsplit(url)
    except ValueError:
        return False
    return theirs.scheme == "https" and theirs.netloc == ours.netloc


def _verify(jwk: Jwk, algorithm: str, signed: bytes, signature: bytes) -> None:
    try:
        if algorithm == "ES384":
            x, y = (int.from_bytes(_decoded(jwk[name])) for name in ("x", "y"))
            key = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
            chain.verify_raw_ecdsa(key, "secp384r1", signature, signed, SHA384())
        elif algorithm == "RS256":
            e, n = (int.from_bytes(_decoded(jwk[name])) for name in ("e", "n"))
            rsa_key = RSAPublicNumbers(e, n).public_key()
            if rsa_key.key_size < MIN_RSA_BITS:
                raise Refused(Problem.SIGNATURE, f"the pinned key has {rsa_key.key_size} bits")
            rsa_key.verify(signature, signed, PKCS1v15(), SHA256())
        else:
            raise ValueError(algorithm)
    except InvalidSignature:
        raise Refused(Problem.SIGNATURE, "the token is not signed by the key that it names") from None
    except (KeyError, ValueError) as error:
        raise Refused(Problem.KEY_MISMATCH, f"the pinned key is not one for {algorithm} ({error})") from error


def _check_time(claims: Claims, at: datetime) -> None:
    expires_at = _instant(claims.get("exp"))
    if expires_at is None:
        raise Refused(Problem.MALFORMED, "the token does not say when it expires")
    if at > expires_at:
        raise Refused(Problem.EXPIRED, f"the token expired at {expires_at}")
    for name in ("nbf", "iat"):
        instant = _instant(claims[name]) if name in claims else None
        if name in claims and (instant is None or instant - at > CLOCK_SKEW):
            raise Refused(Problem.NOT_YET_VALID, f"the token is valid from {instant}")


def _instant(value: object) -> datetime | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return datetime.fromtimestamp(value, UTC)
    except (OverflowError, ValueError, OSError):
        return None


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
