"""The one entry point to all verifiers."""

from __future__ import annotations

import importlib
from datetime import datetime
from types import MappingProxyType
from typing import Protocol

from pilotlight.confidential.appraisal import (
    DEVICE_KINDS,
    Appraisal,
    Evidence,
    Finding,
    Kind,
    Policy,
    Problem,
    Reason,
    Refused,
    Roots,
    judge,
    refusal,
)
from pilotlight.confidential.binding import device_nonce

VERIFIERS = MappingProxyType(
    {
        Kind.SIMULATED: "sev_snp",
        Kind.SEV_SNP: "sev_snp",
        Kind.TDX: "tdx",
        Kind.NITRO: "nitro",
        Kind.AZURE_VTPM_SNP: "azure_vtpm",
        Kind.NVIDIA_GPU: "nvidia_gpu",
        Kind.SIMULATED_GPU: "nvidia_gpu",
        Kind.NRAS: "nras",
        Kind.MAA: "maa",
    }
)
"""The module of each kind. Each is loaded when its kind is first met, since each needs other libraries."""


class Verifier(Protocol):
    def __call__(self, evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
        """Raises ``Refused`` where the evidence proves nothing."""


def appraise(evidence: Evidence, *, nonce: bytes | None, policy: Policy, at: datetime, roots: Roots) -> Appraisal:
    """Appraise evidence, and that of its devices, at an instant.

    ``nonce`` is what the evidence has to hold to be fresh: ``binding.report_data`` of the verifier's own nonce for
    evidence of ours. None accepts recorded evidence, whose label is then ``vector-verified`` at best. ``at`` carries a
    time zone.
    """
    devices = tuple(
        _appraise_device(device, None if nonce is None else device_nonce(nonce), policy, at, roots)
        for device in evidence.devices
    )
    return _appraise_one(evidence, nonce, policy, at, roots, devices)


def _appraise_device(device: Evidence, nonce: bytes | None, policy: Policy, at: datetime, roots: Roots) -> Appraisal:
    if device.kind not in DEVICE_KINDS:
        return refusal(device, Reason(Problem.KIND, f"{device.kind} is no device"))
    if device.devices:
        return refusal(device, Reason(Problem.MALFORMED, "a device has no devices"))
    return _appraise_one(device, nonce, policy.device or Policy(), at, roots, ())


def _appraise_one(
    evidence: Evidence,
    nonce: bytes | None,
    policy: Policy,
    at: datetime,
    roots: Roots,
    devices: tuple[Appraisal, ...],
) -> Appraisal:
    verifier: Verifier = importlib.import_module(f"{__package__}.{VERIFIERS[evidence.kind]}").verify
    try:
        finding = verifier(evidence, nonce=nonce, at=at, roots=roots)
    except Refused as refused:
        return refusal(evidence, refused.reason)
    return judge(evidence, finding, policy, devices)
