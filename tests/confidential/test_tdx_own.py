"""TDX quotes of versions 4 and 5 under a root of our own: what no recorded quote at hand can show.

Source: Intel, "TDX DCAP Quoting Library API", quote format; PCS API v4, TCB info and enclave identities.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from evidence_files import utc
from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, Policy, Problem
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel

NOW = utc("2026-11-01")
NONCE = b"n" * 64
FMSPC, PCE_ID = "00906ed50000", "0000"
INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
SGX = "1.2.840.113741.1.13.1"
MR_TD = b"\x11" * 48
CLOSED = bytes.fromhex("0000001000000000")


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


class Intel:
    """A root, what stands below it, and one platform with its quoting enclave."""

    def __init__(self) -> None:
        self.root_key, self.ca_key, self.tcb_key, self.pck_key, self.quote_key = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(5)
        )
        self.root = self._certificate("Intel SGX Root CA", self.root_key, "Intel SGX Root CA", self.root_key, True)
        self.ca = self._certificate("Intel SGX PCK Platform CA", self.ca_key, "Intel SGX Root CA", self.root_key, True)
        self.tcb = self._certificate("Intel SGX TCB Signing", self.tcb_key, "Intel SGX Root CA", self.root_key, False)
        self.pck = self._certificate(
            "Intel SGX PCK Certificate", self.pck_key, "Intel SGX PCK Platform CA", self.ca_key, False, platform()
        )

    def _certificate(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: str,
        issuer_key: ec.EllipticCurvePrivateKey,
        is_authority: bool,
        extension: bytes | None = None,
    ) -> x509.Certificate:
        subject, above = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, issuer))
        builder = x509.CertificateBuilder(
            above,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            NOW - timedelta(days=300),
            NOW + timedelta(days=3000),
        )
        constraints = x509.BasicConstraints(ca=is_authority, path_length=None)
        usage = x509.KeyUsage(not is_authority, False, False, False, False, is_authority, is_authority, False, False)
        builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        above_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(identifier, critical=False).add_extension(above_identifier, critical=False)
        if extension is not None:
            builder = builder.add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX), extension), critical=False
            )
        return builder.sign(issuer_key, SHA256())

    def crl(self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, *revoked: x509.Certificate) -> str:
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=issuer.subject, last_update=NOW - timedelta(days=1), next_update=NOW + timedelta(days=29)
        )
        builder = builder.add_extension(x509.CRLNumber(1), critical=False).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        for certificate in revoked:
            entry = x509.RevokedCertificateBuilder(certificate.serial_number, NOW - timedelta(days=2)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key, SHA256()).public_bytes(Encoding.DER).hex()

    def collateral(self, status: str = "UpToDate", *revoked: x509.Certificate, days: int = 0) -> bytes:
        begun, ends = ((NOW + timedelta(days=days + more)).strftime("%Y-%m-%dT%H:%M:%SZ") for more in (-1, 29))
        times = {"issueDate": begun, "nextUpdate": ends, "tcbEvaluationDataNumber": 17}
        level = {"tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": status}
        svns = [{"svn": 1}] * 16
        tcb_info = {
            "id": "TDX",
            "version": 3,
            **times,
            "fmspc": FMSPC,
            "pceId": PCE_ID,
            "tcbType": 0,
            "tdxModule": {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8},
            "tdxModuleIdentities": [
                {
                    "id": "TDX_01",
                    "mrsigner": "00" * 48,
                    "attributes": "00" * 8,
                    "attributesMask": "FF" * 8,
                    "tcbLevels": [{"tcb": {"isvsvn": 1}, **level, "tcbStatus": "UpToDate"}],
                }
            ],
            "tcbLevels": [
                {"tcb": {"sgxtcbcomponents": svns, "pcesvn": 5, "tdxtcbcomponents": svns}, **level},
            ],
        }
        identity = {
            "id": "TD_QE",
            "version": 2,
            **times,
            "miscselect": "00" * 4,
            "miscselectMask": "FF" * 4,
            "attributes": "11" + "00" * 15,
            "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": "dc" * 32,
            "isvprodid": 2,
            "tcbLevels": [{"tcb": {"isvsvn": 4}, **level, "tcbStatus": "UpToDate"}],
        }
        tcb_text, identity_text = (json.dumps(part, separators=(",", ":")) for part in (tcb_info, identity))
        signer = pem(self.tcb, self.root).decode()
        return json.dumps(
            {
                "pck_crl_issuer_chain": pem(self.ca, self.root).decode(),
                "root_ca_crl": self.crl(self.root, self.root_key),
                "pck_crl": self.crl(self.ca, self.ca_key, *revoked),
                "tcb_info_issuer_chain": signer,
                "tcb_info": tcb_text,
                "tcb_info_signature": sign(self.tcb_key, tcb_text.encode()).hex(),
                "qe_identity_issuer_chain": signer,
                "qe_identity": identity_text,
                "qe_identity_signature": sign(self.tcb_key, identity_text.encode()).hex(),
            }
        ).encode()

    def quote(self, version: int = 4, body_type: int = 3, **fields: Any) -> bytes:
        header = struct.pack("<HHIHH16s20s", version, 2, 0x81, 0, 0, INTEL, bytes(20))
        report = td_report(**fields)
        if version == 5:
            report += (b"\x01" * 16 + bytes(48)) if body_type == 3 else b""
            report = struct.pack("<HI", body_type, len(report)) + report
        signed = header + report
        extra = bytes(range(32))
        bound = hashlib.sha256(point(self.quote_key) + extra).digest()
        enclave = enclave_report(bound)
        chain_pem = pem(self.pck, self.ca, self.root)
        inner = struct.pack("<HI", 5, len(chain_pem)) + chain_pem
        certified = enclave + sign(self.pck_key, enclave) + struct.pack("<H", len(extra)) + extra + inner
        outer = struct.pack("<HI", 6, len(certified)) + certified
        signature = sign(self.quote_key, signed) + point(self.quote_key) + outer
        return signed + struct.pack("<I", len(signature)) + signature


def td_report(
    report_data: bytes = NONCE,
    attributes: bytes = CLOSED,
    mr_td: bytes = MR_TD,
    svn: int = 1,
    mr_signer: bytes = bytes(48),
) -> bytes:
    parts = [
        bytes([svn]) * 16,
        bytes(48),
        mr_signer,
        bytes(8),
        attributes,
        bytes.fromhex("e718060000000000"),
    ]
    registers = [mr_td, bytes(48), bytes(48), bytes(48), *(bytes([n]) * 48 for n in range(1, 5)), report_data]
    found = b"".join((*parts, *registers))
    assert len(found) == 584
    return found


def enclave_report(bound: bytes) -> bytes:
    """Return the quoting enclave's own report, which holds the hash of the key that signs quotes."""
    found = b"".join(
        (
            b"\x01" * 16,
            bytes(4),
            bytes(28),
            b"\x11" + bytes(15),
            b"\xaa" * 32,
            bytes(32),
            b"\xdc" * 32,
            bytes(96),
            struct.pack("<HH", 2, 4),
            bytes(60),
            bound.ljust(64, b"\0"),
        )
    )
    assert len(found) == 384
    return found


