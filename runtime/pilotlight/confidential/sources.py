"""Where evidence comes from: the machine's own interfaces, or the simulator.

None of the hardware sources has ever run on the hardware: they are written to the kernel's and the vendors' documents
and tested against fakes of their interfaces. So a start appraises what they give before it says anything about it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import os
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pilotlight.confidential.appraisal import Evidence, Kind
from pilotlight.confidential.binding import device_nonce
from pilotlight.errors import EvidenceUnavailable

TSM_REPORTS = Path("/sys/kernel/config/tsm/report")
SEV_GUEST = Path("/dev/sev-guest")
NSM = Path("/dev/nsm")
MAX_ATTEMPTS = 3
NUM_SNP_REPORT_BYTES = 1184
COLLATERAL = {
    Kind.SEV_SNP: ("crl",),
    Kind.TDX: ("tdx",),
    Kind.NVIDIA_GPU: ("driver_rim", "vbios_rim"),
    Kind.SIMULATED: ("crl",),
    Kind.SIMULATED_GPU: ("driver_rim", "vbios_rim"),
}
"""What each kind of evidence can be completed by."""


class Source(Protocol):
    """Gives evidence that holds 64 bytes of report data; may block."""

    def attest(self, report_data: bytes) -> Evidence:
        """Raises ``EvidenceUnavailable`` where there is none at present."""


class DeviceSource(Protocol):
    """Gives the evidence of all GPUs of this machine for a 32-byte nonce; may block."""

    def attest_devices(self, nonce: bytes) -> tuple[Evidence, ...]:
        """Raises ``EvidenceUnavailable`` where there is none at present."""


class Composite:
    """A processor's evidence and its GPUs', whose nonce is made of the processor's report data."""

    def __init__(self, cpu: Source, gpus: DeviceSource) -> None:
        self._cpu = cpu
        self._gpus = gpus

    def attest(self, report_data: bytes) -> Evidence:
        evidence = self._cpu.attest(report_data)
        return replace(evidence, devices=self._gpus.attest_devices(device_nonce(report_data)))


class Completed:
    """A source whose evidence is completed by what vendors publish, from files that somebody else renews."""

    def __init__(self, source: Source, files: Mapping[str, Path]) -> None:
        self._source = source
        self._files = files

    def attest(self, report_data: bytes) -> Evidence:
        evidence = self._completed(self._source.attest(report_data))
        return replace(evidence, devices=tuple(self._completed(device) for device in evidence.devices))

    def _completed(self, evidence: Evidence) -> Evidence:
        names = [name for name in COLLATERAL.get(evidence.kind, ()) if name in self._files]
        try:
            found = {name: self._files[name].read_bytes() for name in names}
        except OSError as error:
            raise EvidenceUnavailable(f"{error.filename}: {os.strerror(error.errno or 0)}") from error
        return replace(evidence, collateral={**evidence.collateral, **found})


def detect(certificates: bytes = b"") -> Source | None:
    """Return the source that this machine has, with its GPUs where they are confidential; None where it has none.

    ``certificates`` (PEM) are what the hardware does not give itself: AMD's chain, say.
    """
    cpu: Source | None = None
    if TSM_REPORTS.is_dir():
        cpu = ConfigfsTsm(TSM_REPORTS, certificates)
    elif SEV_GUEST.exists():
        cpu = SevGuest(SEV_GUEST, certificates)
    elif NSM.exists():
        cpu = NitroSecurityModule(NSM)
    gpus = NvidiaGpus.detect() if cpu is not None else None
    return cpu if cpu is None or gpus is None else Composite(cpu, gpus)


