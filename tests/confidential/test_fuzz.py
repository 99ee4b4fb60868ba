"""Every parser of foreign bytes: whatever comes, there is an answer, and it is no.

Genuine evidence is mutated (bits, bytes, pieces that are cut, doubled or moved), and bytes are made from nothing. What
a mutation leaves accepted has to say exactly what the genuine evidence says: white space in a PEM changes nothing.
Where a signature stands in the way of a mutation, it is made again with a key of our own, so that what is behind it is
reached too. The ordinary suite takes the same examples each time, so that a change that has nothing to do with this
never meets a fault that chance brings up; `make soak` looks for new ones, for ten minutes in all (``soaking.py``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import cbor2
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from confidential.soaking import rounds_for, seconds_each
from confidential.test_nitro import aws
from confidential.test_nvidia_gpu import ANY_GPU, machine, publisher
from confidential.test_nvidia_gpu import roots as gpu_roots
from confidential.test_sev_snp import chip
from confidential.test_tokens import MAA, NRAS, microsoft_key, nvidia_key, token
from confidential.test_tokens import roots as token_roots
from evidence_files import VECTORS, Vector, evidence_file, utc
from pilotlight.confidential import cbor, chain, rim, snp_report, spdm_report
from pilotlight.confidential.appraisal import Appraisal, Evidence, Kind, MalformedEvidence, Policy, Refused
from pilotlight.confidential.attested import appraise_attestation, parse_attestation
from pilotlight.confidential.attester import Attester
from pilotlight.confidential.binding import Bindings
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulated_gpu import report_bytes
from pilotlight.confidential.sources import pem_of_table
from pilotlight.confidential.verify import appraise
from pilotlight.tee import TeeLabel

NOW = utc("2026-11-01")
ANYTHING = Policy(any_measurement=True, allow_debug=True)
ANY_KIND = Policy(kinds=frozenset(Kind), any_measurement=True, allow_debug=True, device=ANY_GPU)
QUICK, ROUND = 15, 100
SECONDS_EACH = seconds_each(num_tests=21)
EXACT = ("snp-milan", "snp-genoa", "nitro")
"""Evidence of which every bit counts: no mutation of it may be accepted."""


def fuzzed(num_examples: int) -> Callable[[Any], Any]:
    """The same examples in each run."""
    return settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def soak(check: Callable[[st.DataObject], None]) -> None:
    """Check new examples until the time is up; what fails is kept by hypothesis, and comes first in the next run."""

    @settings(max_examples=ROUND, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def one_round(data: st.DataObject) -> None:
        check(data)

    print(f"{rounds_for(SECONDS_EACH, one_round) * ROUND:,} examples")


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a mutation of some bytes."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(changed) - 1)))
        size = draw(st.integers(1, 64))
        piece = changed[start : start + size]
        match draw(st.sampled_from(["bit", "bytes", "cut", "end", "double", "move", "insert", "fill"])):
            case "bit" if changed:
                changed[start] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                changed[start : start + size] = draw(st.binary(min_size=len(piece), max_size=len(piece)))
            case "cut":
                del changed[start : start + size]
            case "end":
                del changed[start:]
            case "double":
                changed[start:start] = piece
            case "move":
                del changed[start : start + size]
                target = draw(st.integers(0, len(changed)))
                changed[target:target] = piece
            case "insert":
                changed[start:start] = draw(st.binary(max_size=64))
            case "fill":
                changed[start : start + size] = bytes([draw(st.sampled_from([0, 0xFF]))]) * len(piece)
    return bytes(changed)


def judged(vector: Vector, evidence: Evidence) -> Appraisal:
    return appraise(evidence, nonce=None, policy=ANYTHING, at=vector.at, roots=VENDORS)


def check_mutations(data: st.DataObject, name: str) -> None:
    vector = VECTORS[name]()
    genuine = judged(vector, vector.evidence)
    assert genuine.accepted
    body = data.draw(mutations(vector.evidence.body))
    appraisal = judged(vector, replace(vector.evidence, body=body))
    if appraisal.accepted:
        assert appraisal.claims == genuine.claims
        assert name not in EXACT or body == vector.evidence.body


def check_surroundings(data: st.DataObject, name: str) -> None:
    """Certificates and collateral of genuine evidence may be anything: what stays accepted is what was signed."""
    vector = VECTORS[name]()
    certificates = data.draw(mutations(vector.evidence.certificates))
    collateral = {name: data.draw(mutations(content)) for name, content in vector.evidence.collateral.items()}
    appraisal = judged(vector, replace(vector.evidence, certificates=certificates, collateral=collateral))
    assert not appraisal.accepted or appraisal.claims == judged(vector, vector.evidence).claims


@pytest.mark.parametrize("name", VECTORS)
@fuzzed(QUICK)
@given(data=st.data())
def test_mutated_evidence_is_never_accepted(data: st.DataObject, name: str) -> None:
    check_mutations(data, name)


@pytest.mark.parametrize("name", VECTORS)
@fuzzed(QUICK)
@given(data=st.data())
def test_mutated_certificates_and_collateral_change_nothing(data: st.DataObject, name: str) -> None:
    check_surroundings(data, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", VECTORS)
def test_mutations_for_long(name: str) -> None:
    def check(data: st.DataObject) -> None:
        check_mutations(data, name)
        check_surroundings(data, name)

    soak(check)


def check_anything(body: bytes, certificates: bytes, collateral: dict[str, bytes]) -> None:
    for kind in Kind:
        evidence = Evidence(kind, body, certificates, collateral)
        assert not appraise(evidence, nonce=body[:64], policy=ANY_KIND, at=NOW, roots=token_roots()).accepted


FOREIGN = st.binary(max_size=200) | st.text(max_size=100).map(str.encode)
COLLATERAL = st.dictionaries(st.sampled_from(["tdx", "crl", "driver_rim", "vbios_rim"]), FOREIGN)


@fuzzed(QUICK)
@given(body=FOREIGN, certificates=FOREIGN, collateral=COLLATERAL)
def test_bytes_from_nowhere_are_refused(body: bytes, certificates: bytes, collateral: dict[str, bytes]) -> None:
    check_anything(body, certificates, collateral)


@pytest.mark.soak
def test_bytes_from_nowhere_for_long() -> None:
    soak(lambda data: check_anything(data.draw(FOREIGN), data.draw(FOREIGN), data.draw(COLLATERAL)))


PARSERS: dict[str, Callable[[bytes], object]] = {
    "cbor": cbor.loads,
    "snp report": snp_report.parse,
    "spdm report": spdm_report.parse,
    "pem": chain.load_pem,
    "der": chain.load_der,
    "certificate table": pem_of_table,
    "rim": lambda content: rim.read(content, frozenset(), b"", NOW),
    "evidence": Evidence.from_json,
    "attestation": parse_attestation,
}
SEEDS: dict[str, Callable[[], bytes]] = {
    "cbor": lambda: VECTORS["nitro"]().evidence.body,
    "snp report": lambda: VECTORS["snp-milan"]().evidence.body,
    "spdm report": lambda: bytes.fromhex(VECTORS["gpu-hopper"]().evidence.body.decode()),
    "pem": lambda: VECTORS["snp-milan"]().evidence.certificates,
    "der": lambda: evidence_file("snp/test-vcek-invalid-new.der"),
    "certificate table": lambda: b"g" * 16 + b"\x30\0\0\0\x10\0\0\0" + bytes(24) + b"\x30" * 16,
    "rim": lambda: evidence_file("nvidia/NV_GPU_DRIVER_GH100_550.144.03.xml"),
    "evidence": lambda: VECTORS["snp-milan"]().evidence.to_json(),
    "attestation": lambda: (
        b'{"tee":"none","nonce":"00","bindings":{"hpke_key":"","tls_key_hash":"","receipt_key":"",'
        b'"manifest_digest":""},"evidence":' + VECTORS["snp-milan"]().evidence.to_json() + b"}"
    ),
}


def check_parser(data: st.DataObject, name: str) -> None:
    content = data.draw(st.binary(max_size=300) | mutations(SEEDS[name]()))
    with contextlib.suppress(Refused, MalformedEvidence):  # the only two ways to say no
        PARSERS[name](content)


@pytest.mark.parametrize("name", PARSERS)
@fuzzed(QUICK * 2)
@given(data=st.data())
def test_every_parser_says_yes_or_no(data: st.DataObject, name: str) -> None:
    check_parser(data, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", PARSERS)
def test_every_parser_for_long(name: str) -> None:
    soak(lambda data: check_parser(data, name))


# Behind the signatures

WORDS = st.sampled_from(
    "module_id digest timestamp pcrs certificate cabundle nonce user_data public_key iss exp nbf iat eat_nonce ueid "
    "submods measres x-ms-attestation-type x-ms-isolation-tee x-ms-runtime client-payload sevsnpvm tdxvm".split()
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=60) | st.text(max_size=20)
TREES = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS | st.integers(-5, 40), inner, max_size=8),
    max_leaves=20,
)
JSON_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS, inner, max_size=8),
    max_leaves=20,
)
GENUINE = {
    "nitro": ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "nonce", "user_data"),
    "maa": ("iss", "exp", "nbf", "x-ms-attestation-type", "x-ms-isolation-tee", "x-ms-runtime"),
}


def check_signed_nitro(data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(GENUINE["nitro"]), TREES, max_size=3))
    payload = data.draw(st.sampled_from([None, b"\xa0"]) | TREES.map(cbor2.dumps))
    body = aws().document(**changes) if payload is None else aws().message(payload)
    roots = VENDORS.trusting(Kind.NITRO, chain.fingerprint(aws().root))
    appraise(Evidence(Kind.NITRO, body), nonce=b"n" * 64, policy=ANYTHING, at=NOW, roots=roots)


def check_signed_tokens(data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(WORDS, JSON_TREES, max_size=4))
    genuine = {"iss": MAA, "exp": NOW.timestamp() + 60, "x-ms-attestation-type": "sevsnpvm"}
    header = {"jku": data.draw(JSON_TREES)} if data.draw(st.booleans()) else {}
    body = token(microsoft_key(), {**genuine, **changes}, **header).encode()
    appraise(Evidence(Kind.MAA, body), nonce=b"n", policy=ANYTHING, at=NOW, roots=token_roots())
    overall = token(nvidia_key(), {**genuine, "iss": NRAS, **changes}, **header)
    answer = json.dumps([["JWT", overall], {"GPU-0": overall}]).encode()
    assert not appraise(Evidence(Kind.NRAS, answer), nonce=None, policy=ANYTHING, at=NOW, roots=token_roots()).accepted


@cache
def reference_values() -> bytes:
    return publisher().rim("1", {1: (b"\1" * 48,)})


def check_signed_reports(data: st.DataObject) -> None:
    gpu = machine().gpus[0]
    measurements = data.draw(st.dictionaries(st.integers(0, 254), st.binary(max_size=60), max_size=8))
    opaque = data.draw(st.dictionaries(st.sampled_from([3, 6, 11, 20, 99]), st.binary(max_size=60), max_size=5))
    signed = replace(gpu, measurements=measurements, opaque=opaque).attest(b"n" * 32)
    collateral = {"driver_rim": data.draw(mutations(reference_values()))}
    evidence = replace(signed, collateral=collateral if data.draw(st.booleans()) else {})
    appraise(evidence, nonce=b"n" * 32, policy=ANY_GPU, at=NOW, roots=gpu_roots())
    assert spdm_report.parse(signed.body).measurements == measurements
    assert report_bytes(b"n" * 32, measurements, opaque) == signed.body[:-96]
    body = data.draw(mutations(chip().attest(bytes(64)).body))[:672].ljust(672, b"\0")
    try:
        report, _ = snp_report.parse(body + bytes(512))
    except Refused:
        return
    roots = VENDORS.trusting(Kind.SIMULATED, chip().root_fingerprint)
    resigned = Evidence(Kind.SIMULATED, chip().signed(report), chip().certificates)
    appraise(resigned, nonce=bytes(64), policy=ANY_KIND, at=NOW, roots=roots)


SIGNED = {"nitro": check_signed_nitro, "tokens": check_signed_tokens, "reports": check_signed_reports}


@pytest.mark.parametrize("name", SIGNED)
@fuzzed(QUICK)
@given(data=st.data())
def test_what_is_behind_a_good_signature_is_read_with_care(data: st.DataObject, name: str) -> None:
    SIGNED[name](data)


@pytest.mark.soak
@pytest.mark.parametrize("name", SIGNED)
def test_behind_signatures_for_long(name: str) -> None:
    soak(SIGNED[name])


@fuzzed(QUICK)
@given(
    part=st.sampled_from(["hpke_key", "tls_key_hash", "receipt_key", "manifest_digest"]),
    key=st.binary(min_size=32, max_size=32).filter(any),
)
def test_attestations_of_other_keys_are_refused(part: str, key: bytes) -> None:
    made = msgspec.to_builtins(Attester(chip(), Bindings(), TeeLabel.SIMULATED).attest(bytes(32), bytes(32)))
    made["bindings"][part] = key.hex()
    roots = VENDORS.trusting(Kind.SIMULATED, chip().root_fingerprint)
    content = msgspec.json.encode(made)
    _, appraisal = appraise_attestation(content, nonce=bytes(32), policy=ANY_KIND, at=NOW, roots=roots)
    assert not appraisal.accepted
