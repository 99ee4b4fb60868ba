"""Evidence of AMD SEV-SNP: the report, its VCEK or VLEK, and AMD's chain up to a pinned ARK.

``body`` is the report of 1,184 bytes, ``certificates`` the VCEK (or VLEK), the ASK (or ASVK) and the ARK. A list of
revocations of the ARK may be in ``collateral["crl"]``. The simulator's evidence is the same under another root.
Source: AMD 56860 (firmware ABI) and 57230 (VCEK certificate and KDS interface).
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384

from pilotlight.confidential import chain, snp_report
from pilotlight.confidential.appraisal import Claim, Evidence, Finding, Problem, Reason, Refused, Roots
from pilotlight.confidential.snp_report import SnpReport

OID = "1.3.6.1.4.1.3704.1."
HARDWARE_ID_OID = OID + "4"
TCB_OIDS = {
    "bootloader": OID + "3.1",
    "tee": OID + "3.2",
    "snp": OID + "3.3",
    "microcode": OID + "3.8",
    "fmc": OID + "3.9",
}
VLEK = 1
LEAVES = ("SEV-VCEK", "SEV-VLEK")
INTERMEDIATES = ("SEV-{}", "SEV-VLEK-{}")
"""Common names, the family inserted: of what signs reports, and of what signs that; by the report's signing key."""


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify a report and read it.

    Raises:
        Refused: it is no report, or not one that hardware under a pinned root has signed.
    """
    pinned = roots.keys.get(evidence.kind, frozenset())
    certificates = evidence.certificates + roots.certificates
    report, family = verify_report(evidence.body, certificates, evidence.collateral.get("crl"), pinned, at)
    fresh = nonce is not None and holds(report.report_data, nonce)
    problems = () if nonce is None or fresh else (Reason(Problem.NONCE, "the report data is not what was asked for"),)
    return Finding(claims(report, family), ("measurement",), fresh, unit_of(report), problems)


def verify_report(
    body: bytes, certificates: bytes, crl: bytes | None, pinned: frozenset[str], at: datetime
) -> tuple[SnpReport, str]:
    """Return a report that is genuine, and the family of the processor it is of.

    Raises:
        Refused: it is not genuine.
    """
    report, signature = snp_report.parse(body)
    offered = chain.load_pem(certificates)
    leaf = _leaf(offered, report)
    path = chain.verify_chain(leaf, [certificate for certificate in offered if certificate != leaf], pinned, at)
    chain.check_not_revoked(path, () if crl is None else (crl,), at)
    family = _family(path, report)
    chain.verify_raw_ecdsa(leaf.public_key(), "secp384r1", signature, report.signed_bytes(), SHA384())
    try:
        _check_leaf_is_of_report(leaf, report, family)
    except chain.DEFECTS as error:
        raise Refused(Problem.MALFORMED, f"the {chain.common_name(leaf)} is not well formed ({error})") from error
    return report, family


def holds(report_data: bytes, nonce: bytes) -> bool:
    """Tell whether report data is this nonce, zeros behind it where it is shorter."""
    return 0 < len(nonce) <= len(report_data) and report_data == nonce.ljust(len(report_data), b"\0")


def claims(report: SnpReport, family: str) -> dict[str, Claim]:
    """Return what a report says, by the names that policies use."""
    return {
        "product": family,
        "measurement": report.measurement.hex(),
        "report_data": report.report_data.hex(),
        "host_data": report.host_data.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        "author_key_digest": report.author_key_digest.hex(),
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "chip_id": report.chip_id.hex(),
        "guest_svn": report.guest_svn,
        "vmpl": report.vmpl,
        "debug": report.debug,
        "smt_allowed": bool(report.policy & snp_report.POLICY_SMT),
        "migration_agent_allowed": bool(report.policy & snp_report.POLICY_MIGRATION_AGENT),
        "signing_key": "vlek" if report.signing_key == VLEK else "vcek",
        **{f"tcb.{part}": n for part, n in snp_report.tcb_parts(report.reported_tcb, family).items()},
    }


def unit_of(report: SnpReport) -> str:
    """Return what identifies the guest: two guests of one chip are two."""
    return report.report_id.hex()


def _leaf(offered: list[x509.Certificate], report: SnpReport) -> x509.Certificate:
    name = LEAVES[report.signing_key]
    leaves = {certificate for certificate in offered if chain.common_name(certificate) == name}
    if len(leaves) != 1:
        raise Refused(Problem.CHAIN, f"exactly one {name} is expected, and there are {len(leaves)}")
    return leaves.pop()


def _family(path: tuple[x509.Certificate, ...], report: SnpReport) -> str:
    """Return the family that the root is of, if all of the chain is of that family."""
    names = [chain.common_name(certificate) for certificate in path]
    family = names[-1].removeprefix("ARK-")
    if family not in snp_report.TCB_PARTS:
        raise Refused(Problem.CHAIN, f"the root {names[-1]} is of no family that is known")
    if names != [LEAVES[report.signing_key], INTERMEDIATES[report.signing_key].format(family), f"ARK-{family}"]:
        raise Refused(Problem.CHAIN, f"a chain of {family} does not look like this: {', '.join(names)}")
    cpu_family, model = report.cpu_family, report.cpu_model
    known = snp_report.CPUID_FAMILIES[family]
    if report.version >= 3 and not any(cpu_family == f and first <= model <= last for f, first, last in known):
        raise Refused(Problem.KEY_MISMATCH, f"the report is of CPU family {cpu_family:#x} model {model:#x}")
    return family


def _check_leaf_is_of_report(leaf: x509.Certificate, report: SnpReport, family: str) -> None:
    """A leaf is made for one chip at one TCB; both have to be the report's. A VLEK is of a provider, not of a chip."""
    for part, version in snp_report.tcb_parts(report.reported_tcb, family).items():
        certified = _extension(leaf, TCB_OIDS[part])
        if certified is None or _der_integer(certified) != version:
            raise Refused(Problem.KEY_MISMATCH, f"the signing key is not of the TCB that is reported ({part})")
    if report.signing_key == VLEK:
        return
    hardware_id = _extension(leaf, HARDWARE_ID_OID)
    size = 8 if family == "Turin" else 64
    if hardware_id is None or report.chip_id != _octets(hardware_id, size).ljust(64, b"\0"):
        raise Refused(Problem.KEY_MISMATCH, "the signing key is of another chip, or the chip's id is masked")


def _extension(certificate: x509.Certificate, oid: str) -> bytes | None:
    try:
        extension = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value
    except x509.ExtensionNotFound:
        return None
    assert isinstance(extension, x509.UnrecognizedExtension)
    return extension.value


def _der_integer(content: bytes) -> int:
    """Read a non-negative INTEGER of one or two bytes, which is all that a security version takes."""
    if len(content) not in (3, 4) or content[0] != 0x02 or content[1] != len(content) - 2 or content[2] & 0x80:
        raise ValueError("a security version is no small integer")
    return int.from_bytes(content[2:])


def _octets(content: bytes, size: int) -> bytes:
    """Read bytes that are bare, or in an OCTET STRING as newer certificates have them."""
    bare = content[2:] if len(content) == size + 2 and content[:2] == bytes((0x04, size)) else content
    if len(bare) != size:
        raise ValueError(f"the hardware id has {len(bare)} bytes, not {size}")
    return bare
