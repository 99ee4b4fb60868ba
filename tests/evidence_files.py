"""Real evidence that others captured. It lies beside the checkout, in shared/data/evidence; without it, tests skip."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pytest

from pilotlight.confidential.appraisal import Evidence, Kind

DIRECTORIES = [parent / "shared/data/evidence" for parent in Path(__file__).resolve().parents]


def evidence_file(name: str) -> bytes:
    """Return a recorded file, or skip the test where it is not on this machine."""
    for directory in DIRECTORIES:
        if (directory / name).is_file():
            return (directory / name).read_bytes()
    pytest.skip(f"the evidence {name} is not on this machine; it belongs into shared/data/evidence beside the checkout")


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@dataclass(frozen=True)
class Vector:
    """Recorded evidence that is genuine at ``at``; ``nonce`` is the one in it, ``measurement`` names a claim of it."""

    evidence: Evidence
    at: datetime
    nonce: bytes
    measurement: tuple[str, str]
    is_debug: bool = False


@cache
def snp(family: str) -> Evidence:
    certificates = b"".join(evidence_file(f"snp/{family}_{name}.pem") for name in ("vcek", "ask", "ark"))
    return Evidence(Kind.SEV_SNP, evidence_file(f"snp/{family}_attestation_report.bin"), certificates)


def snp_vector(family: str) -> Vector:
    evidence = snp(family)
    return Vector(evidence, utc("2026-11-01"), evidence.body[80:144], ("measurement", evidence.body[144:192].hex()))


@cache
def tdx() -> Vector:
    quote = evidence_file("tdx/tdx_quote").rstrip(b"\0") + b"\0"  # a PEM text and its end
    evidence = Evidence(Kind.TDX, quote, b"", {"tdx": evidence_file("tdx/tdx_quote_collateral.json")})
    return Vector(evidence, utc("2025-06-20"), quote[568:632], ("mr_td", quote[184:232].hex()))


@cache
def nitro() -> Vector:
    body = base64.b64decode(evidence_file("nitro/valid-attestation-doc.b64"))
    nonce = body[body.index(b"enonceY\x01\x00") + 9 :][:256]
    pcr3 = "4a9329d69c836267b18abbf9f4a388"
    assert bytes.fromhex(pcr3) in body
    return Vector(Evidence(Kind.NITRO, body), utc("2023-09-18T15:10"), nonce, ("pcr0", "00" * 48), is_debug=True)


@cache
def azure_vtpm(version: int) -> Vector:
    body = evidence_file(f"azure_vtpm/evidence-v{version}.json").strip()
    evidence = Evidence(Kind.AZURE_VTPM_SNP, body, evidence_file("azure_vtpm/milan_ask_ark_asvk.pem"))
    return Vector(evidence, utc("2026-11-01"), b"challenge", ("vmpl", "0"))


@cache
def nvidia_gpu(family: str) -> Vector:
    body = evidence_file(f"nvidia/{family}AttestationReport.txt").strip()
    evidence = Evidence(Kind.NVIDIA_GPU, body, evidence_file(f"nvidia/{family}CertChain.txt"))
    return Vector(evidence, utc("2026-11-01"), bytes.fromhex(body.decode())[4:36], ("rim", "missing"))


VECTORS: dict[str, Callable[[], Vector]] = {
    "snp-milan": lambda: snp_vector("milan"),
    "snp-genoa": lambda: snp_vector("genoa"),
    "tdx": tdx,
    "nitro": nitro,
    "azure-vtpm-v0": lambda: azure_vtpm(0),
    "azure-vtpm-v1": lambda: azure_vtpm(1),
    "gpu-hopper": lambda: nvidia_gpu("hopper"),
    "gpu-blackwell": lambda: nvidia_gpu("blackwell"),
}
"""All recorded evidence that a vendor's pinned root vouches for."""
