"""Reports of each family and version, and everything that ties a report to its certificates."""

from __future__ import annotations

import warnings
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from evidence_files import utc
from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, Policy, Problem, Refused
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulator import FAMILIES, VALID_FROM, VALID_UNTIL, Simulator
from pilotlight.confidential.snp_report import NUM_BYTES, parse
from pilotlight.confidential.verify import appraise

NOW = utc("2026-11-01")
NONCE = bytes(range(64))
POLICY = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True)


@cache
def chip(family: str = "Milan") -> Simulator:
    return Simulator.create(family=family)


def appraised(evidence: Evidence, simulator: Simulator, **changes: Any) -> Appraisal:
    roots = VENDORS.trusting(Kind.SIMULATED, simulator.root_fingerprint)
    arguments: dict[str, Any] = {"nonce": NONCE, "policy": POLICY, "at": NOW, "roots": roots}
    return appraise(evidence, **{**arguments, **changes})


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    return {reason.problem for reason in appraisal.reasons}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_every_family_and_version_is_read(family: str, version: int) -> None:
    simulator = chip(family)
    appraisal = appraised(simulator.attest(NONCE, version=version), simulator)
    assert appraisal.reasons == ()
    assert appraisal.claims["product"] == family
    assert (appraisal.claims["tcb.microcode"], appraisal.claims["tcb.snp"]) == (219, 24)
    assert ("tcb.fmc" in appraisal.claims) == (family == "Turin")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 1}, Problem.MALFORMED),
        ({"version": 6}, Problem.MALFORMED),
        ({"signature_algorithm": 2}, Problem.MALFORMED),
        ({"policy": 0}, Problem.MALFORMED),
        ({"vmpl": 4}, Problem.MALFORMED),
        ({"key_flags": 7 << 2}, Problem.SIGNATURE),
        ({"key_flags": 1 << 2}, Problem.CHAIN),
        ({"reported_tcb": 0}, Problem.KEY_MISMATCH),
        ({"chip_id": bytes(64)}, Problem.KEY_MISMATCH),
        ({"chip_id": b"c" * 64}, Problem.KEY_MISMATCH),
        ({"version": 3, "cpu_family": 0x17}, Problem.KEY_MISMATCH),
        ({"version": 5, "cpu_model": 0xFF}, Problem.KEY_MISMATCH),
    ],
    ids=str,
)
def test_a_signed_report_that_does_not_fit_its_certificates_is_refused(
    family: str, changes: dict[str, Any], expected: Problem
) -> None:
    simulator = chip(family)
    assert problems(appraised(simulator.attest(NONCE, **changes), simulator)) == {expected}


def test_a_report_is_written_as_it_was_read() -> None:
    body = chip().attest(NONCE).body
    report, signature = parse(body)
    assert (len(body), len(signature)) == (NUM_BYTES, 96)
    assert chip().signed(report)[: len(report.signed_bytes())] == body[: len(report.signed_bytes())]


def test_two_leaves_or_none_are_refused() -> None:
    leaf, *authorities = chain.load_pem(chip().certificates)
    rest = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in authorities)
    other = chain.load_pem(Simulator.create().certificates)[0].public_bytes(Encoding.PEM)
    evidence = chip().attest(NONCE)
    assert problems(appraised(replace(evidence, certificates=rest), chip())) == {Problem.CHAIN}
    both = replace(evidence, certificates=evidence.certificates + other)
    assert problems(appraised(both, chip())) == {Problem.CHAIN}
    twice = replace(evidence, certificates=leaf.public_bytes(Encoding.PEM) + evidence.certificates)
    assert appraised(twice, chip()).accepted


def test_an_unusual_order_of_certificates_is_as_good() -> None:
    reversed_pem = b"".join(c.public_bytes(Encoding.PEM) for c in reversed(chain.load_pem(chip().certificates)))
    assert appraised(replace(chip().attest(NONCE), certificates=reversed_pem), chip()).accepted


def test_too_many_certificates_are_not_looked_at() -> None:
    many = replace(chip().attest(NONCE), certificates=chip().certificates * 6)
    assert problems(appraised(many, chip())) == {Problem.MALFORMED}


# Chains, on a small authority of our own


