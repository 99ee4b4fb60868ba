"""``GET /attestation`` and the label: from a server's settings to what a client may believe."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from pilotlight.api.app import Api
from pilotlight.api.attestation import MAX_WAITING
from pilotlight.api.metrics import Metrics
from pilotlight.api.response_store import ResponseStore
from pilotlight.artifact import Artifact
from pilotlight.confidential import attester as attesting
from pilotlight.confidential.appraisal import Evidence, Kind, MalformedEvidence, Policy, Problem
from pilotlight.confidential.attested import appraise_attestation
from pilotlight.confidential.attester import Attester, bound_keys, self_appraisal
from pilotlight.confidential.binding import Bindings
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.simulated_gpu import SimulatedGpus
from pilotlight.confidential.simulator import Simulator
from pilotlight.confidential.sources import Completed, Composite
from pilotlight.config import ConfidentialSettings, HostSettings, Settings
from pilotlight.errors import ConfigError, EvidenceUnavailable
from pilotlight.host.attesting import open_attester
from pilotlight.metering.signing import make_signing_key
from pilotlight.tee import TEE_HEADER, TeeLabel
from support import Serving, serving

NONCE = b"n" * 32
KEYS = Bindings(hpke_key=b"h" * 32, tls_key_hash=b"t" * 32, receipt_key=b"r" * 32)
ANY_SIMULATED = Policy(kinds=frozenset({Kind.SIMULATED}), any_measurement=True)
NOW = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator.create()


def attested_app(toy: Serving, attester: Any, *names: str) -> httpx.AsyncClient:
    functions = dict.fromkeys(names or ("toy",), toy.function)
    app = Api(functions, toy.ledger, Metrics(), 1000, ResponseStore.open(HostSettings()), attester=attester).app()
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://toy")


def judged(content: bytes, simulator: Simulator, nonce: bytes = NONCE) -> tuple[Bindings, Any]:
    roots = VENDORS.trusting(Kind.SIMULATED, simulator.root_fingerprint)
    return appraise_attestation(content, nonce=nonce, policy=ANY_SIMULATED, at=NOW, roots=roots)


def test_a_client_learns_the_keys_and_that_they_are_bound(
    toy_artifact: Artifact, tmp_path: Path, simulator: Simulator
) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            async with attested_app(toy, Attester(simulator, KEYS, TeeLabel.SIMULATED)) as client:
                answer = await client.get("/attestation", params={"nonce": NONCE.hex()})
            assert answer.status_code == 200
            assert answer.headers[TEE_HEADER] == answer.json()["tee"] == "simulated"
            bindings, appraisal = judged(answer.content, simulator)
            assert appraisal.accepted
            assert appraisal.label is TeeLabel.SIMULATED
            digest = bytes.fromhex(toy_artifact.digest.removeprefix("sha256:"))
            assert bindings == replace(KEYS, manifest_digest=digest)

    asyncio.run(scenario())


def test_each_single_change_of_an_attestation_is_noticed(simulator: Simulator) -> None:
    content = msgspec.json.encode(Attester(simulator, KEYS, TeeLabel.SIMULATED).attest(NONCE, b"m" * 32))
    assert judged(content, simulator)[1].accepted
    _, stale = judged(content, simulator, nonce=b"o" * 32)
    assert [reason.problem for reason in stale.reasons] == [Problem.NONCE]
    for part in ("hpke_key", "tls_key_hash", "receipt_key", "manifest_digest"):
        changed = json.loads(content)
        changed["bindings"][part] = "ff" * 32
        _, appraisal = judged(json.dumps(changed).encode(), simulator)
        assert [reason.problem for reason in appraisal.reasons] == [Problem.NONCE]


def test_what_is_no_attestation_is_refused(simulator: Simulator) -> None:
    made = Attester(simulator, KEYS, TeeLabel.SIMULATED).attest(NONCE, b"m" * 32)
    for bad in (
        b"",
        b"[]",
        b" " * 5_000_000,
        b'{"tee":' * 10_000,
        msgspec.json.encode(msgspec.structs.replace(made, evidence=None)),
        msgspec.json.encode(
            msgspec.structs.replace(made, bindings=msgspec.structs.replace(made.bindings, hpke_key="00"))
        ),
    ):
        with pytest.raises(MalformedEvidence):
            judged(bad, simulator)


def test_without_a_source_the_label_is_none_everywhere(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy:
            answer = await toy.client.get("/attestation", params={"nonce": NONCE.hex()})
            assert answer.json()["tee"] == "none"
            assert "evidence" not in answer.json() or answer.json()["evidence"] is None
            completed = await toy.complete("hi", max_tokens=2)
            for response in (answer, completed, await toy.client.get("/missing"), await toy.client.get("/livez")):
                assert response.headers[TEE_HEADER] == "none"
            record = toy.ledger.get(completed.headers["x-request-id"])
            assert record is not None
            assert record.tee is TeeLabel.NONE

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({}, 400),
        ({"nonce": "00"}, 400),
        ({"nonce": "G" * 64}, 400),
        ({"nonce": "0" * 64, "model": "other"}, 404),
        ({"nonce": "0" * 64}, 400),
        ({"nonce": "0" * 64, "model": "b"}, 200),
    ],
    ids=str,
)
def test_a_query_is_checked(toy_artifact: Artifact, tmp_path: Path, query: dict[str, str], status: int) -> None:
    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy, attested_app(toy, None, "a", "b") as client:
            assert (await client.get("/attestation", params=query)).status_code == status

    asyncio.run(scenario())


class Stuck:
    """A source whose hardware does not answer until it may."""

    label = TeeLabel.NONE

    def __init__(self) -> None:
        self.may_go = threading.Event()

    def attest(self, nonce: bytes, manifest_digest: bytes) -> Any:
        self.may_go.wait()
        raise EvidenceUnavailable("the hardware has none")


def test_few_wait_for_slow_hardware_and_the_others_are_told(toy_artifact: Artifact, tmp_path: Path) -> None:
    async def scenario() -> None:
        source = Stuck()
        async with serving(toy_artifact, tmp_path) as toy, attested_app(toy, source) as client:
            asked = [
                asyncio.create_task(client.get("/attestation", params={"nonce": NONCE.hex()}))
                for _ in range(MAX_WAITING + 1)
            ]
            first, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result().json()["error"]["code"] for task in first] == ["overloaded"]
            source.may_go.set()
            answers = [task.result() for task in (await asyncio.wait(asked))[0] - first]
            assert {answer.json()["error"]["code"] for answer in answers} == {"evidence_unavailable"}
            assert {answer.status_code for answer in answers} == {503}

    asyncio.run(scenario())


def test_a_defect_of_ours_carries_the_label_too(toy_artifact: Artifact, tmp_path: Path, simulator: Simulator) -> None:
    class Broken:
        label = TeeLabel.SIMULATED

        def attest(self, nonce: bytes, manifest_digest: bytes) -> Any:
            raise AssertionError

    async def scenario() -> None:
        async with serving(toy_artifact, tmp_path) as toy, attested_app(toy, Broken()) as client:
            answer = await client.get("/attestation", params={"nonce": NONCE.hex()}, headers={"x-request-id": "mine"})
            assert (answer.status_code, answer.headers[TEE_HEADER], answer.headers["x-request-id"]) == (
                500,
                "simulated",
                "mine",
            )

    asyncio.run(scenario())


def settings_of(**confidential: Any) -> Settings:
    return Settings(confidential=ConfidentialSettings(**confidential))


def test_the_settings_open_what_they_name(tmp_path: Path) -> None:
    assert open_attester(settings_of()) is None
    opened = open_attester(settings_of(evidence="simulator", simulator=str(tmp_path / "chip.pem")), b"h" * 32)
    assert opened is not None
    assert opened.label is TeeLabel.SIMULATED
    assert opened.attest(NONCE, b"m" * 32).bindings.hpke_key == "68" * 32


@pytest.mark.parametrize("evidence", ["none", "simulator"])
def test_where_hardware_is_required_nothing_else_starts(tmp_path: Path, evidence: str) -> None:
    settings = settings_of(evidence=evidence, simulator=str(tmp_path / "chip.pem"), require_tee=True)
    with pytest.raises(ConfigError, match="'hardware' is required"):
        open_attester(settings)


def test_evidence_that_nobody_would_accept_does_not_start_where_hardware_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Forged:
        def attest(self, report_data: bytes) -> Evidence:
            return Evidence(Kind.SEV_SNP, bytes(1184))

    monkeypatch.setattr(attesting, "detect", lambda certificates: Forged())
    assert not self_appraisal(Forged(), VENDORS, NOW).accepted
    opened = open_attester(settings_of(evidence="hardware"))
    assert opened is not None
    assert opened.label is TeeLabel.NONE
    with pytest.raises(ConfigError, match="'hardware' is required"):
        open_attester(settings_of(evidence="hardware", require_tee=True))
    monkeypatch.setattr(attesting, "detect", lambda certificates: None)
    with pytest.raises(ConfigError, match="this machine has none of"):
        open_attester(settings_of(evidence="hardware"))


def test_keys_of_a_host_are_bound(tmp_path: Path, simulator: Simulator) -> None:
    make_signing_key(tmp_path / "signing.pem")
    (tmp_path / "tls.pem").write_bytes(simulator.certificates)
    settings = Settings(
        host=HostSettings(signing_key=str(tmp_path / "signing.pem")),
        confidential=ConfidentialSettings(tls_certificate=str(tmp_path / "tls.pem")),
    )
    bindings = bound_keys(settings, b"h" * 32)
    assert bindings.receipt_key != bytes(32) != bindings.tls_key_hash
    assert bound_keys(Settings(), b"h" * 32) == Bindings(hpke_key=b"h" * 32)
    for bad in (
        Settings(host=HostSettings(signing_key=str(tmp_path / "tls.pem"))),
        settings_of(tls_certificate=str(tmp_path / "signing.pem")),
        settings_of(tls_certificate=str(tmp_path / "missing.pem")),
    ):
        with pytest.raises(ConfigError):
            bound_keys(bad, b"h" * 32)


def test_evidence_is_completed_by_files_that_others_renew(tmp_path: Path, simulator: Simulator) -> None:
    for name in ("crl", "driver_rim", "tdx"):
        (tmp_path / name).write_bytes(name.encode())
    gpus = SimulatedGpus(1)
    source = Completed(Composite(simulator, gpus), {name: tmp_path / name for name in ("crl", "driver_rim", "tdx")})
    evidence = source.attest(bytes(64))
    assert evidence.collateral == {"crl": b"crl"}
    assert evidence.devices[0].collateral == {"driver_rim": b"driver_rim"}
    (tmp_path / "crl").write_bytes(b"renewed")
    assert source.attest(bytes(64)).collateral == {"crl": b"renewed"}
    (tmp_path / "crl").unlink()
    with pytest.raises(EvidenceUnavailable, match="crl: No such file"):
        source.attest(bytes(64))


def test_collateral_that_does_not_hold_leaves_no_label(tmp_path: Path) -> None:
    (tmp_path / "crl").write_bytes(b"no list of revocations")
    chip = str(tmp_path / "chip.pem")
    opened = open_attester(settings_of(evidence="simulator", simulator=chip, collateral={"crl": str(tmp_path / "crl")}))
    assert opened is not None
    assert opened.label is TeeLabel.NONE
