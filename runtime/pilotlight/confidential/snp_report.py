"""The attestation report of AMD SEV-SNP: 1,184 bytes, read and written.

Source: AMD, SEV Secure Nested Paging Firmware ABI Specification (56860), tables "ATTESTATION_REPORT Structure",
"TCB_VERSION Structure" and "Signature Encoding for ECDSA P-384".
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

from pilotlight.confidential.appraisal import Problem, Refused

NUM_BYTES = 1184
NUM_SIGNED_BYTES = 672
VERSIONS = (2, 3, 4, 5)
ECDSA_P384_SHA384 = 1
NUM_SCALAR_BYTES = 72
"""r and s are little-endian and padded to this."""

POLICY_SMT = 1 << 16
POLICY_RESERVED_ONE = 1 << 17
POLICY_MIGRATION_AGENT = 1 << 18
POLICY_DEBUG = 1 << 19

_LAYOUT = struct.Struct("<IIQ16s16sIIQQII64s48s32s48s48s32s32sQBBB21s64sQ3sB3sBQQQ152s")
TCB_PARTS = {
    "Milan": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Genoa": ("bootloader", "tee", None, None, None, None, "snp", "microcode"),
    "Turin": ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode"),
}
"""What the eight bytes of a TCB version mean, by the family of the processor."""
CPUID_FAMILIES = {
    "Milan": ((0x19, 0x00, 0x0F),),
    "Genoa": ((0x19, 0x10, 0x1F), (0x19, 0xA0, 0xAF)),
    "Turin": ((0x1A, 0x00, 0x11),),
}
"""CPUID family, first and last model of each: reports name them from version 3 on."""


@dataclass(frozen=True, slots=True)
class SnpReport:
    """All fields of a report but its signature, in their order. ``*_tcb`` are eight bytes as a little-endian number."""

    version: int = 2
    guest_svn: int = 0
    policy: int = POLICY_RESERVED_ONE | POLICY_SMT
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    vmpl: int = 0
    signature_algorithm: int = ECDSA_P384_SHA384
    current_tcb: int = 0
    platform: int = 0
    key_flags: int = 0
    reserved_1: int = 0
    report_data: bytes = bytes(64)
    measurement: bytes = bytes(48)
    host_data: bytes = bytes(32)
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    report_id: bytes = bytes(32)
    migration_agent_id: bytes = b"\xff" * 32
    reported_tcb: int = 0
    cpu_family: int = 0
    cpu_model: int = 0
    cpu_stepping: int = 0
    reserved_2: bytes = bytes(21)
    chip_id: bytes = bytes(64)
    committed_tcb: int = 0
    current_version: bytes = bytes(3)
    reserved_3: int = 0
    committed_version: bytes = bytes(3)
    reserved_4: int = 0
    launch_tcb: int = 0
    launch_mitigations: int = 0
    current_mitigations: int = 0
    reserved_5: bytes = bytes(152)

    @property
    def debug(self) -> bool:
        return bool(self.policy & POLICY_DEBUG)

    @property
    def signing_key(self) -> int:
        """0: VCEK, of the chip. 1: VLEK, of a cloud provider. 7: none."""
        return self.key_flags >> 2 & 7

    @property
    def chip_id_masked(self) -> bool:
        return bool(self.key_flags & 2)

    def signed_bytes(self) -> bytes:
        """Return the part of the report that the signature covers."""
        return _LAYOUT.pack(*astuple(self))


def parse(content: bytes) -> tuple[SnpReport, bytes]:
    """Return a report and its signature as r ‖ s, 48 bytes each, big-endian.

    Raises:
        Refused: it is no report of a version that is known, or what has to be zero is not.
    """
    if len(content) != NUM_BYTES:
        raise Refused(Problem.MALFORMED, f"a report has {NUM_BYTES} bytes, this one {len(content)}")
    report = SnpReport(*_LAYOUT.unpack(content[:NUM_SIGNED_BYTES]))
    _check(report)
    return report, _signature(content[NUM_SIGNED_BYTES:])


def tcb_parts(tcb: int, family: str) -> dict[str, int]:
    """Return the security versions of a TCB by the names of their parts."""
    parts = zip(TCB_PARTS[family], tcb.to_bytes(8, "little"), strict=True)
    return {name: version for name, version in parts if name is not None}


def pad_signature(r: int, s: int) -> bytes:
    """Return a signature as it stands at the end of a report."""
    return r.to_bytes(NUM_SCALAR_BYTES, "little") + s.to_bytes(NUM_SCALAR_BYTES, "little") + bytes(368)


def _check(report: SnpReport) -> None:
    if report.version not in VERSIONS:
        raise Refused(Problem.MALFORMED, f"reports of version {report.version} are not known")
    if report.signature_algorithm != ECDSA_P384_SHA384:
        raise Refused(Problem.MALFORMED, f"the signature algorithm {report.signature_algorithm} is not known")
    if not report.policy & POLICY_RESERVED_ONE:
        raise Refused(Problem.MALFORMED, "the guest's policy lacks its reserved bit")
    if report.vmpl > 3:
        raise Refused(Problem.MALFORMED, f"there is no VMPL {report.vmpl}")
    if report.signing_key not in (0, 1):
        raise Refused(Problem.SIGNATURE, f"it is signed with the key {report.signing_key}, neither VCEK nor VLEK")


def _signature(content: bytes) -> bytes:
    r = int.from_bytes(content[:NUM_SCALAR_BYTES], "little")
    s = int.from_bytes(content[NUM_SCALAR_BYTES : 2 * NUM_SCALAR_BYTES], "little")
    if any(content[2 * NUM_SCALAR_BYTES :]) or max(r, s) >> 384:
        raise Refused(Problem.SIGNATURE, "the signature is not one of P-384")
    return r.to_bytes(48) + s.to_bytes(48)
