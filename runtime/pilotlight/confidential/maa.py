"""Evidence that Microsoft Azure Attestation has appraised: a token about an SNP or TDX machine.

``body`` is the token. Issuer and keys have to be pinned (``Roots.issuers``). The nonce is the report data, or the
``nonce`` that a client gave to the guest attestation library.
Source: Azure Attestation, "Claim sets" and "Examples of an attestation token".
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pilotlight.confidential.appraisal import Claim, Evidence, Finding, Problem, Reason, Refused, Roots
from pilotlight.confidential.sev_snp import holds
from pilotlight.confidential.tokens import Claims, verify_token

ALGORITHM = "RS256"
NESTED = "x-ms-isolation-tee"
TYPE = "x-ms-attestation-type"
SNP = {
    "measurement": "x-ms-sevsnpvm-launchmeasurement",
    "host_data": "x-ms-sevsnpvm-hostdata",
    "report_data": "x-ms-sevsnpvm-reportdata",
    "id_key_digest": "x-ms-sevsnpvm-idkeydigest",
    "report_id": "x-ms-sevsnpvm-reportid",
    "guest_svn": "x-ms-sevsnpvm-guestsvn",
    "vmpl": "x-ms-sevsnpvm-vmpl",
    "debug": "x-ms-sevsnpvm-is-debuggable",
    "migration_agent_allowed": "x-ms-sevsnpvm-migration-allowed",
    "tcb.bootloader": "x-ms-sevsnpvm-bootloader-svn",
    "tcb.tee": "x-ms-sevsnpvm-tee-svn",
    "tcb.snp": "x-ms-sevsnpvm-snpfw-svn",
    "tcb.microcode": "x-ms-sevsnpvm-microcode-svn",
}
TDX = {
    "mr_td": "tdx_mrtd",
    "rtmr0": "tdx_rtmr0",
    "rtmr1": "tdx_rtmr1",
    "rtmr2": "tdx_rtmr2",
    "rtmr3": "tdx_rtmr3",
    "mr_seam": "tdx_mrseam",
    "report_data": "tdx_report_data",
    "debug": "tdx_td_attributes_debug",
    "tcb_status": "attester_tcb_status",
}
NAMES = {"sevsnpvm": SNP, "tdxvm": TDX}
MEASUREMENTS = {"sevsnpvm": ("measurement",), "tdxvm": ("mr_td",)}
COMPLIANT = "azure-compliant-cvm"


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify the token, and read it.

    Raises:
        Refused: it is not the service's, not valid now, or about no machine that is known here.
    """
    try:
        token = evidence.body.decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise Refused(Problem.MALFORMED, "the token is no JSON Web Token") from error
    given = verify_token(token, ALGORITHM, at, roots)
    machine = given[NESTED] if isinstance(given.get(NESTED), dict) else given
    kind = machine.get(TYPE)
    if not isinstance(kind, str) or kind not in NAMES:
        raise Refused(Problem.KIND, f"the token is about {str(kind)[:40]!r}, no machine that is known here")
    claims = _claims(given, machine, NAMES[kind])
    fresh = nonce is not None and (_in_report(claims, nonce) or _in_payload(given, nonce))
    problems = [] if nonce is None or fresh else [Reason(Problem.NONCE, "the nonce is not what was asked for")]
    if claims.get("compliance", COMPLIANT) != COMPLIANT:
        problems.append(Reason(Problem.CLAIM, f"the service says {claims['compliance']}"))
    unit = str(claims.get("report_id") or given.get("jti") or "")
    return Finding(claims, MEASUREMENTS[kind], fresh, unit, tuple(problems))


def _claims(given: Claims, machine: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Claim]:
    claims: dict[str, Claim] = {"issuer": str(given["iss"])}
    for name, key in names.items():
        value = machine.get(key)
        if isinstance(value, str | int):
            claims[name] = value.lower() if isinstance(value, str) and name != "tcb_status" else value
    if "x-ms-compliance-status" in machine:
        claims["compliance"] = str(machine["x-ms-compliance-status"])[:100]
    claims.setdefault("debug", True)  # what does not say that it is closed is open
    return claims


def _in_report(claims: Mapping[str, Claim], nonce: bytes) -> bool:
    try:
        return holds(bytes.fromhex(str(claims.get("report_data", ""))), nonce)
    except ValueError:
        return False


def _in_payload(given: Claims, nonce: bytes) -> bool:
    """The library gives what the client said in base64; the token holds it, signed by the service, as runtime data."""
    runtime = given.get("x-ms-runtime")
    payload = runtime.get("client-payload") if isinstance(runtime, dict) else None
    found = payload.get("nonce") if isinstance(payload, dict) else None
    return len(nonce) > 0 and found == base64.b64encode(nonce).decode()
