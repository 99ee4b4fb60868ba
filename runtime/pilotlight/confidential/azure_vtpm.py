"""Evidence of an Azure confidential VM: a quote of its virtual TPM, whose key an SNP report vouches for.

    the nonce ── quote (PCRs) ── signed by the TPM's key ── named in the HCL's data ── whose hash an SNP report holds

``body`` is JSON in the forms of Confidential Containers: ``quote``, ``report``, ``vcek`` (version 0), or ``tpm_quote``,
``hcl_report``, ``vcek`` (versions 1 and 2). AMD's ASK and ARK come as ``certificates``.
Source: Azure, "Guest attestation for confidential VMs" (HCL report); TPM 2.0 Library, part 2, TPMS_ATTEST.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import Meta

from pilotlight.confidential import chain, sev_snp, snp_report
from pilotlight.confidential.appraisal import Claim, Evidence, Finding, Problem, Reason, Refused, Roots

HCL_MAGIC = b"HCLA"
NUM_HCL_HEADER_BYTES = 32
_DATA_HEADER = struct.Struct("<5I")
SNP_REPORT = 2
HASHES = {1: "sha256", 2: "sha384", 3: "sha512"}
TPM_GENERATED = b"\xff\x54\x43\x47"
ATTEST_QUOTE = 0x8018
SHA256_BANK = 0x000B
NUM_PCRS = 24
MIN_KEY_BITS = 2048
ATTESTATION_KEY = "HCLAkPub"
MEASUREMENTS = ("pcr4", "pcr8", "pcr9", "pcr11")
"""Boot loader, command line, kernel and initial RAM disk, unified kernel image: which of them counts, a policy says."""

Byte = Annotated[int, Meta(ge=0, le=255)]


class _QuoteV0(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    message: list[Byte]
    pcrs: list[list[Byte]]
    signature: list[Byte]


class _EvidenceV0(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quote: _QuoteV0
    report: list[Byte]
    vcek: str


class _QuoteV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    message: str
    pcrs: list[str]
    signature: str


class _EvidenceV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=2)]
    tpm_quote: _QuoteV1
    hcl_report: str
    vcek: str


class _Jwk(msgspec.Struct, frozen=True):
    kid: str = ""
    kty: str = ""
    n: str = ""
    e: str = ""


class _VariableData(msgspec.Struct, frozen=True, rename="kebab"):
    keys: list[_Jwk]
    vm_configuration: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class _Parts:
    message: bytes
    signature: bytes
    pcrs: tuple[bytes, ...]
    hcl_report: bytes
    vcek: bytes


@dataclass(frozen=True, slots=True)
class _Quote:
    nonce: bytes
    selected: tuple[int, ...]
    pcr_digest: bytes


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify a quote, its key and the report behind it, and read them.

    Raises:
        Refused: one of them is malformed, or does not vouch for the next.
    """
    parts = _parts(evidence.body)
    report_bytes, data, hash_name = _hcl_report(parts.hcl_report)
    pinned = roots.keys.get(evidence.kind, frozenset())
    certificates = parts.vcek + b"\n" + evidence.certificates + roots.certificates
    report, family = sev_snp.verify_report(report_bytes, certificates, evidence.collateral.get("crl"), pinned, at)
    if report.report_data != hashlib.new(hash_name, data).digest().ljust(64, b"\0"):
        raise Refused(Problem.KEY_MISMATCH, "the report does not vouch for the data beside it")
    if report.vmpl != 0:
        raise Refused(Problem.KEY_MISMATCH, f"the report is of VMPL {report.vmpl}, not of the paravisor")
    variable = _variable_data(data)
    _verify_signature(_attestation_key(variable), parts)
    quote = _quote(parts.message)
    _check_pcrs(quote, parts.pcrs)
    fresh = nonce is not None and len(nonce) > 0 and quote.nonce == nonce
    problems = () if nonce is None or fresh else (Reason(Problem.NONCE, "the quote's nonce is not what was asked for"),)
    claims = _claims(report, family, quote, parts.pcrs, variable)
    return Finding(claims, MEASUREMENTS, fresh, sev_snp.unit_of(report), problems)


def _parts(body: bytes) -> _Parts:
    try:
        decoded = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return _parts_v0(body) if "quote" in decoded else _parts_v1(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Refused(Problem.MALFORMED, f"the evidence is not of a form that is known ({error})") from error


def _parts_v0(body: bytes) -> _Parts:
    given = msgspec.json.decode(body, type=_EvidenceV0)
    return _Parts(
        bytes(given.quote.message),
        bytes(given.quote.signature),
        tuple(bytes(pcr) for pcr in given.quote.pcrs),
        bytes(given.report),
        given.vcek.encode("ascii"),
    )


def _parts_v1(body: bytes) -> _Parts:
    given = msgspec.json.decode(body, type=_EvidenceV1)
    return _Parts(
        bytes.fromhex(given.tpm_quote.message),
        bytes.fromhex(given.tpm_quote.signature),
        tuple(bytes.fromhex(pcr) for pcr in given.tpm_quote.pcrs),
        _base64url(given.hcl_report),
        chain.load_der(_base64url(given.vcek)).public_bytes(Encoding.PEM),
    )


def _base64url(text: str) -> bytes:
    return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), altchars=b"-_", validate=True)


