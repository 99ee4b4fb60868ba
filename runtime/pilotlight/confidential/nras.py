"""Evidence that NVIDIA's remote attestation service has appraised: a detached EAT over the tokens of the GPUs.

``body`` is the service's answer, ``[["JWT", overall], {"GPU-0": token, …}]``. The overall token holds the digest of
every GPU's token; all are signed by the service, whose keys have to be pinned (``Roots.issuers``). The nonce has 32
bytes.
Source: NVIDIA, NRAS API reference; RFC 9711 (EAT), detached submodules.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import msgspec

from pilotlight.confidential.appraisal import (
    MAX_DEVICES,
    Claim,
    Evidence,
    Finding,
    Problem,
    Reason,
    Refused,
    Roots,
)
from pilotlight.confidential.tokens import Claims, verify_token

ALGORITHM = "ES384"
NUM_NONCE_BYTES = 32
COPIED = {
    "hwmodel": "hwmodel",
    "driver_version": "x-nvidia-gpu-driver-version",
    "vbios_version": "x-nvidia-gpu-vbios-version",
    "measres": "measres",
}


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify the service's tokens, and read them.

    Raises:
        Refused: one of them is not the service's, not valid now, or not of this answer.
    """
    overall_token, device_tokens = _tokens(evidence.body)
    overall = verify_token(overall_token, ALGORITHM, at, roots)
    _check_digests(overall, device_tokens)
    devices = [verify_token(device_tokens[name], ALGORITHM, at, roots) for name in sorted(device_tokens)]
    if {device["iss"] for device in devices} != {overall["iss"]}:
        raise Refused(Problem.ISSUER, "the tokens have several issuers")
    units = [str(device.get("ueid", "")) for device in devices]
    if "" in units or len(set(units)) < len(units):
        raise Refused(Problem.DUPLICATE, "one GPU is given as several, or is not named")
    fresh = nonce is not None and all(_holds(token, nonce) for token in (overall, *devices))
    problems = (*_nonce_problems(nonce, fresh), *_result_problems(overall, devices))
    return Finding(_claims(overall, devices), ("measres",), fresh, ",".join(sorted(units)), problems)


def _tokens(body: bytes) -> tuple[str, dict[str, str]]:
    try:
        (kind, overall), devices = msgspec.json.decode(body, type=tuple[tuple[str, str], dict[str, str]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(Problem.MALFORMED, f"this is no detached EAT ({error})") from error
    if kind != "JWT" or not 1 <= len(devices) <= MAX_DEVICES:
        raise Refused(Problem.MALFORMED, f"this is no detached EAT of 1 to {MAX_DEVICES} GPUs")
    return overall, devices


def _check_digests(overall: Claims, device_tokens: dict[str, str]) -> None:
    expected = {
        name: ["DIGEST", ["SHA-256", hashlib.sha256(token.encode()).hexdigest()]]
        for name, token in device_tokens.items()
    }
    if overall.get("submods") != expected:
        raise Refused(Problem.SIGNATURE, "the tokens of the GPUs are not those that the overall token is over")


def _holds(token: Claims, nonce: bytes) -> bool:
    found = token.get("eat_nonce")
    return len(nonce) == NUM_NONCE_BYTES and isinstance(found, str) and found.lower() == nonce.hex()


def _nonce_problems(nonce: bytes | None, fresh: bool) -> tuple[Reason, ...]:
    if nonce is None or fresh:
        return ()
    return (Reason(Problem.NONCE, "the nonce of a token is not what was asked for"),)


def _result_problems(overall: Claims, devices: list[Claims]) -> tuple[Reason, ...]:
    reasons = []
    if overall.get("x-nvidia-overall-att-result") is not True:
        reasons.append(Reason(Problem.CLAIM, "the service's overall result is not good"))
    for device in devices:
        if device.get("measres") not in ("success", "comparison-successful"):
            reasons.append(Reason(Problem.MEASUREMENT, f"measres is {str(device.get('measres'))[:40]}"))
        if device.get("x-nvidia-gpu-attestation-report-signature-verified") is not True:
            reasons.append(Reason(Problem.SIGNATURE, "the service did not verify the signature of a report"))
        if device.get("secboot") is not True:
            reasons.append(Reason(Problem.CLAIM, "secure boot is not on"))
    return tuple(reasons)


def _claims(overall: Claims, devices: list[Claims]) -> dict[str, Claim]:
    claims: dict[str, Claim] = {
        "issuer": str(overall["iss"]),
        "num_gpus": len(devices),
        "debug": not all(device.get("dbgstat") == "disabled" for device in devices),
    }
    for name, key in COPIED.items():
        claims[name] = _common([device.get(key) for device in devices])
    return claims


def _common(values: list[Any]) -> str:
    """Return what all GPUs say, or all that they say."""
    return ",".join(sorted({str(value)[:100] for value in values}))
