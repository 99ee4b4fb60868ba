"""A simulator of SEV-SNP: real reports, signed by a chain of the real form, under a root that it makes itself.

It proves nothing, and says so: its evidence is of the kind ``simulated``, its label ``simulated``, and no policy
accepts it that does not name that kind. With it, everything around the evidence can be run and tampered with anywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pilotlight.confidential import chain, snp_report
from pilotlight.confidential.appraisal import Evidence, Kind, Refused
from pilotlight.confidential.sev_snp import HARDWARE_ID_OID, OID, TCB_OIDS
from pilotlight.confidential.snp_report import SnpReport
from pilotlight.errors import ConfigError

FAMILIES = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0x11), "Turin": (0x1A, 0x02)}
"""CPUID family and model of a processor of each."""
MEASUREMENT = hashlib.sha384(b"pilotlight simulator").digest()
VALID_FROM = datetime(2020, 1, 1, tzinfo=UTC)
VALID_UNTIL = datetime(2045, 1, 1, tzinfo=UTC)
TCB = {"fmc": 1, "bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}
CHIP_ID = hashlib.sha512(b"pilotlight simulator").digest()
_RSA_BITS = 2048
_PSS = padding.PSS(mgf=padding.MGF1(SHA384()), salt_length=SHA384.digest_size)


class Simulator:
    """One simulated chip with one guest. ``key`` is its VCEK, ``certificates`` its chain as PEM, the leaf first."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificates: bytes, guest: SnpReport) -> None:
        self._key = key
        self.certificates = certificates
        self.guest = guest
        self.root_fingerprint = chain.fingerprint(chain.load_pem(certificates)[-1])

    @classmethod
    def create(
        cls, measurement: bytes = MEASUREMENT, valid_until: datetime = VALID_UNTIL, family: str = "Milan"
    ) -> Simulator:
        """Make a chip of a new root. The root's own private key is forgotten."""
        root_key, intermediate_key = (rsa.generate_private_key(65537, _RSA_BITS) for _ in range(2))
        key = ec.generate_private_key(ec.SECP384R1())
        root = _authority(f"ARK-{family}", root_key.public_key(), f"ARK-{family}", root_key)
        intermediate = _authority(f"SEV-{family}", intermediate_key.public_key(), f"ARK-{family}", root_key)
        leaf = _leaf(key.public_key(), intermediate_key, valid_until, family)
        return cls(key, _pem((leaf, intermediate, root)), _guest(measurement, family))

    @classmethod
    def open(cls, path: Path, measurement: bytes = MEASUREMENT) -> Simulator:
        """Read a chip from a file, and make it there first if there is none.

        Raises:
            ConfigError: the file cannot be read or written, or is not one that this wrote.
        """
        try:
            if not path.exists():
                cls.create(measurement)._write(path)
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be used for the simulator ({error.strerror})") from error
        return cls._parse(content, path, measurement)

    def attest(self, report_data: bytes, **changes: Any) -> Evidence:
        """Return evidence that holds ``report_data`` (64 bytes); ``changes`` are other fields of ``SnpReport``."""
        report = replace(self.guest, report_data=report_data, **changes)
        return Evidence(Kind.SIMULATED, self.signed(report), self.certificates)

    def signed(self, report: SnpReport) -> bytes:
        """Return a report and its signature, as the firmware would lay them out."""
        message = report.signed_bytes()
        r, s = decode_dss_signature(self._key.sign(message, ec.ECDSA(SHA384())))
        return message + snp_report.pad_signature(r, s)

    @classmethod
    def _parse(cls, content: bytes, path: Path, measurement: bytes) -> Simulator:
        try:
            key = load_pem_private_key(content, password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ConfigError(f"{path}: holds no simulator")
            certificates = content[content.index(b"-----BEGIN CERTIFICATE-----") :]
            return cls(key, certificates, _guest(measurement, "Milan"))
        except (ValueError, TypeError, Refused) as error:
            raise ConfigError(f"{path}: holds no simulator ({error})") from error

    def _write(self, path: Path) -> None:
        private = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private + self.certificates)


def _guest(measurement: bytes, family: str) -> SnpReport:
    tcb = sum(TCB[part] << 8 * place for place, part in enumerate(snp_report.TCB_PARTS[family]) if part is not None)
    return SnpReport(
        measurement=measurement,
        cpu_family=FAMILIES[family][0],
        cpu_model=FAMILIES[family][1],
        chip_id=_hardware_id(family).ljust(64, b"\0"),
        report_id=os.urandom(32),
        current_tcb=tcb,
        reported_tcb=tcb,
        committed_tcb=tcb,
        launch_tcb=tcb,
    )


def _authority(name: str, key: rsa.RSAPublicKey, issuer: str, issuer_key: rsa.RSAPrivateKey) -> x509.Certificate:
    builder = (
        _builder(name, issuer, VALID_UNTIL)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    return builder.sign(issuer_key, SHA384(), rsa_padding=_PSS)


def _leaf(
    key: ec.EllipticCurvePublicKey, issuer_key: rsa.RSAPrivateKey, valid_until: datetime, family: str
) -> x509.Certificate:
    """Return a VCEK with AMD's extensions. Its serial number is 1, since AMD's 0 is what libraries refuse to write."""
    builder = _builder("SEV-VCEK", f"SEV-{family}", valid_until).public_key(key).serial_number(1)
    for oid, value in _extensions(family):
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(issuer_key, SHA384(), rsa_padding=_PSS)


def _extensions(family: str) -> Iterable[tuple[str, bytes]]:
    product = f"{family}-B0".encode()
    yield OID + "2", bytes((0x16, len(product))) + product
    for part in filter(None, snp_report.TCB_PARTS[family]):
        version = TCB[part]
        yield TCB_OIDS[part], b"\2\1" + bytes((version,)) if version < 0x80 else b"\2\2\0" + bytes((version,))
    yield HARDWARE_ID_OID, _hardware_id(family)


def _hardware_id(family: str) -> bytes:
    return CHIP_ID[:8] if family == "Turin" else CHIP_ID


def _builder(name: str, issuer: str, valid_until: datetime) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=_name(issuer), subject_name=_name(name), not_valid_before=VALID_FROM, not_valid_after=valid_until
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Pilotlight simulator"),
            x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name),
        ]
    )


def _pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