class ConfigfsTsm:
    """SNP and TDX through Linux's one interface for both. Untested on hardware.

    Source: Linux, Documentation/ABI/testing/configfs-tsm-report.
    """

    KINDS = {"sev_guest": Kind.SEV_SNP, "tdx_guest": Kind.TDX}  # noqa: RUF012

    def __init__(self, directory: Path, certificates: bytes = b"") -> None:
        self._directory = directory
        self._certificates = certificates

    def attest(self, report_data: bytes) -> Evidence:
        try:
            for _ in range(MAX_ATTEMPTS):
                evidence = self._attempt(report_data)
                if evidence is not None:
                    return evidence
        except OSError as error:
            raise EvidenceUnavailable(f"{self._directory}: {os.strerror(error.errno or 0)}") from error
        raise EvidenceUnavailable(f"{self._directory}: somebody else changes our entry")

    def _attempt(self, report_data: bytes) -> Evidence | None:
        """Make one report in a directory of its own; None if what was read does not belong together."""
        entry = self._directory / f"pilotlight-{secrets.token_hex(8)}"
        entry.mkdir()  # the kernel fills it
        try:
            before = int((entry / "generation").read_text())
            (entry / "inblob").write_bytes(report_data)
            body = (entry / "outblob").read_bytes()
            provider = (entry / "provider").read_text().strip()
            auxiliary = self._auxiliary(entry)
            if int((entry / "generation").read_text()) != before + 1:
                return None
        finally:
            entry.rmdir()  # of configfs: its files go with it
        kind = self.KINDS.get(provider)
        if kind is None:
            raise EvidenceUnavailable(f"{self._directory}: the provider {provider!r} is not known")
        return Evidence(kind, body, pem_of_table(auxiliary) + self._certificates)

    def _auxiliary(self, entry: Path) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return (entry / "auxblob").read_bytes()
        return b""


class SevGuest:
    """SNP through its own device, on kernels without configfs-tsm. Untested on hardware.

    Source: Linux, include/uapi/linux/sev-guest.h: SNP_GET_REPORT; AMD 56860, MSG_REPORT_RSP.
    """

    GET_REPORT = 0xC0205300
    """_IOWR('S', 0x0, struct snp_guest_request_ioctl), which has 32 bytes."""
    _REQUEST = struct.Struct("<64sI28s")
    _IOCTL = struct.Struct("<B7xQQQ")
    _NUM_RESPONSE_BYTES = 4000

    def __init__(self, device: Path, certificates: bytes = b"", ioctl: Callable[..., Any] = fcntl.ioctl) -> None:
        self._device = device
        self._certificates = certificates
        self._ioctl = ioctl

    def attest(self, report_data: bytes) -> Evidence:
        request = ctypes.create_string_buffer(self._REQUEST.pack(report_data, 0, bytes(28)))
        response = ctypes.create_string_buffer(self._NUM_RESPONSE_BYTES)
        arguments = self._IOCTL.pack(1, ctypes.addressof(request), ctypes.addressof(response), 0)
        try:
            with self._device.open("rb+", buffering=0) as device:
                self._ioctl(device, self.GET_REPORT, bytearray(arguments))
        except OSError as error:
            raise EvidenceUnavailable(f"{self._device}: {os.strerror(error.errno or 0)}") from error
        status, size = struct.unpack_from("<II", response.raw)
        if status != 0 or size != NUM_SNP_REPORT_BYTES:
            raise EvidenceUnavailable(f"{self._device}: the firmware answers with status {status:#x}")
        return Evidence(Kind.SEV_SNP, response.raw[32 : 32 + size], self._certificates)