def _hcl_report(content: bytes) -> tuple[bytes, bytes, str]:
    """Return the SNP report, the data that it vouches for, and by which hash."""
    start = NUM_HCL_HEADER_BYTES + snp_report.NUM_BYTES
    if content[:4] != HCL_MAGIC or len(content) < start + _DATA_HEADER.size:
        raise Refused(Problem.MALFORMED, "the HCL's report is none")
    _, _, report_type, hash_type, size = _DATA_HEADER.unpack_from(content, start)
    data = content[start + _DATA_HEADER.size :][:size]
    if report_type != SNP_REPORT or hash_type not in HASHES or len(data) != size:
        raise Refused(Problem.MALFORMED, "the HCL's report is not one of SNP, or its data end early")
    return content[NUM_HCL_HEADER_BYTES:start], data, HASHES[hash_type]


def _variable_data(data: bytes) -> _VariableData:
    try:
        return msgspec.json.decode(data, type=_VariableData)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(Problem.MALFORMED, f"the HCL's data cannot be read ({error})") from error


def _attestation_key(variable: _VariableData) -> RSAPublicKey:
    keys = [key for key in variable.keys if key.kid == ATTESTATION_KEY]
    if len(keys) != 1 or keys[0].kty != "RSA":
        raise Refused(Problem.MALFORMED, "the HCL's data do not name one key of the TPM")
    try:
        numbers = [int.from_bytes(_base64url(part)) for part in (keys[0].e, keys[0].n)]
        key = RSAPublicNumbers(*numbers).public_key()
    except ValueError as error:
        raise Refused(Problem.MALFORMED, f"the key of the TPM cannot be read ({error})") from error
    if key.key_size < MIN_KEY_BITS:
        raise Refused(Problem.SIGNATURE, f"the key of the TPM has {key.key_size} bits")
    return key


def _verify_signature(key: RSAPublicKey, parts: _Parts) -> None:
    try:
        key.verify(parts.signature, parts.message, PKCS1v15(), SHA256())
    except InvalidSignature:
        raise Refused(Problem.SIGNATURE, "the quote is not signed by the key that the report vouches for") from None


def _quote(message: bytes) -> _Quote:
    try:
        return _parse_quote(message)
    except (struct.error, IndexError) as error:
        raise Refused(Problem.MALFORMED, "the quote ends early") from error


def _parse_quote(message: bytes) -> _Quote:
    if message[:4] != TPM_GENERATED or struct.unpack_from(">H", message, 4) != (ATTEST_QUOTE,):
        raise Refused(Problem.MALFORMED, "the quote is none that a TPM generated")
    _, at = _sized(message, 6)  # the name of the key
    nonce, at = _sized(message, at)
    at += 17 + 8  # the clock and the version of the firmware
    num_banks, bank, num_map_bytes = struct.unpack_from(">IHB", message, at)
    if num_banks != 1 or bank != SHA256_BANK or num_map_bytes != NUM_PCRS // 8:
        raise Refused(Problem.MALFORMED, "the quote is not over one bank of SHA-256")
    at += 7
    bitmap = int.from_bytes(message[at : at + num_map_bytes], "little")
    digest, at = _sized(message, at + num_map_bytes)
    if at != len(message):
        raise Refused(Problem.MALFORMED, "something follows the quote")
    return _Quote(nonce, tuple(index for index in range(NUM_PCRS) if bitmap >> index & 1), digest)


def _sized(message: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from(">H", message, at)
    content = message[at + 2 : at + 2 + size]
    if len(content) != size:
        raise IndexError
    return content, at + 2 + size


def _check_pcrs(quote: _Quote, pcrs: tuple[bytes, ...]) -> None:
    if len(pcrs) != NUM_PCRS or any(len(pcr) != 32 for pcr in pcrs) or not quote.selected:
        raise Refused(Problem.MALFORMED, f"{NUM_PCRS} PCRs of 32 bytes are expected, and a quote over some of them")
    if hashlib.sha256(b"".join(pcrs[index] for index in quote.selected)).digest() != quote.pcr_digest:
        raise Refused(Problem.SIGNATURE, "the PCRs are not those that the quote is over")


def _claims(
    report: snp_report.SnpReport, family: str, quote: _Quote, pcrs: tuple[bytes, ...], variable: _VariableData
) -> dict[str, Claim]:
    configuration = variable.vm_configuration
    return {
        **sev_snp.claims(report, family),
        **{f"pcr{index}": pcrs[index].hex() for index in quote.selected},
        "nonce": quote.nonce.hex(),
        "secure_boot": configuration.get("secure-boot") is True,
        "console_enabled": configuration.get("console-enabled") is not False,
        "vm_id": vm_id if isinstance(vm_id := configuration.get("vmUniqueId"), str) else "",
    }
