"""What a policy asks of evidence, and what the label says: on the simulator, whose every byte a test can choose."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from evidence_files import snp, utc
from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import (
    Appraisal,
    Evidence,
    EvidenceRefused,
    Kind,
    MalformedEvidence,
    Policy,
    Problem,
    Reason,
    Roots,
)
from pilotlight.confidential.binding import Bindings, report_data
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulator import Simulator
from pilotlight.confidential.snp_report import POLICY_DEBUG, POLICY_RESERVED_ONE
from pilotlight.confidential.verify import appraise
from pilotlight.errors import ConfigError
from pilotlight.tee import TeeLabel

NOW = utc("2026-11-01")
NONCE = report_data(b"n" * 32, Bindings())
ANY_SIMULATED = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True)


@cache
def simulator() -> Simulator:
    return Simulator.create()


def trusted() -> Roots:
    return VENDORS.trusting(Kind.SIMULATED, simulator().root_fingerprint)


def appraised(evidence: Evidence, policy: Policy = ANY_SIMULATED, **changes: Any) -> Appraisal:
    arguments = {"nonce": NONCE, "policy": policy, "at": NOW, "roots": trusted()}
    return appraise(evidence, **{**arguments, **changes})


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    assert appraisal.label is TeeLabel.NONE
    return {reason.problem for reason in appraisal.reasons}


def measuring(*measurements: str) -> Policy:
    return Policy(kinds=frozenset({Kind.SIMULATED}), claims={"measurement": frozenset(measurements)})


def test_simulated_evidence_is_accepted_under_its_own_label_only() -> None:
    appraisal = appraised(simulator().attest(NONCE), measuring(simulator().guest.measurement.hex().upper()))
    assert appraisal.accepted
    assert appraisal.label is TeeLabel.SIMULATED
    assert appraisal.require(TeeLabel.SIMULATED) is appraisal
    with pytest.raises(EvidenceRefused, match="hardware is required"):
        appraisal.require(TeeLabel.HARDWARE)


def test_no_policy_accepts_the_simulator_unless_it_names_it() -> None:
    assert problems(appraised(simulator().attest(NONCE), Policy(any_measurement=True))) == {Problem.KIND}


def test_nobody_trusts_the_simulator_unless_they_say_so() -> None:
    assert problems(appraised(simulator().attest(NONCE), roots=VENDORS)) == {Problem.UNKNOWN_ROOT}


def test_one_simulator_is_not_another() -> None:
    assert problems(appraised(Simulator.create().attest(NONCE))) == {Problem.UNKNOWN_ROOT}


def test_simulated_evidence_does_not_pass_as_hardware() -> None:
    evidence = replace(simulator().attest(NONCE), kind=Kind.SEV_SNP)
    assert problems(appraised(evidence, Policy(any_measurement=True))) == {Problem.UNKNOWN_ROOT}


def test_hardware_does_not_pass_as_simulated() -> None:
    assert problems(appraised(replace(snp("milan"), kind=Kind.SIMULATED))) == {Problem.UNKNOWN_ROOT}


def test_the_empty_policy_accepts_nothing() -> None:
    assert problems(appraised(simulator().attest(NONCE), Policy())) == {Problem.KIND, Problem.MEASUREMENT}


def test_another_measurement_is_refused() -> None:
    assert problems(appraised(simulator().attest(NONCE), measuring("00" * 48))) == {Problem.MEASUREMENT}


@pytest.mark.parametrize("nonce", [report_data(b"m" * 32, Bindings()), b"", NONCE[:32], NONCE + b"\0"])
def test_another_nonce_is_refused(nonce: bytes) -> None:
    assert problems(appraised(simulator().attest(NONCE), nonce=nonce)) == {Problem.NONCE}


@pytest.mark.parametrize(
    "bindings",
    [Bindings(hpke_key=b"k" * 32), Bindings(tls_key_hash=b"k" * 32), Bindings(manifest_digest=b"k" * 32)],
    ids=str,
)
def test_a_swapped_key_is_refused(bindings: Bindings) -> None:
    evidence = simulator().attest(report_data(b"n" * 32, Bindings(receipt_key=b"k" * 32)))
    assert problems(appraised(evidence, nonce=report_data(b"n" * 32, bindings))) == {Problem.NONCE}


def test_a_debugged_guest_is_refused() -> None:
    evidence = simulator().attest(NONCE, policy=POLICY_DEBUG | POLICY_RESERVED_ONE)
    assert problems(appraised(evidence)) == {Problem.DEBUG}
    assert appraised(
        evidence, Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, allow_debug=True)
    ).accepted


def test_old_firmware_is_refused() -> None:
    policy = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, min_tcb={"snp": 25, "fmc": 1})
    appraisal = appraised(simulator().attest(NONCE), policy)
    assert problems(appraisal) == {Problem.TCB}
    assert [reason.detail for reason in appraisal.reasons] == [
        "tcb.snp is 24, and 25 is required",
        "tcb.fmc is None, and 1 is required",
    ]


def test_a_claim_that_is_missing_or_different_is_refused() -> None:
    claims = {"vmpl": frozenset({"1"}), "hostname": frozenset({"a"})}
    policy = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, claims=claims)
    assert problems(appraised(simulator().attest(NONCE), policy)) == {Problem.CLAIM}
    assert appraised(
        simulator().attest(NONCE, vmpl=1),
        Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, claims={"vmpl": frozenset({"1"})}),
    ).accepted


def test_an_expired_leaf_is_refused() -> None:
    short = Simulator.create(valid_until=utc("2026-06-01"))
    roots = VENDORS.trusting(Kind.SIMULATED, short.root_fingerprint)
    assert problems(appraised(short.attest(NONCE), roots=roots)) == {Problem.EXPIRED}
    assert appraised(short.attest(NONCE), roots=roots, at=utc("2026-05-31")).accepted
    assert problems(appraised(short.attest(NONCE), roots=roots, at=utc("2019-01-01"))) == {Problem.NOT_YET_VALID}


def test_each_reason_is_given() -> None:
    evidence = simulator().attest(NONCE, policy=POLICY_DEBUG | POLICY_RESERVED_ONE)
    appraisal = appraised(evidence, measuring("00" * 48), nonce=b"x")
    assert problems(appraisal) == {Problem.NONCE, Problem.DEBUG, Problem.MEASUREMENT}


def test_evidence_is_read_as_it_was_written() -> None:
    evidence = replace(
        simulator().attest(NONCE), collateral={"crl": b"\0\1"}, devices=(Evidence(Kind.NVIDIA_GPU, b"gpu"),)
    )
    assert Evidence.from_json(evidence.to_json()) == evidence


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"kind": "sev-snp"}',
        b'{"kind": "sev-snp", "body": "*"}',
        b'{"kind": "sev-snp", "body": "", "certificates": "\xc3\xa4"}',
        b'{"kind": "sev-snp", "body": "", "more": 1}',
        b'{"kind": "other", "body": ""}',
        b'{"kind": "sev-snp", "body": "", "devices": [{"kind": "nras", "body": "", "devices": [{}]}]}',
        b'{"devices":[' * 100_000,
        b" " * 5_000_000,
        b'{"kind": "sev-snp", "body": "", "devices": [' + b",".join([b'{"kind":"nras","body":""}'] * 17) + b"]}",
    ],
    ids=lambda content: str(content[:40]),
)
def test_what_is_no_evidence_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedEvidence):
        Evidence.from_json(content)


def test_the_digest_of_evidence_covers_its_devices() -> None:
    evidence = simulator().attest(NONCE)
    with_device = replace(evidence, devices=(Evidence(Kind.NVIDIA_GPU, b"gpu"),))
    assert len({evidence.digest, with_device.digest, replace(evidence, kind=Kind.SEV_SNP).digest}) == 3


def test_a_policy_is_read_strictly() -> None:
    content = {"kinds": ["simulated"], "claims": {"measurement": ["aa"]}, "min_tcb": {"snp": 3}}
    assert Policy.parse(content, "policy.toml").claims == {"measurement": frozenset({"aa"})}
    with pytest.raises(ConfigError, match=r"policy\.toml: .*measurements"):
        Policy.parse({"measurements": []}, "policy.toml")


def test_a_simulator_can_be_kept(tmp_path: Any) -> None:
    first, again = Simulator.open(tmp_path / "chip.pem"), Simulator.open(tmp_path / "chip.pem")
    assert first.root_fingerprint == again.root_fingerprint
    assert (tmp_path / "chip.pem").stat().st_mode & 0o777 == 0o600
    roots = VENDORS.trusting(Kind.SIMULATED, first.root_fingerprint)
    assert appraised(again.attest(NONCE), roots=roots).accepted
    (tmp_path / "other.pem").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="holds no simulator"):
        Simulator.open(tmp_path / "other.pem")
    with pytest.raises(ConfigError, match="cannot be used"):
        Simulator.open(tmp_path / "missing" / "chip.pem")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_parts_of_a_binding_have_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Bindings(hpke_key=bytes(length))
    with pytest.raises(ValueError, match="32 bytes"):
        report_data(bytes(length), Bindings())


def test_pins_are_of_the_keys_that_the_files_have() -> None:
    (root,) = chain.load_pem(snp("genoa").certificates)[2:]
    assert chain.fingerprint(root) in VENDORS.keys[Kind.SEV_SNP]


def test_a_reason_is_one_short_printable_line_whatever_it_is_of() -> None:
    """A certificate may be called anything, and what it is called stands in logs and on terminals."""
    reason = Reason(Problem.CHAIN, "leaf\nreleased default/key/toy \x1b[2J\ud800" + "x" * 10_000)
    assert reason.detail.startswith("leaf\\nreleased default/key/toy \\x1b[2J\\ud800x")
    assert reason.detail.isprintable()
    assert len(reason.detail) < 600
