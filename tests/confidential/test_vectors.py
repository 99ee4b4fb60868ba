"""Real evidence, as others captured it: accepted as it is, and refused after each single thing that may go wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from evidence_files import VECTORS, Vector, azure_vtpm, evidence_file, nitro, nvidia_gpu, snp, snp_vector, tdx, utc
from pilotlight.confidential import chain
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, Policy, Problem
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.tdx import is_open
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel

ANYTHING = Policy(any_measurement=True, allow_debug=True)


def appraised(vector: Vector, **changes: Any) -> Appraisal:
    arguments: dict[str, Any] = {"nonce": vector.nonce, "policy": ANYTHING, "at": vector.at, "roots": VENDORS}
    return appraise(vector.evidence, **{**arguments, **changes})


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    assert appraisal.label is TeeLabel.NONE
    return {reason.problem for reason in appraisal.reasons}


@pytest.fixture(params=VECTORS)
def vector(request: pytest.FixtureRequest) -> Vector:
    return VECTORS[request.param]()


def test_it_is_accepted(vector: Vector) -> None:
    appraisal = appraised(vector)
    assert appraisal.reasons == ()
    assert appraisal.accepted
    closed = appraisal.claims["debug"] is False
    assert appraisal.label is (TeeLabel.HARDWARE if closed else TeeLabel.VECTOR_VERIFIED)


def test_recorded_evidence_is_not_called_hardware(vector: Vector) -> None:
    assert appraised(vector, nonce=None).label is TeeLabel.VECTOR_VERIFIED


def test_with_its_measurement_named_it_is_accepted(vector: Vector) -> None:
    name, value = vector.measurement
    policy = Policy(claims={name: frozenset({value})}, any_measurement=True, allow_debug=True)
    assert appraised(vector, policy=policy).accepted


def test_another_measurement_is_refused(vector: Vector) -> None:
    name, _ = vector.measurement
    policy = Policy(claims={name: frozenset({"ff" * 48})}, any_measurement=True, allow_debug=True)
    assert problems(appraised(vector, policy=policy)) <= {Problem.MEASUREMENT, Problem.CLAIM}


def test_a_policy_that_names_no_measurement_refuses_it(vector: Vector) -> None:
    assert Problem.MEASUREMENT in problems(appraised(vector, policy=Policy(allow_debug=True)))


def test_a_stale_nonce_is_refused(vector: Vector) -> None:
    last = bytes([vector.nonce[-1] ^ 1])
    for other in (b"another", b"", vector.nonce + b"\0", vector.nonce[:-1] + last, last + vector.nonce[:-1]):
        assert problems(appraised(vector, nonce=other)) == {Problem.NONCE}


def test_nobody_vouches_for_it_under_other_roots(vector: Vector) -> None:
    other = {Problem.UNKNOWN_ROOT, Problem.CHAIN}
    assert problems(appraised(vector, roots=replace(VENDORS, keys={}))) <= other
    swapped = VENDORS.keys[Kind.NITRO if vector.evidence.kind is not Kind.NITRO else Kind.TDX]
    assert problems(appraised(vector, roots=replace(VENDORS, keys={vector.evidence.kind: swapped}))) <= other


def test_it_does_not_pass_as_another_kind(vector: Vector) -> None:
    for kind in Kind:
        if kind is not vector.evidence.kind:
            assert not appraise(
                replace(vector.evidence, kind=kind), nonce=None, policy=ANYTHING, at=vector.at, roots=VENDORS
            ).accepted


def test_before_its_time_it_is_refused(vector: Vector) -> None:
    assert problems(appraised(vector, at=utc("2017-01-01"))) == {Problem.NOT_YET_VALID}


def with_body(vector: Vector, body: bytes) -> Vector:
    return replace(vector, evidence=replace(vector.evidence, body=body))


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("snp-milan", (0x04, 0x08, 0x38, 0x50, 0x90, 0xC0, 0x180, 0x1A0, 0x29F, 0x2A0, 0x2E8, 1183)),
        ("snp-genoa", (0x04, 0x08, 0x38, 0x50, 0x90, 0xC0, 0x180, 0x1A0, 0x29F, 0x2A0, 0x2E8, 1183)),
        ("tdx", (0, 4, 50, 184, 400, 568, 631, 640, 700, 800, 1000, 1300)),
        ("nitro", (0, 3, 40, 200, 1000, 2000, 4000, -1, -96)),
    ],
)
def test_a_changed_byte_is_refused(name: str, places: tuple[int, ...]) -> None:
    vector = VECTORS[name]()
    for place in places:
        changed = bytearray(vector.evidence.body)
        changed[place] ^= 1
        assert not appraised(with_body(vector, bytes(changed)), nonce=None).accepted, place


def test_a_shorter_or_longer_body_is_refused(vector: Vector) -> None:
    body = vector.evidence.body
    for other in (b"", body[:-1], body[1:], body[: len(body) // 2], body + b"\1", b"\0" + body, body + body):
        assert not appraised(with_body(vector, other), nonce=None).accepted


# AMD SEV-SNP


@pytest.mark.parametrize("family", ["milan", "genoa"])
def test_snp_says_what_it_runs_on(family: str) -> None:
    claims = appraised(snp_vector(family)).claims
    assert claims["product"] == family.capitalize()
    assert (claims["debug"], claims["vmpl"], claims["signing_key"]) == (False, 0, "vcek")
    assert claims["tcb.microcode"] == {"milan": 219, "genoa": 84}[family]


def test_snp_firmware_below_the_floor_is_refused() -> None:
    floor = Policy(any_measurement=True, min_tcb={"snp": 24})
    assert appraised(snp_vector("milan"), policy=floor).accepted
    assert problems(appraised(snp_vector("genoa"), policy=floor)) == {Problem.TCB}


def test_snp_with_the_certificates_of_another_chip_or_family_is_refused() -> None:
    milan, genoa = snp("milan"), snp("genoa")
    other_chip = evidence_file("azure_vtpm/vcek.pem")  # of the same family, with its chain
    invalid = chain.load_der(evidence_file("snp/test-vcek-invalid-new.der"))
    pem = invalid.public_bytes(Encoding.PEM)
    for certificates in (genoa.certificates, other_chip, pem + other_chip, b""):
        evidence = replace(milan, certificates=certificates)
        assert not appraise(evidence, nonce=None, policy=ANYTHING, at=utc("2026-11-01"), roots=VENDORS).accepted


def test_snp_with_a_forged_vcek_is_refused() -> None:
    authorities = b"".join(evidence_file(f"snp/milan_{name}.pem") for name in ("ask", "ark"))
    pem = chain.load_der(evidence_file("snp/test-vcek-invalid-new.der")).public_bytes(Encoding.PEM)
    evidence = replace(snp("milan"), certificates=pem + authorities)
    appraisal = appraise(evidence, nonce=None, policy=ANYTHING, at=utc("2026-11-01"), roots=VENDORS)
    assert problems(appraisal) <= {Problem.CHAIN, Problem.SIGNATURE, Problem.KEY_MISMATCH}


def test_snp_chains_may_come_beforehand() -> None:
    vcek = evidence_file("snp/milan_vcek.pem")
    rest = evidence_file("snp/milan_ark.pem") + evidence_file("azure_vtpm/milan_ask_ark_asvk.pem")
    vector = replace(snp_vector("milan"), evidence=replace(snp("milan"), certificates=vcek))
    assert problems(appraised(vector)) == {Problem.CHAIN}
    assert appraised(vector, roots=replace(VENDORS, certificates=rest)).accepted


def test_an_expired_vcek_is_refused() -> None:
    assert problems(appraised(snp_vector("milan"), at=utc("2033-03-01"))) == {Problem.EXPIRED}


# Intel TDX


@pytest.mark.parametrize(
    ("days", "problem"), [(31, Problem.EXPIRED), (400, Problem.EXPIRED), (-1, Problem.NOT_YET_VALID)]
)
def test_tdx_collateral_has_its_time(days: int, problem: Problem) -> None:
    vector = tdx()
    at = datetime.fromisoformat("2025-06-19T10:40:00+00:00") + timedelta(days=days)
    assert problems(appraised(vector, at=at)) == {problem}


def test_tdx_with_an_outdated_tcb_is_refused() -> None:
    collateral = {"tdx": evidence_file("tdx/tdx_quote_outdated_collateral.json")}
    evidence = Evidence(Kind.TDX, evidence_file("tdx/tdx_quote_outdated"), b"", collateral)
    appraisal = appraise(evidence, nonce=None, policy=ANYTHING, at=utc("2026-02-20"), roots=VENDORS)
    assert problems(appraisal) == {Problem.TCB}


def test_tdx_statuses_are_the_policy_s() -> None:
    policy = Policy(any_measurement=True, tcb_statuses=frozenset({"SWHardeningNeeded"}))
    assert problems(appraised(tdx(), policy=policy)) == {Problem.TCB}


def test_tdx_without_collateral_or_with_another_platform_s_is_refused() -> None:
    vector = tdx()
    assert problems(appraised(replace(vector, evidence=replace(vector.evidence, collateral={})))) == {
        Problem.COLLATERAL
    }
    other = {"tdx": evidence_file("tdx/tdx_quote_outdated_collateral.json")}
    evidence = replace(vector.evidence, collateral=other)
    assert not appraised(replace(vector, evidence=evidence), at=utc("2026-02-20")).accepted


@pytest.mark.parametrize("part", ["tcb_info", "qe_identity", "pck_crl", "root_ca_crl", "tcb_info_signature"])
def test_tdx_with_tampered_collateral_is_refused(part: str) -> None:
    vector = tdx()
    collateral = json.loads(vector.evidence.collateral["tdx"])
    middle = len(collateral[part]) // 2
    swapped = {"0": "1"}.get(collateral[part][middle], "0")
    collateral[part] = collateral[part][:middle] + swapped + collateral[part][middle + 1 :]
    evidence = replace(vector.evidence, collateral={"tdx": json.dumps(collateral).encode()})
    assert not appraised(replace(vector, evidence=evidence)).accepted


def test_tdx_attributes_of_a_debugged_domain_are_known() -> None:
    assert is_open(bytes.fromhex("0100001000000000"))
    assert not is_open(bytes.fromhex("0000001000000000"))


def test_zeros_may_follow_a_tdx_quote() -> None:
    vector = tdx()
    assert appraised(with_body(vector, vector.evidence.body + bytes(100))).accepted


# AWS Nitro


def test_nitro_in_debug_mode_is_refused() -> None:
    body = evidence_file("nitro/debug-attestation-doc.bin")
    debug = Vector(Evidence(Kind.NITRO, body), utc("2022-10-12T14:00"), b"", ("pcr0", ""))
    closed = Policy(any_measurement=True)
    assert problems(appraised(debug, policy=closed, nonce=None)) == {Problem.DEBUG}
    assert appraised(debug, nonce=None).accepted
    assert problems(appraised(nitro(), policy=closed)) == {Problem.DEBUG}  # so is the other one that was recorded


def test_a_nitro_document_lives_for_hours() -> None:
    for at in ("2023-09-18T17:38", "2026-11-01"):
        assert problems(appraised(nitro(), at=utc(at))) == {Problem.EXPIRED}
    assert problems(appraised(nitro(), at=utc("2023-09-18T14:30"))) == {Problem.NOT_YET_VALID}


# Azure's virtual TPM


def changed_json(vector: Vector, change: Any) -> Vector:
    content = json.loads(vector.evidence.body)
    change(content)
    return with_body(vector, json.dumps(content).encode())


def set_pcr(content: Any) -> None:
    content["tpm_quote"]["pcrs"][4] = "00" * 32


def drop_pcr(content: Any) -> None:
    content["tpm_quote"]["pcrs"].pop()


def swap_quote(content: Any) -> None:
    content["tpm_quote"]["signature"] = content["tpm_quote"]["signature"][::-1]


def change_nonce(content: Any) -> None:
    message = content["tpm_quote"]["message"]
    content["tpm_quote"]["message"] = message.replace(b"challenge".hex(), b"Challenge".hex())


def swap_key(content: Any) -> None:
    report = content["hcl_report"]
    place = report.index("eyJrZXlzIj") + 200  # within the modulus of the TPM's key
    content["hcl_report"] = report[:place] + ("A" if report[place] != "A" else "B") + report[place + 1 :]


def other_vcek(content: Any) -> None:
    content["vcek"] = content["vcek"][:-100] + "A" * 8 + content["vcek"][-92:]  # within AMD's signature


def add_field(content: Any) -> None:
    content["more"] = 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_pcr, Problem.SIGNATURE),
        (drop_pcr, Problem.MALFORMED),
        (swap_quote, Problem.SIGNATURE),
        (change_nonce, Problem.SIGNATURE),
        (swap_key, Problem.KEY_MISMATCH),
        (other_vcek, Problem.CHAIN),
        (add_field, Problem.MALFORMED),
    ],
)
def test_each_link_from_the_nonce_to_the_chip_is_checked(change: Any, expected: Problem) -> None:
    assert problems(appraised(changed_json(azure_vtpm(1), change))) == {expected}


def test_both_forms_of_azure_evidence_say_the_same() -> None:
    old, new = (appraised(azure_vtpm(version)).claims for version in (0, 1))
    assert old.keys() == new.keys()
    assert (old["product"], old["nonce"], old["pcr23"]) == ("Milan", b"challenge".hex(), new["pcr23"])
    assert new["secure_boot"] in (True, False)


# NVIDIA GPUs


def test_a_gpu_s_report_with_an_invalid_signature_is_refused() -> None:
    body = evidence_file("nvidia/hopperAttestationReportInvalidSignature.txt")
    assert problems(appraised(with_body(nvidia_gpu("hopper"), body))) <= {Problem.SIGNATURE, Problem.KEY_MISMATCH}


def test_a_gpu_s_report_is_read() -> None:
    claims = appraised(nvidia_gpu("hopper")).claims
    assert (claims["driver_version"], claims["vbios_version"]) == ("535.86.09", "96.00.5E.00.01")
    assert str(claims["hwmodel"]).startswith("GH100")
    assert str(appraised(nvidia_gpu("blackwell")).claims["hwmodel"]).startswith("GB100")


def test_without_reference_values_nothing_is_known_of_what_runs_on_a_gpu() -> None:
    policy = Policy(claims={"rim": frozenset({"match"})})
    assert problems(appraised(nvidia_gpu("hopper"), policy=policy)) == {Problem.MEASUREMENT, Problem.DEBUG}


def test_a_gpu_with_another_s_certificates_is_refused() -> None:
    hopper, blackwell = nvidia_gpu("hopper"), nvidia_gpu("blackwell")
    evidence = replace(hopper.evidence, certificates=blackwell.evidence.certificates)
    assert problems(appraised(replace(hopper, evidence=evidence))) == {Problem.SIGNATURE}


@pytest.mark.parametrize("place", [4, 40, 46, 100, 2000, 3600, 3700, 3960, 4051])
def test_a_changed_byte_of_a_gpu_s_report_is_refused(place: int) -> None:
    vector = nvidia_gpu("hopper")
    changed = bytearray.fromhex(vector.evidence.body.decode())
    changed[place] ^= 1
    assert not appraised(with_body(vector, bytes(changed)), nonce=None).accepted


def with_rim(name: str) -> Vector:
    vector = nvidia_gpu("hopper")
    return replace(
        vector, evidence=replace(vector.evidence, collateral={"driver_rim": evidence_file(f"nvidia/{name}")})
    )


def test_reference_values_of_another_driver_do_not_match() -> None:
    appraisal = appraised(with_rim("NV_GPU_DRIVER_GH100_550.144.03.xml"))
    assert problems(appraisal) == {Problem.MEASUREMENT}
    assert appraisal.claims["driver_rim"] == appraisal.claims["rim"] == "mismatch"
    assert "is for version 550.144.03, and the GPU runs 535.86.09" in str(appraisal.reasons[-1])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("NV_GPU_DRIVER_GH100_570.124.03_expired.xml", Problem.EXPIRED),
        ("incorrect_cert_chain_driver_rim.xml", Problem.CHAIN),
        ("incorrect_signature_driver_rim.xml", Problem.SIGNATURE),
    ],
)
def test_forged_or_expired_reference_values_are_refused(name: str, problem: Problem) -> None:
    assert problems(appraised(with_rim(name))) == {problem}


def test_reference_values_expire() -> None:
    assert problems(appraised(with_rim("NV_GPU_DRIVER_GH100_550.144.03.xml"), at=utc("2027-01-01"))) == {
        Problem.EXPIRED
    }