def platform() -> bytes:
    """Return the extension by which a PCK certificate says of which platform, and of which TCB, it is."""

    def entry(oid: str, value: bytes) -> bytes:
        return sequence(bytes(core.ObjectIdentifier(f"{SGX}.{oid}").dump()) + value)

    def integer(value: int) -> bytes:
        return bytes((2, 1, value))

    def octets(content: bytes) -> bytes:
        return bytes((4, len(content))) + content

    svns = b"".join(entry(f"2.{n}", integer(1)) for n in range(1, 17))
    svns += entry("2.17", integer(5)) + entry("2.18", octets(b"\x01" * 16))
    tcb = entry("2", sequence(svns))
    return sequence(
        entry("1", octets(bytes(16)))
        + tcb
        + entry("3", octets(bytes.fromhex(PCE_ID)))
        + entry("4", octets(bytes.fromhex(FMSPC)))
        + entry("5", b"\x0a\x01\0")
    )


def sequence(content: bytes) -> bytes:
    size = len(content)
    head = bytes([size]) if size < 0x80 else b"\x81" + bytes([size]) if size < 0x100 else b"\x82" + size.to_bytes(2)
    return b"\x30" + head + content


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


@cache
def intel() -> Intel:
    return Intel()


def evidence(body: bytes, collateral: bytes | None = None) -> Evidence:
    return Evidence(Kind.TDX, body, b"", {"tdx": intel().collateral() if collateral is None else collateral})


