"""A simulator of GPUs in confidential mode: real reports under a root that it makes itself. See ``simulator``."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from pilotlight.confidential import chain, spdm_report
from pilotlight.confidential.appraisal import Evidence, Kind
from pilotlight.confidential.simulator import VALID_FROM, VALID_UNTIL

FIRMWARE_ID = bytes(range(48))
OPAQUE = {
    spdm_report.DRIVER_VERSION: b"550.144.03\0",
    spdm_report.VBIOS_VERSION: bytes.fromhex("005e009601000000"),
    spdm_report.NVDEC0_STATUS: b"\x55",
    spdm_report.FWID: FIRMWARE_ID,
}
MEASUREMENTS = {index: bytes([index]) * spdm_report.NUM_MEASUREMENT_BYTES for index in range(64)}


@dataclass(frozen=True)
class SimulatedGpu:
    """One GPU. ``certificates`` are its chain as PEM, the leaf first."""

    key: ec.EllipticCurvePrivateKey
    certificates: bytes
    measurements: Mapping[int, bytes] = field(default_factory=lambda: MEASUREMENTS)
    opaque: Mapping[int, bytes] = field(default_factory=lambda: OPAQUE)

    @property
    def root_fingerprint(self) -> str:
        return chain.fingerprint(chain.load_pem(self.certificates)[-1])

    def attest(self, nonce: bytes) -> Evidence:
        """Return evidence that holds a nonce of 32 bytes."""
        message = report_bytes(nonce, self.measurements, self.opaque)
        r, s = decode_dss_signature(self.key.sign(message, ec.ECDSA(SHA384())))
        return Evidence(Kind.SIMULATED_GPU, message + r.to_bytes(48) + s.to_bytes(48), self.certificates)


class SimulatedGpus:
    """All GPUs of a simulated machine, under one root."""

    def __init__(self, num_gpus: int, valid_until: datetime = VALID_UNTIL) -> None:
        root_key = ec.generate_private_key(ec.SECP384R1())
        root = _certificate("Pilotlight simulated GPU root", root_key, None, VALID_UNTIL)
        self.gpus = [_gpu(f"Simulated GPU {number}", root, root_key, valid_until) for number in range(num_gpus)]

    @property
    def root_fingerprint(self) -> str:
        return self.gpus[0].root_fingerprint

    def attest_devices(self, nonce: bytes) -> tuple[Evidence, ...]:
        return tuple(gpu.attest(nonce) for gpu in self.gpus)


def report_bytes(nonce: bytes, measurements: Mapping[int, bytes], opaque: Mapping[int, bytes]) -> bytes:
    """Return what a GPU signs."""
    request = bytes((spdm_report.SPDM_1_1, spdm_report.GET_MEASUREMENTS, 1, 0xFF)) + nonce + b"\0"
    blocks = b"".join(
        struct.pack("<BBHBH", index + 1, spdm_report.DMTF, len(value) + 3, 1, len(value)) + value
        for index, value in measurements.items()
    )
    header = bytes((spdm_report.SPDM_1_1, spdm_report.MEASUREMENTS, 0, 0, len(measurements)))
    fields = b"".join(struct.pack("<HH", kind, len(value)) + value for kind, value in opaque.items())
    own_nonce = bytes(spdm_report.NUM_NONCE_BYTES)
    return b"".join(
        (request, header, len(blocks).to_bytes(3, "little"), blocks, own_nonce, struct.pack("<H", len(fields)), fields)
    )


def _gpu(
    name: str, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, valid_until: datetime
) -> SimulatedGpu:
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = _certificate(name, key, (root, root_key), valid_until)
    return SimulatedGpu(key, leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    valid_until: datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(
        issuer_name=subject if issuer is None else issuer[0].subject,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=VALID_FROM,
        not_valid_after=valid_until,
    )
    if issuer is None:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return builder.sign(key, SHA384())
    firmware = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.23.133.5.4.1"), b"\x04\x30" + FIRMWARE_ID)
    return builder.add_extension(firmware, critical=False).sign(issuer[1], SHA384())


def with_measurement(gpu: SimulatedGpu, index: int, value: bytes) -> SimulatedGpu:
    """Return a GPU of the same keys on which something else runs."""
    return replace(gpu, measurements={**gpu.measurements, index: value})
