"""Sources of evidence, over fakes of the kernel's and the driver's interfaces. No hardware has ever seen them."""

from __future__ import annotations

import base64
import ctypes
import errno
import hashlib
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
import pytest

from pilotlight.confidential import sources
from pilotlight.confidential.appraisal import Evidence, Kind
from pilotlight.confidential.binding import device_nonce
from pilotlight.confidential.sources import (
    Composite,
    ConfigfsTsm,
    NitroSecurityModule,
    NvidiaGpus,
    SevGuest,
    detect,
    pem_of_table,
)
from pilotlight.errors import EvidenceUnavailable

REPORT_DATA = bytes(range(64))
REPORT = bytes(1184)
CERTIFICATE = b"\x30" + bytes(99)


class FakeTsm:
    """The kernel's side of configfs: files appear with the directory, and go with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, provider: str, generations: tuple[int, int] = (0, 1)) -> None:
        self.provider = provider
        self.generations = list(generations)
        self.asked: list[bytes] = []
        self.removed: list[str] = []
        self.auxiliary: bytes | None = None
        monkeypatch.setattr(Path, "mkdir", lambda path: None)
        monkeypatch.setattr(Path, "rmdir", lambda path: self.removed.append(path.name))
        monkeypatch.setattr(Path, "read_text", lambda path: self.read(path.name).decode())
        monkeypatch.setattr(Path, "read_bytes", lambda path: self.read(path.name))
        monkeypatch.setattr(Path, "write_bytes", lambda path, content: self.asked.append(content))

    def read(self, name: str) -> bytes:
        if name == "generation":
            return f"{self.generations.pop(0)}\n".encode()
        if name == "auxblob" and self.auxiliary is None:
            raise FileNotFoundError(errno.ENOENT, name)
        return {"provider": f"{self.provider}\n".encode(), "outblob": REPORT, "auxblob": self.auxiliary or b""}[name]


def table_of(*contents: bytes) -> bytes:
    entry = struct.Struct("<16sII")
    offset = entry.size * (len(contents) + 1)
    entries = b""
    for content in contents:
        entries += entry.pack(b"g" * 16, offset, len(content))
        offset += len(content)
    return entries + entry.pack(bytes(16), 0, 0) + b"".join(contents)


@pytest.mark.parametrize(("provider", "kind"), [("sev_guest", Kind.SEV_SNP), ("tdx_guest", Kind.TDX)])
def test_configfs_gives_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, provider: str, kind: Kind) -> None:
    kernel = FakeTsm(monkeypatch, provider)
    kernel.auxiliary = table_of(CERTIFICATE)
    evidence = ConfigfsTsm(Path("/tsm"), b"more").attest(REPORT_DATA)
    assert (evidence.kind, evidence.body, kernel.asked) == (kind, REPORT, [REPORT_DATA])
    assert evidence.certificates.endswith(b"-----END CERTIFICATE-----\nmore")
    assert len(kernel.removed) == 1


def test_a_report_for_somebody_else_s_data_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeTsm(monkeypatch, "sev_guest", (0, 2))
    kernel.generations += [0, 1]
    assert ConfigfsTsm(Path("/tsm")).attest(REPORT_DATA).certificates == b""
    assert len(kernel.asked) == len(kernel.removed) == 2
    kernel.generations += [0, 2] * 3
    with pytest.raises(EvidenceUnavailable, match="somebody else"):
        ConfigfsTsm(Path("/tsm")).attest(REPORT_DATA)


def test_another_provider_and_a_kernel_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EvidenceUnavailable, match="No such file"):
        ConfigfsTsm(tmp_path / "missing").attest(REPORT_DATA)
    kernel = FakeTsm(monkeypatch, "arm_cca_guest")
    with pytest.raises(EvidenceUnavailable, match="'arm_cca_guest' is not known"):
        ConfigfsTsm(Path("/tsm")).attest(REPORT_DATA)
    assert len(kernel.removed) == 1


def test_a_table_of_certificates_is_read_up_to_its_end() -> None:
    other = b"\x30" + b"x" * 60
    pem = pem_of_table(table_of(CERTIFICATE, b"no certificate", other))
    assert [base64.b64decode(text.split("-----")[0]) for text in pem.decode().split("CERTIFICATE-----\n")[1::2]] == [
        CERTIFICATE,
        other,
    ]
    for end in range(len(table_of(CERTIFICATE))):
        assert pem_of_table(table_of(CERTIFICATE)[:end]) == b""


def firmware(status: int, size: int) -> Any:
    def ioctl(device: Any, number: int, arguments: bytearray) -> int:
        assert number == SevGuest.GET_REPORT
        version, request, response, _ = struct.unpack("<B7xQQQ", arguments)
        assert version == 1
        assert ctypes.string_at(request, 96) == REPORT_DATA + bytes(32)
        content = struct.pack("<II24x", status, size) + b"r" * size
        ctypes.memmove(response, content, len(content))
        return 0

    return ioctl


def test_the_device_of_snp(tmp_path: Path) -> None:
    device = tmp_path / "sev-guest"
    device.touch()
    evidence = SevGuest(device, b"chain", firmware(0, 1184)).attest(REPORT_DATA)
    assert evidence == Evidence(Kind.SEV_SNP, b"r" * 1184, b"chain")
    for status, size in ((0x16, 1184), (0, 1183)):
        with pytest.raises(EvidenceUnavailable, match="status"):
            SevGuest(device, b"", firmware(status, size)).attest(REPORT_DATA)
    with pytest.raises(EvidenceUnavailable, match="No such file"):
        SevGuest(tmp_path / "missing").attest(REPORT_DATA)


def security_module(answer: Any) -> Any:
    def ioctl(device: Any, number: int, message: bytearray) -> int:
        assert number == NitroSecurityModule.EXCHANGE
        request, size, response, room = struct.unpack("<QQQQ", message)
        asked = cbor2.loads(ctypes.string_at(request, size))
        assert asked == {"Attestation": {"user_data": None, "nonce": REPORT_DATA, "public_key": b"key"}}
        content = cbor2.dumps(answer)
        assert len(content) <= room
        ctypes.memmove(response, content, len(content))
        message[:] = struct.pack("<QQQQ", request, size, response, len(content))
        return 0

    return ioctl


def test_the_security_module_of_nitro(tmp_path: Path) -> None:
    device = tmp_path / "nsm"
    device.touch()
    answer = {"Attestation": {"document": b"document"}}
    module = NitroSecurityModule(device, b"key", security_module(answer))
    assert module.attest(REPORT_DATA) == Evidence(Kind.NITRO, b"document")
    bad: Any
    for bad in ({"Error": "InvalidOperation"}, ["?"], {"Attestation": {}}, {"Attestation": []}):
        with pytest.raises(EvidenceUnavailable, match="answers"):
            NitroSecurityModule(device, b"key", security_module(bad)).attest(REPORT_DATA)
    broken = cbor2.CBORTag(2, "not bytes")  # a number that is none: the module is on the host's side
    with pytest.raises(EvidenceUnavailable, match="cannot be read"):
        NitroSecurityModule(device, b"key", security_module(broken)).attest(REPORT_DATA)


class FakeNvml:
    """Two GPUs, in the given state."""

    NVML_CC_SYSTEM_FEATURE_ENABLED = 1
    NVML_CC_SYSTEM_ENVIRONMENT_PROD = 2
    NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF = 0

    class NVMLError(Exception):
        pass

    def __init__(self, environment: int = 2, feature: int = 1, dev_tools: int = 0, has_driver: bool = True) -> None:
        self._state = SimpleNamespace(environment=environment, ccFeature=feature, devToolsMode=dev_tools)
        self._has_driver = has_driver

    def nvmlInit(self) -> None:
        if not self._has_driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlSystemGetConfComputeState(self) -> Any:
        return self._state

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, handle: int, nonce: bytes) -> Any:
        content = [handle, *nonce]
        return SimpleNamespace(attestationReport=[*content, 0, 0], attestationReportSize=len(content))

    def nvmlDeviceGetConfComputeGpuCertificate(self, handle: int) -> Any:
        return SimpleNamespace(attestationCertChain=[*b"chain", 0], attestationCertChainSize=5)


class FakeCpu:
    def attest(self, report_data: bytes) -> Evidence:
        return Evidence(Kind.SEV_SNP, report_data)


def test_gpus_attest_to_the_processor_s_report() -> None:
    gpus = NvidiaGpus.of(FakeNvml())
    assert gpus is not None
    evidence = Composite(FakeCpu(), gpus).attest(REPORT_DATA)
    nonce = hashlib.sha256(REPORT_DATA).digest()
    assert nonce == device_nonce(REPORT_DATA)
    assert [device.body for device in evidence.devices] == [bytes([0]) + nonce, bytes([1]) + nonce]
    assert {device.certificates for device in evidence.devices} == {b"chain"}


def test_gpus_that_are_not_confidential_are_none() -> None:
    assert NvidiaGpus.of(FakeNvml(has_driver=False)) is None
    assert NvidiaGpus.of(FakeNvml(feature=0)) is None
    with pytest.raises(EvidenceUnavailable, match="developers"):
        NvidiaGpus.of(FakeNvml(dev_tools=1))
    with pytest.raises(EvidenceUnavailable, match="simulation"):
        NvidiaGpus.of(FakeNvml(environment=1))


def test_the_machine_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TSM_REPORTS", "SEV_GUEST", "NSM"):
        monkeypatch.setattr(sources, name, tmp_path / name)
    monkeypatch.setattr(NvidiaGpus, "detect", lambda: None)
    assert detect() is None
    for name, kind in (("NSM", NitroSecurityModule), ("SEV_GUEST", SevGuest), ("TSM_REPORTS", ConfigfsTsm)):
        (tmp_path / name).mkdir()
        assert isinstance(detect(), kind)
    monkeypatch.setattr(NvidiaGpus, "detect", lambda: NvidiaGpus(FakeNvml()))
    assert isinstance(detect(), Composite)