def appraised(given: Evidence, **changes: Any) -> Appraisal:
    roots = replace(VENDORS, keys={Kind.TDX: frozenset({chain.fingerprint(intel().root)})})
    policy = Policy(claims={"mr_td": frozenset({MR_TD.hex()})})
    arguments: dict[str, Any] = {"nonce": NONCE, "policy": policy, "at": NOW, "roots": roots}
    return appraise(given, **{**arguments, **changes})


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    return {reason.problem for reason in appraisal.reasons}


FORMS = [(4, 0), (5, 2), (5, 3)]


@pytest.mark.parametrize(("version", "body_type"), FORMS)
def test_a_quote_of_each_version_is_accepted(version: int, body_type: int) -> None:
    appraisal = appraised(evidence(intel().quote(version, body_type)))
    assert appraisal.reasons == ()
    assert appraisal.label is TeeLabel.HARDWARE
    assert (appraisal.claims["rtmr0"], appraisal.claims["tcb_status"]) == ("01" * 48, "UpToDate")


@pytest.mark.parametrize(("version", "body_type"), FORMS)
def test_each_quote_is_refused_for_its_own_reason(version: int, body_type: int) -> None:
    def quoted(**fields: Any) -> Evidence:
        return evidence(intel().quote(version, body_type, **fields))

    assert problems(appraised(quoted(report_data=b"o" * 64))) == {Problem.NONCE}
    assert problems(appraised(quoted(mr_td=b"\x12" * 48))) == {Problem.MEASUREMENT}
    assert problems(appraised(quoted(attributes=b"\x01" + CLOSED[1:]))) == {Problem.DEBUG}
    assert problems(appraised(quoted(svn=0))) == {Problem.TCB}
    assert problems(appraised(quoted(mr_signer=b"\x01" * 48))) == {Problem.COLLATERAL}
    genuine = intel().quote(version, body_type)
    for place in (0, 4, 20, 48, 100, 200, 400, 600, 700, 900, 1000):
        changed = bytearray(genuine)
        changed[place] ^= 1
        assert not appraised(evidence(bytes(changed))).accepted, place
    assert problems(appraised(evidence(genuine + b"\x01"))) == {Problem.MALFORMED}
    assert not appraised(evidence(genuine[:-400])).accepted


@pytest.mark.parametrize(
    "status", ["OutOfDate", "SWHardeningNeeded", "ConfigurationNeeded", "OutOfDateConfigurationNeeded"]
)
def test_another_status_of_the_tcb_is_the_policy_s_to_accept(status: str) -> None:
    given = evidence(intel().quote(), intel().collateral(status))
    assert problems(appraised(given)) == {Problem.TCB}
    lenient = Policy(any_measurement=True, tcb_statuses=frozenset({status}))
    appraisal = appraised(given, policy=lenient)
    assert appraisal.reasons == ()


def test_a_revoked_platform_or_tcb_is_refused() -> None:
    assert problems(appraised(evidence(intel().quote(), intel().collateral("UpToDate", intel().pck)))) == {
        Problem.REVOKED
    }
    assert problems(appraised(evidence(intel().quote(), intel().collateral("Revoked")))) == {Problem.REVOKED}


def test_collateral_of_another_time_or_another_intel_is_refused() -> None:
    for days, expected in ((-60, Problem.EXPIRED), (60, Problem.NOT_YET_VALID)):
        given = evidence(intel().quote(), intel().collateral(days=days))
        assert problems(appraised(given)) == {expected}
    forger = Intel()
    assert not appraised(evidence(intel().quote(), forger.collateral())).accepted
    assert not appraised(evidence(forger.quote(), forger.collateral())).accepted
    assert problems(appraised(evidence(forger.quote()))) == {Problem.UNKNOWN_ROOT}