class NitroSecurityModule:
    """A document of an AWS Nitro enclave. Untested on hardware. The report data is in its ``nonce``.

    Source: aws/aws-nitro-enclaves-nsm-api, src/driver and docs/attestation_process.md: a request and a response in
    CBOR, by an ioctl whose argument names both buffers.
    """

    EXCHANGE = 0xC0200A00
    """_IOWR(0x0A, 0, struct nsm_message), two buffers of address and length."""
    _MESSAGE = struct.Struct("<QQQQ")
    _NUM_RESPONSE_BYTES = 0x3000

    def __init__(self, device: Path, public_key: bytes | None = None, ioctl: Callable[..., Any] = fcntl.ioctl) -> None:
        self._device = device
        self._public_key = public_key
        self._ioctl = ioctl

    def attest(self, report_data: bytes) -> Evidence:
        import cbor2

        asked = {"user_data": None, "nonce": report_data, "public_key": self._public_key}
        content = cbor2.dumps({"Attestation": asked})
        request = ctypes.create_string_buffer(content, len(content))
        response = ctypes.create_string_buffer(self._NUM_RESPONSE_BYTES)
        message = bytearray(
            self._MESSAGE.pack(ctypes.addressof(request), len(content), ctypes.addressof(response), len(response))
        )
        try:
            with self._device.open("rb+", buffering=0) as device:
                self._ioctl(device, self.EXCHANGE, message)
        except OSError as error:
            raise EvidenceUnavailable(f"{self._device}: {os.strerror(error.errno or 0)}") from error
        size = self._MESSAGE.unpack(bytes(message))[3]
        try:
            answer = cbor2.loads(response.raw[:size])
        except (cbor2.CBORDecodeError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise EvidenceUnavailable(f"{self._device}: the module's answer cannot be read") from error
        inner = answer.get("Attestation") if isinstance(answer, dict) else None
        document = inner.get("document") if isinstance(inner, dict) else None
        if not isinstance(document, bytes):
            raise EvidenceUnavailable(f"{self._device}: the module answers {str(answer)[:80]}")
        return Evidence(Kind.NITRO, document)


class NvidiaGpus:
    """All GPUs in confidential mode, through NVML. Untested on hardware.

    Source: NVML API reference, "Confidential Compute"; nvidia-ml-py.
    """

    _NUM_NONCE_BYTES = 32

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    @classmethod
    def detect(cls) -> NvidiaGpus | None:
        """Return them if there is a driver and it runs confidential GPUs.

        Raises:
            EvidenceUnavailable: it runs them in a mode for developers, or simulates.
        """
        try:
            import pynvml
        except ImportError:
            return None
        return cls.of(pynvml)

    @classmethod
    def of(cls, nvml: Any) -> NvidiaGpus | None:
        try:
            nvml.nvmlInit()
            state = nvml.nvmlSystemGetConfComputeState()
        except nvml.NVMLError:
            return None
        if state.ccFeature != nvml.NVML_CC_SYSTEM_FEATURE_ENABLED:
            return None
        if state.environment != nvml.NVML_CC_SYSTEM_ENVIRONMENT_PROD:
            raise EvidenceUnavailable("the GPUs' confidential mode is a simulation")
        if state.devToolsMode != nvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF:
            raise EvidenceUnavailable("the GPUs are in their mode for developers, which protects nothing")
        return cls(nvml)

    def attest_devices(self, nonce: bytes) -> tuple[Evidence, ...]:
        if len(nonce) != self._NUM_NONCE_BYTES:
            raise ValueError(f"a GPU's nonce has {self._NUM_NONCE_BYTES} bytes")
        try:
            handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(self._nvml.nvmlDeviceGetCount())]
            return tuple(self._attest(handle, nonce) for handle in handles)
        except self._nvml.NVMLError as error:
            raise EvidenceUnavailable(f"NVML: {error}") from error

    def _attest(self, handle: Any, nonce: bytes) -> Evidence:
        report = self._nvml.nvmlDeviceGetConfComputeGpuAttestationReport(handle, nonce)
        chain = self._nvml.nvmlDeviceGetConfComputeGpuCertificate(handle)
        body = bytes(report.attestationReport[: report.attestationReportSize])
        return Evidence(Kind.NVIDIA_GPU, body, bytes(chain.attestationCertChain[: chain.attestationCertChainSize]))


_ENTRY = struct.Struct("<16sII")


def pem_of_table(table: bytes) -> bytes:
    """Return as PEM what a hypervisor gives along with a report: AMD's table of certificates.

    Each entry is a GUID, an offset and a length, up to one of zeros. What is no certificate, or outside, is left out.

    Source: AMD 56421 (GHCB), "SNP Extended Guest Request".
    """
    found = []
    for guid, offset, length in _ENTRY.iter_unpack(table[: len(table) // _ENTRY.size * _ENTRY.size]):
        if guid == bytes(16):
            break
        content = table[offset : offset + length]
        if len(content) == length and content[:1] == b"\x30":
            found.append(_pem(content))
    return b"".join(found)


def _pem(der: bytes) -> bytes:
    lines: Sequence[bytes] = [base64.b64encode(der[start : start + 48]) for start in range(0, len(der), 48)]
    return b"\n".join((b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----\n"))
