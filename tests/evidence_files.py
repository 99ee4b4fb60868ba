"""Real evidence that others captured. It lies beside the checkout, in shared/data/evidence; without it, tests skip."""

from __future__ import annotations

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


@cache
def snp(family: str) -> Evidence:
    certificates = b"".join(evidence_file(f"snp/{family}_{name}.pem") for name in ("vcek", "ask", "ark"))
    return Evidence(Kind.SEV_SNP, evidence_file(f"snp/{family}_attestation_report.bin"), certificates)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)
