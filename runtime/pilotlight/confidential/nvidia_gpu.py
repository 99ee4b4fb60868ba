"""Evidence of an NVIDIA GPU in confidential mode: its report, its certificates, and reference values for what it runs.

``body`` is the report (binary, or hex as the SDK prints it), ``certificates`` the GPU's chain, ``collateral`` the
reference values ``driver_rim`` and ``vbios_rim``. The nonce has 32 bytes. With both reference values ``rim`` is
``match``; without them nothing is known of what runs on the GPU, which only a policy with ``any_measurement`` accepts,
and then not as hardware.
Source: NVIDIA/attestation-sdk and nvtrust.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384

from pilotlight.confidential import chain, rim, spdm_report
from pilotlight.confidential.appraisal import Claim, Evidence, Finding, Problem, Reason, Refused, Roots
from pilotlight.confidential.spdm_report import NVDEC0_ENABLED, NVDEC0_STATUS, SpdmReport

RIMS = ("driver_rim", "vbios_rim")
FWID_OIDS = ("2.23.133.5.4.1", "2.23.133.5.4.1.1")
NVDEC0_INDEX = 35
"""Measured only while that engine is on."""


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify a report, and compare it with what reference values there are.

    Raises:
        Refused: it is no report, or not one that a GPU under a pinned root has signed; or a reference value is forged.
    """
    report = spdm_report.parse(_binary(evidence.body))
    certificates = chain.load_pem(evidence.certificates)
    if not certificates:
        raise Refused(Problem.CHAIN, "the GPU's certificates are missing")
    leaf = certificates[0]
    others = [*certificates[1:], *chain.load_pem(roots.certificates)]
    chain.verify_chain(leaf, others, roots.keys.get(evidence.kind, frozenset()), at)
    chain.verify_raw_ecdsa(leaf.public_key(), "secp384r1", report.signature, report.signed, SHA384())
    _check_firmware_id(leaf, report)
    fresh = nonce is not None and report.nonce == nonce
    problems = [] if nonce is None or fresh else [Reason(Problem.NONCE, "the report's nonce is not what was asked for")]
    results = _compare(report, evidence, roots, at, problems)
    claims = _claims(leaf, report, results)
    return Finding(claims, ("rim",), fresh, chain.fingerprint(leaf), tuple(problems))


def _binary(body: bytes) -> bytes:
    if body[:1] == b"\x11":
        return body
    try:
        return bytes.fromhex(body.decode("ascii"))
    except ValueError as error:
        raise Refused(Problem.MALFORMED, "the report is neither binary nor hex") from error


def _check_firmware_id(leaf: x509.Certificate, report: SpdmReport) -> None:
    """Newer firmware names itself in the report, and has to be what the leaf was made for."""
    firmware_id = report.opaque.get(spdm_report.FWID)
    if firmware_id is None:
        return
    try:
        extensions = {e.oid.dotted_string: e.value for e in leaf.extensions}
    except chain.DEFECTS as error:
        raise Refused(Problem.CHAIN, f"the GPU's certificate is not well formed ({error})") from error
    named = [extensions[oid] for oid in FWID_OIDS if oid in extensions]
    if not firmware_id or not any(
        isinstance(value, x509.UnrecognizedExtension) and firmware_id in value.value for value in named
    ):
        raise Refused(Problem.KEY_MISMATCH, "the GPU's certificate is of another firmware than the report")


def _compare(
    report: SpdmReport, evidence: Evidence, roots: Roots, at: datetime, problems: list[Reason]
) -> dict[str, str]:
    """Return ``match``, ``mismatch`` or ``missing`` for each kind of reference values, and note what does not match."""
    versions = dict(zip(RIMS, (report.driver_version, report.vbios_version), strict=True))
    results = dict.fromkeys(RIMS, "missing")
    seen: set[int] = set()
    for name in RIMS:
        if name not in evidence.collateral:
            continue
        reference = rim.read(evidence.collateral[name], roots.rim_keys, roots.certificates, at)
        wrong = _differences(report, reference)
        if reference.version.upper() != versions[name].upper():
            wrong.append(f"is for version {reference.version}, and the GPU runs {versions[name]}")
        if seen & reference.golden.keys():
            wrong.append("has reference values that the other has too")
        seen |= reference.golden.keys()
        results[name] = "mismatch" if wrong else "match"
        problems.extend(Reason(Problem.MEASUREMENT, f"{name}: {text}") for text in wrong)
    return results


def _differences(report: SpdmReport, reference: rim.Rim) -> list[str]:
    skipped = set() if report.opaque.get(NVDEC0_STATUS) == NVDEC0_ENABLED else {NVDEC0_INDEX}
    different = [
        index
        for index, allowed in sorted(reference.golden.items())
        if index not in skipped and report.measurements.get(index) not in allowed
    ]
    return [f"the measurements {', '.join(map(str, different))} differ"] if different else []


def _claims(leaf: x509.Certificate, report: SpdmReport, results: dict[str, str]) -> dict[str, Claim]:
    states = set(results.values())
    overall = "match" if states == {"match"} else "mismatch" if "mismatch" in states else "missing"
    return {
        **results,
        "rim": overall,
        "debug": False if overall == "match" else "unknown",
        "hwmodel": chain.common_name(leaf),
        "driver_version": report.driver_version,
        "vbios_version": report.vbios_version,
        "nonce": report.nonce.hex(),
    }
