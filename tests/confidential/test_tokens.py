"""Tokens of attestation services, signed by keys of our own: NVIDIA's and Microsoft's are stored nowhere."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from evidence_files import evidence_file, utc
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, Policy, Problem, Roots
from pilotlight.confidential.binding import device_nonce
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulated_gpu import SimulatedGpus
from pilotlight.confidential.simulator import Simulator
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel

NRAS = "https://nras.attestation.nvidia.com"
MAA = "https://sharedeus2.eus2.attest.azure.net"
NOW = utc("2026-11-01")
TIMES = {"iat": NOW.timestamp() - 10, "nbf": NOW.timestamp() - 10, "exp": NOW.timestamp() + 3600}
NONCE = b"n" * 32
REPORT_DATA = b"r" * 64
ANYTHING = Policy(any_measurement=True)


@cache
def nvidia_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@cache
def microsoft_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def b64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8))


def token(key: Any, claims: Any, **header: Any) -> str:
    """Return a token that a key signs; ``header`` replaces what would be in it."""
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES384"
    head = {"alg": algorithm, "kid": "key-1", "typ": "JWT", **header}
    signed = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed.encode(), padding.PKCS1v15(), SHA256())
    else:
        r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(SHA384())))
        signature = r.to_bytes(48) + s.to_bytes(48)
    return f"{signed}.{b64(signature)}"


@cache
def roots() -> Roots:
    point = nvidia_key().public_key().public_numbers()
    modulus = microsoft_key().public_key().public_numbers()
    nvidia = {"key-1": {"kty": "EC", "crv": "P-384", "x": number(point.x), "y": number(point.y)}}
    microsoft = {"key-1": {"kty": "RSA", "n": number(modulus.n), "e": number(modulus.e)}}
    return VENDORS.trusting_issuer(NRAS, nvidia).trusting_issuer(MAA, microsoft)


def problems(appraisal: Appraisal) -> set[Problem]:
    assert not appraisal.accepted
    assert appraisal.label is TeeLabel.NONE
    return {reason.problem for reason in appraisal.reasons}


def gpu_claims(number: int = 0, **changes: Any) -> dict[str, Any]:
    claims = {
        "iss": NRAS,
        **TIMES,
        "eat_nonce": NONCE.hex(),
        "ueid": str(1000 + number),
        "hwmodel": "GH100 A01 GSP BROM",
        "measres": "success",
        "dbgstat": "disabled",
        "secboot": True,
        "x-nvidia-gpu-attestation-report-signature-verified": True,
        "x-nvidia-gpu-driver-version": "550.90.07",
    }
    return {**claims, **changes}


def eat(devices: list[dict[str, Any]], key: Any = None, device_key: Any = None, **overall: Any) -> bytes:
    key = key or nvidia_key()
    tokens = {f"GPU-{n}": token(device_key or key, device) for n, device in enumerate(devices)}
    digests = {name: ["DIGEST", ["SHA-256", hashlib.sha256(t.encode()).hexdigest()]] for name, t in tokens.items()}
    claims = {
        "iss": NRAS,
        **TIMES,
        "eat_nonce": NONCE.hex(),
        "x-nvidia-overall-att-result": True,
        "submods": digests,
        **overall,
    }
    return json.dumps([["JWT", token(key, claims)], tokens]).encode()


def nras(body: bytes, **changes: Any) -> Appraisal:
    arguments: dict[str, Any] = {"nonce": NONCE, "policy": ANYTHING, "at": NOW, "roots": roots()}
    return appraise(Evidence(Kind.NRAS, body), **{**arguments, **changes})


def test_a_service_s_tokens_are_accepted() -> None:
    policy = Policy(claims={"measres": frozenset({"success"})})
    appraisal = nras(eat([gpu_claims(0), gpu_claims(1)]), policy=policy)
    assert appraisal.reasons == ()
    assert appraisal.label is TeeLabel.HARDWARE
    assert (appraisal.claims["num_gpus"], appraisal.claims["hwmodel"]) == (2, "GH100 A01 GSP BROM")
    assert nras(eat([gpu_claims()]), nonce=None).label is TeeLabel.VECTOR_VERIFIED


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda: eat([gpu_claims()], key=ec.generate_private_key(ec.SECP384R1())), Problem.SIGNATURE),
        (lambda: eat([gpu_claims()], device_key=ec.generate_private_key(ec.SECP384R1())), Problem.SIGNATURE),
        (lambda: eat([gpu_claims()], submods={}), Problem.SIGNATURE),
        (lambda: eat([gpu_claims()], iss="https://example.com"), Problem.ISSUER),
        (lambda: eat([gpu_claims()], exp=NOW.timestamp() - 1), Problem.EXPIRED),
        (lambda: eat([gpu_claims()], exp=None), Problem.MALFORMED),
        (lambda: eat([gpu_claims()], nbf=NOW.timestamp() + 3600), Problem.NOT_YET_VALID),
        (lambda: eat([gpu_claims(exp=NOW.timestamp() - 1)]), Problem.EXPIRED),
        (lambda: eat([gpu_claims(), gpu_claims()]), Problem.DUPLICATE),
        (lambda: eat([gpu_claims(ueid="")]), Problem.DUPLICATE),
        (lambda: eat([gpu_claims()], eat_nonce="00" * 32), Problem.NONCE),
        (lambda: eat([gpu_claims(eat_nonce="00" * 32)]), Problem.NONCE),
        (lambda: eat([gpu_claims(measres="fail")]), Problem.MEASUREMENT),
        (lambda: eat([gpu_claims(dbgstat="enabled")]), Problem.DEBUG),
        (lambda: eat([gpu_claims(secboot=False)]), Problem.CLAIM),
        (lambda: eat([gpu_claims()], **{"x-nvidia-overall-att-result": False}), Problem.CLAIM),
        (lambda: eat([]), Problem.MALFORMED),
        (lambda: eat([gpu_claims(n) for n in range(17)]), Problem.MALFORMED),
        (lambda: b"", Problem.MALFORMED),
        (lambda: b'[["JWT","a.b.c"],{"GPU-0":"a.b.c"}]', Problem.MALFORMED),
        (lambda: b'[["CWT","a.b.c"],{"GPU-0":"a.b.c"}]', Problem.MALFORMED),
        (lambda: b"[" * 100_000, Problem.MALFORMED),
    ],
)
def test_tokens_that_are_not_as_they_should_be_are_refused(body: Any, expected: Problem) -> None:
    assert problems(nras(body())) == {expected}


def test_a_service_s_tokens_about_the_same_gpu_do_not_count_twice() -> None:
    processor = Simulator.create()
    device = Policy(kinds=frozenset({Kind.NRAS, Kind.SIMULATED_GPU}), any_measurement=True)
    policy = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True, num_devices=2, device=device)
    trusted = roots().trusting(Kind.SIMULATED, processor.root_fingerprint)
    gpu = SimulatedGpus(1)
    trusted = trusted.trusting(Kind.SIMULATED_GPU, gpu.root_fingerprint)
    nonce = device_nonce(REPORT_DATA)

    def service(*numbers: int) -> Evidence:
        asked = {"eat_nonce": nonce.hex()}
        return Evidence(Kind.NRAS, eat([gpu_claims(number, **asked) for number in numbers], **asked))

    def found(*devices: Evidence) -> Appraisal:
        evidence = replace(processor.attest(REPORT_DATA), devices=devices)
        return appraise(evidence, nonce=REPORT_DATA, policy=policy, at=NOW, roots=trusted)

    assert found(service(0), service(1)).accepted
    assert found(service(0, 1)).accepted
    assert problems(found(service(0), service(0, 1))) == {Problem.DUPLICATE}
    assert problems(found(service(0, 1), service(1, 2))) == {Problem.DUPLICATE}
    assert problems(found(service(0), *gpu.attest_devices(nonce))) == {Problem.DUPLICATE}


def test_the_real_tokens_are_whole_and_their_keys_are_unknown() -> None:
    body = evidence_file("nvidia/hopperClaimsv3_detached_eat.json")
    at = utc("2025-06-11T00:30")
    assert problems(nras(body, at=at, roots=VENDORS)) == {Problem.ISSUER}
    (_, overall), devices = json.loads(body)
    digests = json.loads(base64.urlsafe_b64decode(overall.split(".")[1] + "=="))["submods"]
    assert digests == {
        name: ["DIGEST", ["SHA-256", hashlib.sha256(text.encode()).hexdigest()]] for name, text in devices.items()
    }


def test_a_token_of_the_real_form_under_another_key_is_refused() -> None:
    body = evidence_file("nvidia/hopperClaimsv3_detached_eat.json")
    key_id = "nv-eat-kid-prod-20250609211310110-93b13aa1-17e4-4c14-9d33-dba2323329f2"
    renamed = VENDORS.trusting_issuer(NRAS, {key_id: roots().issuers[NRAS]["key-1"]})
    assert problems(nras(body, at=utc("2025-06-11T00:30"), roots=renamed)) == {Problem.SIGNATURE}


def machine(**changes: Any) -> dict[str, Any]:
    claims = {
        "iss": MAA,
        **TIMES,
        "jti": "one",
        "x-ms-attestation-type": "sevsnpvm",
        "x-ms-compliance-status": "azure-compliant-cvm",
        "x-ms-sevsnpvm-launchmeasurement": "AA" * 48,
        "x-ms-sevsnpvm-reportdata": REPORT_DATA.hex(),
        "x-ms-sevsnpvm-is-debuggable": False,
        "x-ms-sevsnpvm-vmpl": 0,
        "x-ms-sevsnpvm-snpfw-svn": 8,
    }
    return {**claims, **changes}


def maa(claims: dict[str, Any], key: Any = None, header: dict[str, Any] | None = None, **changes: Any) -> Appraisal:
    body = token(key or microsoft_key(), claims, **(header or {"jku": f"{MAA}/certs"})).encode()
    arguments: dict[str, Any] = {"nonce": REPORT_DATA, "policy": ANYTHING, "at": NOW, "roots": roots()}
    return appraise(Evidence(Kind.MAA, body), **{**arguments, **changes})


def test_microsoft_s_token_is_accepted() -> None:
    policy = Policy(claims={"measurement": frozenset({"aa" * 48}), "vmpl": frozenset({"0"})}, min_tcb={"snp": 8})
    appraisal = maa(machine(), policy=policy)
    assert appraisal.reasons == ()
    assert appraisal.label is TeeLabel.HARDWARE


def test_a_token_about_the_machine_within_one_about_the_guest_is_accepted() -> None:
    inner = machine()
    outer = {
        "iss": MAA,
        **TIMES,
        "x-ms-attestation-type": "azurevm",
        "x-ms-isolation-tee": inner,
        "x-ms-runtime": {"client-payload": {"nonce": base64.b64encode(b"mine").decode()}},
    }
    assert maa(outer, nonce=b"mine").accepted
    assert problems(maa(outer, nonce=b"other")) == {Problem.NONCE}


def test_a_token_about_a_trust_domain_is_accepted() -> None:
    domain = {
        "iss": MAA,
        **TIMES,
        "x-ms-attestation-type": "tdxvm",
        "tdx_mrtd": "bb" * 48,
        "tdx_report_data": REPORT_DATA.hex(),
        "tdx_td_attributes_debug": False,
        "attester_tcb_status": "UpToDate",
    }
    assert maa(domain, policy=Policy(claims={"mr_td": frozenset({"bb" * 48})})).accepted
    assert problems(maa({**domain, "attester_tcb_status": "OutOfDate"})) == {Problem.TCB}
    assert problems(maa({**domain, "tdx_td_attributes_debug": True})) == {Problem.DEBUG}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x-ms-sevsnpvm-is-debuggable": True}, Problem.DEBUG),
        ({"x-ms-sevsnpvm-is-debuggable": None}, Problem.DEBUG),
        ({"x-ms-sevsnpvm-reportdata": "00" * 64}, Problem.NONCE),
        ({"x-ms-sevsnpvm-reportdata": "no hex"}, Problem.NONCE),
        ({"x-ms-compliance-status": "none"}, Problem.CLAIM),
        ({"x-ms-attestation-type": "sgx"}, Problem.KIND),
        ({"x-ms-attestation-type": []}, Problem.KIND),
        ({"iss": "https://evil.eus2.attest.azure.net"}, Problem.ISSUER),
        ({"iss": [MAA]}, Problem.ISSUER),
        ({"exp": NOW.timestamp() - 1}, Problem.EXPIRED),
        ({"exp": True}, Problem.MALFORMED),
        ({"exp": 1e300}, Problem.MALFORMED),
        ({"nbf": "soon"}, Problem.NOT_YET_VALID),
        ({"iat": NOW.timestamp() + 3600}, Problem.NOT_YET_VALID),
    ],
    ids=str,
)
def test_claims_that_are_not_as_they_should_be_are_refused(changes: dict[str, Any], expected: Problem) -> None:
    assert problems(maa(machine(**changes))) == {expected}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"jku": "https://evil.example.com/certs"}, Problem.ISSUER),
        ({"jku": f"{MAA}.evil.example.com/certs"}, Problem.ISSUER),
        ({"jku": f"http://{MAA.removeprefix('https://')}/certs"}, Problem.ISSUER),
        ({"jku": 1}, Problem.ISSUER),
        ({"jku": "https://["}, Problem.ISSUER),
        ({"kid": "key-2"}, Problem.ISSUER),
        ({"kid": None}, Problem.ISSUER),
        ({"alg": "none"}, Problem.SIGNATURE),
        ({"alg": "HS256"}, Problem.SIGNATURE),
        ({"alg": "ES384"}, Problem.SIGNATURE),
        ({"crit": ["b64"]}, Problem.MALFORMED),
    ],
    ids=str,
)
def test_headers_that_lead_elsewhere_are_refused(header: dict[str, Any], expected: Problem) -> None:
    assert problems(maa(machine(), header=header)) == {expected}


def test_keys_that_a_token_brings_are_not_used() -> None:
    foreign = rsa.generate_private_key(65537, 2048)
    numbers = foreign.public_key().public_numbers()
    jwk = {"kty": "RSA", "kid": "key-1", "n": number(numbers.n), "e": number(numbers.e)}
    assert problems(maa(machine(), foreign, {"jwk": jwk})) == {Problem.SIGNATURE}
    assert problems(maa(machine(), foreign, {"jku": "https://evil.example.com/certs"})) == {Problem.ISSUER}


def test_a_pinned_key_that_is_none_or_too_short_is_refused() -> None:
    short = rsa.generate_private_key(65537, 1024)
    numbers = short.public_key().public_numbers()
    pinned = VENDORS.trusting_issuer(MAA, {"key-1": {"n": number(numbers.n), "e": number(numbers.e)}})
    assert problems(maa(machine(), short, roots=pinned)) == {Problem.SIGNATURE}
    for jwk in ({}, {"n": "*", "e": "AQAB"}, {"n": "AQ", "e": "AQ"}):
        broken = VENDORS.trusting_issuer(MAA, {"key-1": jwk})
        assert problems(maa(machine(), roots=broken)) == {Problem.KEY_MISMATCH}


def test_a_name_that_is_there_twice_is_refused() -> None:
    signed = '{"iss":"a","iss":"%s"}' % MAA  # noqa: UP031
    body = f"{b64(b'{}')}.{b64(signed.encode())}.AA".encode()
    appraisal = appraise(Evidence(Kind.MAA, body), nonce=None, policy=ANYTHING, at=NOW, roots=roots())
    assert problems(appraisal) == {Problem.MALFORMED}


@pytest.mark.parametrize("name", ["nbf", "iat"])
@pytest.mark.parametrize("instant", [-62135596800, 253402300799])
def test_a_token_from_the_ends_of_the_calendar_is_compared_all_the_same(name: str, instant: int) -> None:
    """Five minutes before the year 1 there is no time."""
    body = token(microsoft_key(), {**machine(), name: instant}).encode()
    policy = Policy(any_measurement=True)
    appraisal = appraise(Evidence(Kind.MAA, body), nonce=None, policy=policy, at=NOW, roots=roots())
    assert appraisal.accepted is (instant < 0)


def test_half_a_character_in_a_token_is_refused() -> None:
    """What is said of it could be neither logged nor sent."""
    body = token(microsoft_key(), {**machine(), "x-ms-compliance-status": "\ud800"}).encode()
    policy = Policy(any_measurement=True)
    appraisal = appraise(Evidence(Kind.MAA, body), nonce=None, policy=policy, at=NOW, roots=roots())
    assert [reason.problem for reason in appraisal.reasons] == [Problem.MALFORMED]
