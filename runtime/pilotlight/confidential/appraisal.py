"""Evidence, what a verifier found in it, what a policy asks, and the one result: an ``Appraisal``.

    Evidence ──verifier──► Finding ──Policy──► Appraisal
               (kind)       claims, problems     accepted, label, reasons

A verifier (one module for each kind) decides whether the bytes are genuine and whose they are; ``judge`` decides
whether that is good enough. Both are pure: the nonce, the time and the trusted roots are arguments.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

import msgspec

from pilotlight.errors import ConfigError, PilotlightError
from pilotlight.tee import EvidenceObject, TeeLabel

Claim = str | int | bool
MAX_EVIDENCE_BYTES = 4 * 1024 * 1024
"""Of one evidence in JSON, its devices included. The largest real one, a GPU's with its RIMs, has a tenth of that."""
MAX_DEVICES = 16
MAX_SHOWN = 500


class Kind(StrEnum):
    """The formats that are understood."""

    SIMULATED = "simulated"
    SIMULATED_GPU = "simulated-gpu"
    SEV_SNP = "sev-snp"
    TDX = "tdx"
    NITRO = "nitro"
    AZURE_VTPM_SNP = "azure-vtpm-snp"
    NVIDIA_GPU = "nvidia-gpu"
    NRAS = "nras"
    MAA = "maa"


SIMULATED_KINDS = frozenset({Kind.SIMULATED, Kind.SIMULATED_GPU})
DEVICE_KINDS = frozenset({Kind.NVIDIA_GPU, Kind.NRAS, Kind.SIMULATED_GPU})


class Problem(StrEnum):
    """Why evidence was refused, for programs; ``Reason.detail`` is for people."""

    MALFORMED = "malformed"
    SIGNATURE = "signature"
    CHAIN = "chain"
    UNKNOWN_ROOT = "unknown_root"
    ISSUER = "issuer"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    REVOKED = "revoked"
    COLLATERAL = "collateral"
    KEY_MISMATCH = "key_mismatch"
    NONCE = "nonce"
    DEBUG = "debug"
    MEASUREMENT = "measurement"
    CLAIM = "claim"
    TCB = "tcb"
    DUPLICATE = "duplicate"
    DEVICES = "devices"
    KIND = "kind"