class Authority:
    """Signs certificates and lists of revocations."""

    def __init__(self, name: str, **constraints: Any) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.certificate = self.issue(name, self.key, **constraints)

    def issue(
        self,
        name: str,
        key: Any,
        issuer: Authority | None = None,
        is_authority: bool = True,
        path_length: int | None = None,
        may_sign: bool = True,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        above = issuer or self
        issuer_name = subject if issuer is None and not hasattr(self, "certificate") else above.certificate.subject
        builder = x509.CertificateBuilder(
            issuer_name, subject, key.public_key(), x509.random_serial_number(), VALID_FROM, VALID_UNTIL
        )
        constraints = x509.BasicConstraints(ca=is_authority, path_length=path_length if is_authority else None)
        usage = x509.KeyUsage(True, False, False, False, False, may_sign, may_sign, False, False)
        builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
        return builder.sign(above.key, SHA384())

    def revoke(self, *certificates: x509.Certificate, age_days: int = 1) -> bytes:
        builder = x509.CertificateRevocationListBuilder(
            issuer_name=self.certificate.subject,
            last_update=NOW - timedelta(days=age_days),
            next_update=NOW - timedelta(days=age_days - 2),
        )
        for certificate in certificates:
            revoked = x509.RevokedCertificateBuilder(certificate.serial_number, NOW - timedelta(days=10)).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(self.key, SHA384()).public_bytes(Encoding.DER)


@cache
def tree() -> tuple[Authority, x509.Certificate]:
    root = Authority("Root")
    leaf = root.issue("Leaf", ec.generate_private_key(ec.SECP384R1()), is_authority=False)
    return root, leaf


def refusal_of(call: Any, *arguments: Any) -> Problem:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.reason.problem


def pinned(root: Authority) -> set[str]:
    return {chain.fingerprint(root.certificate)}


def test_a_leaf_under_a_pinned_root_is_good() -> None:
    root, leaf = tree()
    assert chain.verify_chain(leaf, [root.certificate], pinned(root), NOW) == (leaf, root.certificate)
    assert refusal_of(chain.verify_chain, leaf, [], pinned(root), NOW) is Problem.CHAIN
    assert refusal_of(chain.verify_chain, leaf, [root.certificate], set(), NOW) is Problem.UNKNOWN_ROOT


def test_a_pinned_key_in_somebody_else_s_certificate_is_no_root() -> None:
    root, _ = tree()
    forger = Authority("Root")
    borrowed = forger.issue("Root", root.key)  # the pinned key, within a certificate that the forger signed
    leaf = forger.issue("Leaf", ec.generate_private_key(ec.SECP384R1()), is_authority=False)
    others = [borrowed, forger.certificate]
    assert refusal_of(chain.verify_chain, leaf, others, pinned(root), NOW) is Problem.UNKNOWN_ROOT


@pytest.mark.parametrize("constraints", [{"is_authority": False}, {"may_sign": False}])
def test_who_is_no_authority_signs_nothing(constraints: dict[str, Any]) -> None:
    root, _ = tree()
    between = Authority("Between")
    between.certificate = root.issue("Between", between.key, **constraints)
    leaf = between.issue("Leaf", ec.generate_private_key(ec.SECP384R1()), is_authority=False)
    others = [between.certificate, root.certificate]
    assert refusal_of(chain.verify_chain, leaf, others, pinned(root), NOW) is Problem.CHAIN


def test_a_path_has_its_length() -> None:
    root = Authority("Short root", path_length=0)
    between = Authority("Between")
    between.certificate = root.issue("Between", between.key)
    leaf = between.issue("Leaf", ec.generate_private_key(ec.SECP384R1()), is_authority=False)
    others = [between.certificate, root.certificate]
    assert refusal_of(chain.verify_chain, leaf, others, pinned(root), NOW) is Problem.CHAIN


def test_revocations_are_those_of_the_chain_and_have_their_time() -> None:
    root, leaf = tree()
    path = (leaf, root.certificate)
    chain.check_not_revoked(path, [root.revoke()], NOW)
    for crl, expected in (
        (root.revoke(leaf), Problem.REVOKED),
        (root.revoke(age_days=3), Problem.EXPIRED),
        (root.revoke(age_days=-1), Problem.NOT_YET_VALID),
        (Authority("Root").revoke(), Problem.COLLATERAL),
        (Authority("Other").revoke(), Problem.COLLATERAL),
        (b"no list", Problem.COLLATERAL),
    ):
        assert refusal_of(chain.check_not_revoked, path, [crl], NOW) is expected


def test_a_list_of_revocations_in_the_collateral_counts() -> None:
    evidence = replace(chip().attest(NONCE), collateral={"crl": Authority("ARK-Milan").revoke()})
    assert problems(appraised(evidence, chip())) == {Problem.COLLATERAL}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01"),
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x7f"),
        (b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13"),
    ],
    ids=["a version that is none", "a version of the future", "an extension that is there twice"],
)
def test_a_certificate_that_libraries_choke_on_is_refused(old: bytes, new: bytes) -> None:
    """cryptography has errors of its own for these, which are no ``ValueError``."""
    _, leaf = tree()
    content = leaf.public_bytes(Encoding.DER)
    assert old in content
    assert refusal_of(chain.load_der, content.replace(old, new, 1)) is Problem.MALFORMED


def test_a_list_of_revocations_of_no_version_is_refused() -> None:
    root, leaf = tree()
    crl = root.revoke()
    place = crl.index(b"\x02\x01\x01")  # version 2 is written as 1
    broken = crl[: place + 2] + b"\0" + crl[place + 3 :]
    assert refusal_of(chain.check_not_revoked, (leaf, root.certificate), [broken], NOW) is Problem.COLLATERAL


def test_a_certificate_with_a_name_that_cannot_be_is_read_without_a_word() -> None:
    """Found by fuzzing: a country of more than two letters made a warning, which a stranger could have us write."""
    _, leaf = tree()
    common_name, country = bytes.fromhex("0603550403"), bytes.fromhex("0603550406")
    altered = leaf.public_bytes(Encoding.DER).replace(common_name, country)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chain.common_name(chain.load_der(altered)) == "C=Leaf"
