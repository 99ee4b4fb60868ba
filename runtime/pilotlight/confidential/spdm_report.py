"""The attestation report of an NVIDIA GPU: an SPDM 1.1 request for measurements, and the response to it.

    request (37) │ header (8) │ blocks │ nonce (32) │ length, opaque fields │ signature (96)

Source: DMTF DSP0274 (SPDM 1.1), GET_MEASUREMENTS and MEASUREMENTS; NVIDIA/attestation-sdk for the opaque fields.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from pilotlight.confidential.appraisal import Problem, Refused

NUM_REQUEST_BYTES = 37
NUM_NONCE_BYTES = 32
NUM_SIGNATURE_BYTES = 96
SPDM_1_1 = 0x11
GET_MEASUREMENTS = 0xE0
MEASUREMENTS = 0x60
DMTF = 1
NUM_MEASUREMENT_BYTES = 48
DRIVER_VERSION, VBIOS_VERSION, NVDEC0_STATUS, FWID = 3, 6, 11, 20
NVDEC0_ENABLED = b"\xaa"


@dataclass(frozen=True, slots=True)
class SpdmReport:
    """``measurements`` are by index as reference values count them: from 0, one less than SPDM's blocks."""

    nonce: bytes
    measurements: Mapping[int, bytes]
    opaque: Mapping[int, bytes]
    signed: bytes
    signature: bytes

    @property
    def driver_version(self) -> str:
        return self.opaque.get(DRIVER_VERSION, b"").rstrip(b"\0").decode("ascii", "replace")

    @property
    def vbios_version(self) -> str:
        """As NVIDIA writes it, ``96.00.5E.00.01``: four bytes backwards, and one more."""
        raw = self.opaque.get(VBIOS_VERSION, b"")
        return ".".join(f"{byte:02X}" for byte in (*reversed(raw[:4]), *raw[4:5])) if len(raw) >= 5 else ""


def parse(content: bytes) -> SpdmReport:
    """Read a report.

    Raises:
        Refused: it is none.
    """
    try:
        return _parse(content)
    except (struct.error, IndexError) as error:
        raise Refused(Problem.MALFORMED, "the report ends early") from error


def _parse(content: bytes) -> SpdmReport:
    request, response = content[:NUM_REQUEST_BYTES], content[NUM_REQUEST_BYTES:]
    if len(request) < NUM_REQUEST_BYTES or request[0] != SPDM_1_1 or request[1] != GET_MEASUREMENTS:
        raise Refused(Problem.MALFORMED, "the report does not begin with a request for measurements by SPDM 1.1")
    if response[0] != SPDM_1_1 or response[1] != MEASUREMENTS:
        raise Refused(Problem.MALFORMED, "the report holds no measurements by SPDM 1.1")
    num_blocks, size = response[4], int.from_bytes(response[5:8], "little")
    blocks, at = _take(response, 8, size)
    _, at = _take(response, at, NUM_NONCE_BYTES)  # the GPU's own
    (opaque_size,) = struct.unpack_from("<H", response, at)
    opaque, at = _take(response, at + 2, opaque_size)
    signature, at = _take(response, at, NUM_SIGNATURE_BYTES)
    if at != len(response):
        raise Refused(Problem.MALFORMED, "something follows the report")
    return SpdmReport(
        nonce=request[4 : 4 + NUM_NONCE_BYTES],
        measurements=_measurements(blocks, num_blocks),
        opaque=_opaque(opaque),
        signed=content[:-NUM_SIGNATURE_BYTES],
        signature=signature,
    )


def _measurements(blocks: bytes, num_blocks: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    for _ in range(num_blocks):
        index, specification, size = struct.unpack_from("<BBH", blocks, at)
        block, at = _take(blocks, at + 4, size)
        _, value_size = struct.unpack_from("<BH", block)
        value, end = _take(block, 3, value_size)
        if specification != DMTF or end != len(block) or index == 0 or index - 1 in found:
            raise Refused(Problem.MALFORMED, f"the measurement {index} is not as SPDM has it, or is there twice")
        found[index - 1] = value
    if at != len(blocks):
        raise Refused(Problem.MALFORMED, "the report has more measurements than it says")
    return found


def _opaque(content: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from("<HH", content, at)
        value, at = _take(content, at + 4, size)
        if kind in found:
            raise Refused(Problem.MALFORMED, f"the opaque field {kind} is there twice")
        found[kind] = value
    return found


def _take(content: bytes, at: int, size: int) -> tuple[bytes, int]:
    taken = content[at : at + size]
    if len(taken) != size:
        raise IndexError
    return taken, at + size