def shown(text: str) -> str:
    """Return a stranger's text as it may stand in a line of a log or on a terminal: short, and printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:MAX_SHOWN])


@dataclass(frozen=True, slots=True)
class Reason:
    problem: Problem
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", shown(self.detail))  # names of certificates and the like are in it

    def __str__(self) -> str:
        return f"{self.problem}: {self.detail}"


class Refused(Exception):
    """A verifier's verdict that the evidence proves nothing. It never leaves ``verify.appraise``."""

    def __init__(self, problem: Problem, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.reason = Reason(problem, detail)


class EvidenceRefused(PilotlightError):
    """Evidence was appraised and is not good enough; ``appraisal`` says why."""

    status = 403
    code = "evidence_refused"
    type = "permission_error"

    def __init__(self, appraisal: Appraisal) -> None:
        super().__init__(f"the evidence is refused: {'; '.join(map(str, appraisal.reasons))}")
        self.appraisal = appraisal


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one environment says of itself, and what is needed to believe it.

    ``body`` is the report, quote, document or token as the hardware or the service gave it. ``certificates`` are PEM,
    in any order. ``collateral`` is what a vendor signed beside it, by name: ``tdx`` (JSON), ``crl`` (DER),
    ``driver_rim`` and ``vbios_rim`` (XML). ``devices`` are GPUs whose nonce is ``binding.device_nonce`` of this one's.
    """

    kind: Kind
    body: bytes
    certificates: bytes = b""
    collateral: Mapping[str, bytes] = field(default_factory=dict)
    devices: tuple[Evidence, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over kinds and bodies, the devices' included, in hex: how receipts cite the evidence."""
        digest = hashlib.sha256()
        for part in (self, *self.devices):
            digest.update(part.kind.encode() + b"\0" + hashlib.sha256(part.body).digest())
        return digest.hexdigest()

    def to_json(self) -> bytes:
        return msgspec.json.encode(to_wire(self))

    @classmethod
    def from_json(cls, content: bytes | str) -> Evidence:
        """Read evidence as ``to_json`` wrote it.

        Raises:
            MalformedEvidence: it is anything else, or too large.
        """
        try:
            if len(content) > MAX_EVIDENCE_BYTES:
                raise MalformedEvidence(f"the evidence has more than {MAX_EVIDENCE_BYTES:,} bytes")
            return from_wire(msgspec.json.decode(content, type=EvidenceObject))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedEvidence(f"the evidence cannot be read ({error})") from error


class MalformedEvidence(PilotlightError):
    """Evidence that came over the wire is not of our form."""

    status = 400
    code = "evidence_malformed"
    type = "invalid_request_error"


def to_wire(evidence: Evidence) -> EvidenceObject:
    """Return evidence in its JSON form."""
    return EvidenceObject(
        evidence.kind,
        base64.b64encode(evidence.body).decode(),
        evidence.certificates.decode("ascii"),
        {name: base64.b64encode(content).decode() for name, content in evidence.collateral.items()},
        tuple(to_wire(device) for device in evidence.devices),
    )


def from_wire(wire: EvidenceObject) -> Evidence:
    """Read evidence from its JSON form.

    Raises:
        MalformedEvidence: it is of no kind that is known, not encoded as it should be, or has too many devices.
    """
    if any(device.devices for device in wire.devices) or len(wire.devices) > MAX_DEVICES:
        raise MalformedEvidence(f"expected at most {MAX_DEVICES} devices, and none that have devices")
    try:
        return Evidence(
            Kind(wire.kind),
            base64.b64decode(wire.body, validate=True),
            wire.certificates.encode("ascii"),
            {name: base64.b64decode(content, validate=True) for name, content in wire.collateral.items()},
            tuple(from_wire(device) for device in wire.devices),
        )
    except ValueError as error:
        raise MalformedEvidence(f"the evidence cannot be read ({error})") from error


@dataclass(frozen=True, slots=True)
class Roots:
    """Whom the verifier trusts: nothing is trusted because it came with the evidence.

    ``keys`` are SHA-256 fingerprints, in hex, of the public keys (SubjectPublicKeyInfo) of root certificates, by kind;
    the certificates themselves may come from anywhere: with the evidence, or beforehand as ``certificates`` (PEM).
    ``rim_keys`` are those of reference values for GPUs.
    ``issuers`` are the signing keys of token services: issuer → key id → public JWK, as they were fetched and checked
    beforehand. A token's own ``jku`` is never followed.
    """

    keys: Mapping[Kind, frozenset[str]]
    rim_keys: frozenset[str] = frozenset()
    certificates: bytes = b""
    issuers: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)

    def trusting(self, kind: Kind, *fingerprints: str) -> Roots:
        """Return these roots and more: the simulator's, say."""
        known = self.keys.get(kind, frozenset())
        return replace(self, keys={**self.keys, kind: known | {f.lower() for f in fingerprints}})

    def trusting_issuer(self, issuer: str, keys: Mapping[str, Mapping[str, str]]) -> Roots:
        return replace(self, issuers={**self.issuers, issuer: keys})


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What evidence has to say to be accepted. The empty policy accepts nothing: it names no measurement.

    ``kinds``: the accepted ones; empty means any but the simulator's. ``claims``: for each claim that matters its
    allowed values, in lower-case hex where it is bytes; a claim that is missing is refused. ``min_tcb``: for each part
    of an SNP processor's firmware (``bootloader``, ``tee``, ``snp``, ``microcode``, ``fmc``) the least version;
    ``tcb_statuses`` is the same for TDX, in Intel's words. ``num_devices``: how many GPUs there have to be at least, by
    the policy ``device``. ``any_measurement`` accepts every code, which proves the machine and not what runs on it.
    """

    kinds: frozenset[Kind] = frozenset()
    claims: dict[str, frozenset[str]] = {}
    min_tcb: dict[str, int] = {}
    tcb_statuses: frozenset[str] = frozenset({"UpToDate"})
    any_measurement: bool = False
    allow_debug: bool = False
    num_devices: int = 0
    device: Policy | None = None

    @classmethod
    def parse(cls, content: object, origin: str) -> Policy:
        """Read a policy out of TOML or JSON that was decoded already.

        Raises:
            ConfigError: an unknown key or a value that is not what was expected.
        """
        try:
            return msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{origin}: {error}") from error


@dataclass(frozen=True, slots=True)
class Finding:
    """What a verifier read in genuine evidence.

    ``claims`` hold bytes as lower-case hex; ``debug`` (bool, or "unknown") is always among them, ``tcb.*`` (int) and
    ``tcb_status`` where the kind has them. ``measurements`` name the claims that identify the code. ``fresh`` says that
    the expected nonce is in it, and ``problems`` what speaks against it in spite of good signatures. ``unit``
    identifies the guest, or the GPU (several with commas between them), so that one cannot be counted twice.
    """

    claims: Mapping[str, Claim]
    measurements: tuple[str, ...]
    fresh: bool
    unit: str
    problems: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Appraisal:
    """The result. ``label`` is ``none`` unless ``accepted``; ``reasons`` are empty exactly when ``accepted``.

    ``claims`` are there whenever the signatures held, also in a refusal, for people to look at.
    """

    accepted: bool
    label: TeeLabel
    kind: Kind
    reasons: tuple[Reason, ...]
    claims: Mapping[str, Claim]
    evidence_digest: str
    unit: str = ""
    devices: tuple[Appraisal, ...] = ()

    def require(self, *labels: TeeLabel) -> Appraisal:
        """Return this appraisal if it is accepted with one of these labels (by default, any).

        Raises:
            EvidenceRefused: it is not.
        """
        if not self.accepted:
            raise EvidenceRefused(self)
        if labels and self.label not in labels:
            wanted = " or ".join(labels)
            reason = Reason(Problem.KIND, f"the label is {self.label}, and {wanted} is required")
            raise EvidenceRefused(replace(self, accepted=False, label=TeeLabel.NONE, reasons=(reason,)))
        return self


def refusal(evidence: Evidence, reason: Reason) -> Appraisal:
    """Return the appraisal of evidence that proves nothing."""
    return Appraisal(False, TeeLabel.NONE, evidence.kind, (reason,), MappingProxyType({}), evidence.digest)


def judge(evidence: Evidence, finding: Finding, policy: Policy, devices: tuple[Appraisal, ...] = ()) -> Appraisal:
    """Compare what was found with what is asked; all reasons for a refusal are given, not only the first."""
    reasons = (
        *finding.problems,
        *_kind_reasons(evidence.kind, policy),
        *_debug_reasons(finding, policy),
        *_claim_reasons(finding, policy),
        *_tcb_reasons(finding, policy),
        *_device_reasons(devices, policy),
    )
    return Appraisal(
        accepted=not reasons,
        label=_label(evidence.kind, finding, devices) if not reasons else TeeLabel.NONE,
        kind=evidence.kind,
        reasons=reasons,
        claims=MappingProxyType(dict(finding.claims)),
        evidence_digest=evidence.digest,
        unit=finding.unit,
        devices=devices,
    )


def _label(kind: Kind, finding: Finding, devices: tuple[Appraisal, ...]) -> TeeLabel:
    """Return the label of accepted evidence, which is that of its weakest part."""
    weaker = {device.label for device in devices} - {TeeLabel.HARDWARE}
    if kind in SIMULATED_KINDS or TeeLabel.SIMULATED in weaker:
        return TeeLabel.SIMULATED
    is_closed = finding.claims["debug"] is False
    return TeeLabel.HARDWARE if finding.fresh and is_closed and not weaker else TeeLabel.VECTOR_VERIFIED


def _kind_reasons(kind: Kind, policy: Policy) -> tuple[Reason, ...]:
    if kind in policy.kinds or (not policy.kinds and kind not in SIMULATED_KINDS):
        return ()
    allowed = ", ".join(sorted(policy.kinds)) or "any but the simulator's"
    return (Reason(Problem.KIND, f"is {kind}; the policy accepts {allowed}"),)


def _debug_reasons(finding: Finding, policy: Policy) -> tuple[Reason, ...]:
    state = finding.claims["debug"]
    if policy.allow_debug or state is False or (state == "unknown" and policy.any_measurement):
        return ()
    if state == "unknown":
        return (Reason(Problem.DEBUG, "nothing excludes that debugging is on"),)
    return (Reason(Problem.DEBUG, "its owner can read its memory: debugging is on"),)


def _claim_reasons(finding: Finding, policy: Policy) -> tuple[Reason, ...]:
    reasons = []
    if not policy.any_measurement and not any(name in policy.claims for name in finding.measurements):
        names = ", ".join(finding.measurements) or "any"
        reasons.append(Reason(Problem.MEASUREMENT, f"the policy names no allowed value of {names}"))
    for name, allowed in policy.claims.items():
        value = finding.claims.get(name)
        if value is None or _text(value) not in {a.lower() for a in allowed}:
            problem = Problem.MEASUREMENT if name in finding.measurements else Problem.CLAIM
            reasons.append(Reason(problem, f"{name} is {'missing' if value is None else _text(value)}"))
    return tuple(reasons)


def _text(value: Claim) -> str:
    return str(value).lower()


def _tcb_reasons(finding: Finding, policy: Policy) -> tuple[Reason, ...]:
    reasons = []
    status = finding.claims.get("tcb_status")
    if status is not None and status not in policy.tcb_statuses:
        reasons.append(Reason(Problem.TCB, f"the status of its TCB is {status}"))
    for part, least in policy.min_tcb.items():
        version = finding.claims.get(f"tcb.{part}")
        if not isinstance(version, int) or version < least:
            reasons.append(Reason(Problem.TCB, f"tcb.{part} is {version}, and {least} is required"))
    return tuple(reasons)


def _device_reasons(devices: tuple[Appraisal, ...], policy: Policy) -> tuple[Reason, ...]:
    reasons = [
        Reason(reason.problem, f"device {number}: {reason.detail}")
        for number, device in enumerate(devices)
        for reason in device.reasons
    ]
    num_devices = sum(_num_gpus(device) for device in devices)
    if num_devices < policy.num_devices:
        reasons.append(Reason(Problem.DEVICES, f"there are {num_devices} GPUs, and {policy.num_devices} are required"))
    units = [unit for device in devices for unit in device.unit.split(",") if unit]
    bodies = [device.evidence_digest for device in devices]
    if len(set(units)) < len(units) or len(set(bodies)) < len(bodies):
        reasons.append(Reason(Problem.DUPLICATE, "one GPU is given as several"))
    named_by_service = [device.kind is Kind.NRAS for device in devices]
    if any(named_by_service) and not all(named_by_service):  # one has the GPUs' names, the other their certificates
        reasons.append(Reason(Problem.DUPLICATE, "reports and a service's tokens may be of the same GPU"))
    return tuple(reasons)


def _num_gpus(device: Appraisal) -> int:
    """A service's token may be about several."""
    return int(device.claims.get("num_gpus", 1))
