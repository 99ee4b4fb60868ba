"""Nitro documents under a root of our own: both that were recorded are of enclaves in debug mode."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from evidence_files import nitro, utc
from pilotlight.confidential import cbor, chain
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, Policy, Problem, Refused
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel

NOW = utc("2026-11-01")
NONCE = b"n" * 64
IMAGE = b"\7" * 48


class Aws:
    """A root, and an enclave's certificate of three hours below it."""

    def __init__(self) -> None:
        self.root_key, self.key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
        self.root = self._certificate("root", self.root_key, is_authority=True)
        self.leaf = self._certificate("enclave", self.key, is_authority=False)

    def _certificate(self, name: str, key: ec.EllipticCurvePrivateKey, is_authority: bool) -> x509.Certificate:
        subject, issuer = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, "root"))
        builder = x509.CertificateBuilder(
            issuer, subject, key.public_key(), x509.random_serial_number(), NOW, NOW + timedelta(hours=3)
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        return builder.sign(self.root_key, SHA384())

    def document(self, **changes: Any) -> bytes:
        fields = {
            "module_id": "i-1-enc1",
            "digest": "SHA384",
            "timestamp": int(NOW.timestamp() * 1000) + 60_000,
            "pcrs": {0: IMAGE, 1: b"\1" * 48, 8: bytes(48)},
            "certificate": self.leaf.public_bytes(Encoding.DER),
            "cabundle": [self.root.public_bytes(Encoding.DER)],
            "public_key": None,
            "user_data": b"data",
            "nonce": NONCE,
        }
        kept = {name: value for name, value in {**fields, **changes}.items() if value is not ...}
        return self.message(cbor2.dumps(kept))

    def message(self, payload: bytes, header: Any = None, unprotected: Any = None) -> bytes:
        protected = cbor2.dumps({1: -35} if header is None else header)
        signed = cbor2.dumps(["Signature1", protected, b"", payload])
        assert signed == cbor.sig_structure(protected, payload)
        r, s = decode_dss_signature(self.key.sign(signed, ec.ECDSA(SHA384())))
        return cbor2.dumps([protected, unprotected or {}, payload, r.to_bytes(48) + s.to_bytes(48)])


@cache
def aws() -> Aws:
    return Aws()


def appraised(body: bytes, **changes: Any) -> Appraisal:
    roots = VENDORS.trusting(Kind.NITRO, chain.fingerprint(aws().root))
    policy = Policy(claims={"pcr0": frozenset({IMAGE.hex()})})
    arguments: dict[str, Any] = {"nonce": NONCE, "policy": policy, "at": NOW + timedelta(hours=1), "roots": roots}
    return appraise(Evidence(Kind.NITRO, body), **{**arguments, **changes})


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    return {reason.problem for reason in appraisal.reasons}


def test_an_enclave_that_is_closed_is_accepted() -> None:
    appraisal = appraised(aws().document())
    assert appraisal.reasons == ()
    assert appraisal.label is TeeLabel.HARDWARE
    assert (appraisal.claims["user_data"], appraisal.claims["module_id"]) == (b"data".hex(), "i-1-enc1")
    assert appraised(b"\xd2" + aws().document()).accepted  # with the tag of COSE_Sign1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pcrs": {0: bytes(48)}}, {Problem.DEBUG, Problem.MEASUREMENT}),
        ({"pcrs": {1: IMAGE}}, {Problem.DEBUG, Problem.MEASUREMENT}),
        ({"pcrs": {0: b"\6" * 48}}, {Problem.MEASUREMENT}),
        ({"pcrs": {}}, {Problem.MALFORMED}),
        ({"pcrs": {0: b"short"}}, {Problem.MALFORMED}),
        ({"pcrs": {32: IMAGE}}, {Problem.MALFORMED}),
        ({"pcrs": {"0": IMAGE}}, {Problem.MALFORMED}),
        ({"pcrs": [IMAGE]}, {Problem.MALFORMED}),
        ({"nonce": None}, {Problem.NONCE}),
        ({"nonce": b"old"}, {Problem.NONCE}),
        ({"nonce": b"n" * 1025}, {Problem.MALFORMED}),
        ({"nonce": "text"}, {Problem.MALFORMED}),
        ({"digest": "SHA256"}, {Problem.MALFORMED}),
        ({"module_id": ""}, {Problem.MALFORMED}),
        ({"timestamp": True}, {Problem.MALFORMED}),
        ({"timestamp": 2**63}, {Problem.MALFORMED}),
        ({"timestamp": int((NOW + timedelta(days=1)).timestamp() * 1000)}, {Problem.NOT_YET_VALID}),
        ({"certificate": b""}, {Problem.MALFORMED}),
        ({"certificate": b"no certificate"}, {Problem.MALFORMED}),
        ({"cabundle": []}, {Problem.MALFORMED}),
        ({"cabundle": [b"x" * 1025]}, {Problem.MALFORMED}),
        ({"cabundle": ...}, {Problem.MALFORMED}),
        ({"more": 1}, {Problem.MALFORMED}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_signed_documents_are_still_checked(changes: dict[str, Any], expected: set[Problem]) -> None:
    assert problems(appraised(aws().document(**changes))) == expected


def indefinite(value: Any) -> bytes:
    """Encode as newer security modules do: maps and lists without their length, and an end."""
    if isinstance(value, dict):
        return b"\xbf" + b"".join(indefinite(part) for pair in value.items() for part in pair) + b"\xff"
    if isinstance(value, list):
        return b"\x9f" + b"".join(map(indefinite, value)) + b"\xff"
    return cbor2.dumps(value)


def test_a_document_without_lengths_is_the_same_document() -> None:
    definite = aws().document()
    fields = cbor2.loads(cbor2.loads(definite)[2])
    signed = aws().message(indefinite(fields))
    appraisal = appraised(signed)
    assert appraisal.reasons == ()
    assert appraisal.claims == appraised(definite).claims
    assert problems(appraised(signed, nonce=b"another")) == {Problem.NONCE}
    zeroed = aws().message(indefinite({**fields, "pcrs": {0: bytes(48)}}))
    assert problems(appraised(zeroed)) == {Problem.DEBUG, Problem.MEASUREMENT}
    for payload in (indefinite(fields)[:-1], indefinite(fields) + b"\xff", indefinite(fields)[:-1] + b"\x61a\xff"):
        assert problems(appraised(aws().message(payload))) == {Problem.MALFORMED}


@pytest.mark.parametrize(
    "body",
    [
        lambda: aws().message(b"\xa0", header={1: -7}),
        lambda: aws().message(b"\xa0", header={1: -35, 2: [1]}),
        lambda: aws().message(b"\xa0", unprotected={4: b"key"}),
        lambda: cbor2.dumps([b"", {}, b""]),
        lambda: cbor2.dumps({"a": 1}),
        lambda: aws().document() + b"\0",
        lambda: b"\xd2\xd2" + aws().document(),
        lambda: b"\xd9\xd9\xf7" + aws().document(),
    ],
)
def test_other_messages_are_refused(body: Callable[[], bytes]) -> None:
    assert problems(appraised(body())) <= {Problem.MALFORMED, Problem.SIGNATURE}


def test_a_document_that_another_key_signed_is_refused() -> None:
    forger = Aws()
    genuine = {
        "certificate": aws().leaf.public_bytes(Encoding.DER),
        "cabundle": [aws().root.public_bytes(Encoding.DER)],
    }
    assert problems(appraised(forger.document(**genuine))) == {Problem.SIGNATURE}
    assert problems(appraised(forger.document())) == {Problem.UNKNOWN_ROOT}


# The reader of CBOR


def test_the_reader_and_a_general_one_agree_on_a_real_document() -> None:
    body = nitro().evidence.body
    assert cbor.loads(body) == cbor2.loads(body)


@pytest.mark.parametrize(
    "value", [0, 23, 24, 255, 256, 65536, 2**32, 2**64 - 1, -1, -(2**64), b"", b"x" * 70_000, "ä", [], [1, [2]], {1: 2}]
)
def test_values_are_read(value: Any) -> None:
    assert cbor.loads(cbor2.dumps(value)) == value
    assert cbor.loads(indefinite(value)) == value
    for simple in (True, False, None):
        assert cbor.loads(cbor2.dumps(simple)) is simple


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x18",
        b"\x42a",
        b"\x62\xff\xff",
        b"\x9f",
        b"\x9f\x01",
        b"\xbf\x01\xff",
        b"\xbf\xff\x01",
        b"\xbf\x01\x02\x01\x03\xff",
        b"\xff",
        b"\x5f\x41a\xff",
        b"\x7f\x61a\xff",
        b"\x1f",
        b"\xdf\x01",
        b"\xf9\x00\x00",
        b"\xf7",
        b"\xf8\x20",
        b"\xc4\x82\x3b\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xa2\x01\x02\x01\x03",
        b"\xa1\x80\x01",
        b"\x81" * 10_000,
        b"\x9f" * 10_000,
        b"\x9b" + b"\xff" * 8,
        b"\xbb" + b"\xff" * 8,
        b"\x5b" + b"\xff" * 8,
    ],
    ids=lambda content: content[:8].hex(),
)
def test_what_is_not_expected_in_cbor_is_refused(content: bytes) -> None:
    with pytest.raises(Refused):
        cbor.loads(content)
