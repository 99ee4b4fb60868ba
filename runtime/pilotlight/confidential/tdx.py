"""Evidence of Intel TDX: a quote of version 4 or 5, with Intel's collateral up to a pinned root.

``body`` is the quote, which brings its own certificates. ``collateral["tdx"]`` is JSON as Intel's PCS and the PCCS
give it: TCB information, the quoting enclave's identity and revocations, each signed by Intel and for some weeks. The
quote's cryptography and the evaluation of its TCB are dcap-qvl's; which root may stand above it is decided here.
Source: Intel, TDX DCAP Quoting Library API; PCCS design guide.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from datetime import datetime
from typing import Any

import dcap_qvl
from cryptography.hazmat.primitives.serialization import Encoding

from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import Claim, Evidence, Finding, Problem, Reason, Refused, Roots
from pilotlight.confidential.sev_snp import holds

COLLATERAL = "tdx"
NUM_HEADER_BYTES = 48
NUM_REPORT_BYTES = 584
SVN_BYTES = 16
DEBUG = 0x01
"""In the first byte of the TD's attributes, all of which stand for a TD that is not to be trusted."""
REASONS = (
    ("expired", Problem.EXPIRED),
    ("in the future", Problem.NOT_YET_VALID),
    ("revoked", Problem.REVOKED),
    ("tcb level", Problem.TCB),
    ("debug", Problem.DEBUG),
    ("attributes", Problem.DEBUG),
    ("signature", Problem.SIGNATURE),
    ("mismatch", Problem.COLLATERAL),
    ("decode", Problem.MALFORMED),
)
"""What dcap-qvl says is wrong, by words of its messages; what has none of them is a matter of chains."""


def verify(evidence: Evidence, *, nonce: bytes | None, at: datetime, roots: Roots) -> Finding:
    """Verify a quote against its collateral, and read it.

    Raises:
        Refused: it is no quote of TDX, or the collateral does not vouch for it at that time.
    """
    if COLLATERAL not in evidence.collateral:
        raise Refused(Problem.COLLATERAL, "there is no collateral for the quote")
    quote = _checked(dcap_qvl.parse_quote, evidence.body)
    if not _checked(quote.is_tdx):
        raise Refused(Problem.KIND, "the quote is of SGX, not of TDX")
    _check_end(evidence.body, quote.header.version)
    certificates = chain.load_pem(bytes(_checked(quote.cert_chain_pem_bytes) or b""))
    if not certificates:
        raise Refused(Problem.CHAIN, "the quote brings no certificates")
    path = chain.verify_chain(certificates[0], certificates[1:], roots.keys.get(evidence.kind, frozenset()), at)
    try:
        text = evidence.collateral[COLLATERAL].decode()
    except UnicodeDecodeError as error:
        raise Refused(Problem.COLLATERAL, "the collateral is no text") from error
    collateral = _checked(dcap_qvl.QuoteCollateralV3.from_json, text)
    root = path[-1].public_bytes(Encoding.DER)
    verified = _checked(dcap_qvl.verify_with_root_ca, evidence.body, collateral, root, max(0, int(at.timestamp())))
    report = quote.report
    fresh = nonce is not None and holds(bytes(report.report_data), nonce)
    problems = () if nonce is None or fresh else (Reason(Problem.NONCE, "the report data is not what was asked for"),)
    unit = hashlib.sha256(evidence.body[NUM_HEADER_BYTES : NUM_HEADER_BYTES + NUM_REPORT_BYTES]).hexdigest()
    return Finding(_claims(report, verified), ("mr_td",), fresh, unit, problems)


def is_open(td_attributes: bytes) -> bool:
    """Tell whether a TD's attributes say that its owner, or a debugger, can look into it."""
    return td_attributes[0] != 0


def _checked(call: Callable[..., Any], *arguments: object) -> Any:
    """Call dcap-qvl, and turn what it raises into a refusal: also a panic, which is no ``Exception``."""
    try:
        return call(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        found = next((problem for words, problem in REASONS if words in text.lower()), Problem.CHAIN)
        raise Refused(found, text[:300]) from error


def _check_end(body: bytes, version: int) -> None:
    """Only zeros may follow a quote: the interfaces of the kernel hand it out in buffers of a fixed size."""
    try:
        at = NUM_HEADER_BYTES + NUM_REPORT_BYTES
        if version >= 5:
            _, size = struct.unpack_from("<HI", body, NUM_HEADER_BYTES)
            at = NUM_HEADER_BYTES + 6 + size
        (num_signature_bytes,) = struct.unpack_from("<I", body, at)
    except struct.error as error:
        raise Refused(Problem.MALFORMED, "the quote ends early") from error
    if any(body[at + 4 + num_signature_bytes :]):
        raise Refused(Problem.MALFORMED, "something follows the quote")


def _claims(report: Any, verified: Any) -> dict[str, Claim]:
    return {
        "mr_td": bytes(report.mr_td).hex(),
        **{f"rtmr{index}": bytes(getattr(report, f"rt_mr{index}")).hex() for index in range(4)},
        "mr_config_id": bytes(report.mr_config_id).hex(),
        "mr_owner": bytes(report.mr_owner).hex(),
        "mr_owner_config": bytes(report.mr_owner_config).hex(),
        "mr_seam": bytes(report.mr_seam).hex(),
        "td_attributes": bytes(report.td_attributes).hex(),
        "xfam": bytes(report.xfam).hex(),
        "report_data": bytes(report.report_data).hex(),
        "debug": is_open(bytes(report.td_attributes)),
        "tcb_status": str(verified.status),
        "advisories": ",".join(sorted(verified.advisory_ids)),
    }
