"""The proxy, in front of a server with evidence, encryption and receipts; and each tampering, which stops it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from confidential.served import Change, Middle, flipped
from pilotlight.api.encrypted_bodies import EncryptedBodies
from pilotlight.api.receipts import Receipts
from pilotlight.artifact import Artifact
from pilotlight.confidential.air import NotAnAir, verify_air
from pilotlight.confidential.appraisal import Kind, Policy
from pilotlight.confidential.attester import Attester
from pilotlight.confidential.binding import Bindings
from pilotlight.confidential.ehbp import ServerKey
from pilotlight.confidential.issuer import Issuer
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.proxy import MAX_ATTESTATION_BYTES, PROVE_AGAIN_AFTER_S, Proxy
from pilotlight.confidential.receipts import Exchange, ReceiptRefused, issue, verify_by_evidence, verify_receipt
from pilotlight.confidential.remote import RemotePolicy, prove
from pilotlight.confidential.simulator import MEASUREMENT, Simulator
from pilotlight.errors import PilotlightError
from pilotlight.metering.signing import Signer
from pilotlight.tee import TeeLabel
from support import Serving, events, serving

SIGNING_KEY = Ed25519PrivateKey.generate()
BODY = {"model": "toy", "messages": [{"role": "user", "content": "velvet anchor"}], "max_tokens": 6}


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator.create()


def policy_for(simulator: Simulator, **changes: Any) -> RemotePolicy:
    fields: dict[str, Any] = {
        "evidence": Policy(kinds=frozenset({Kind.SIMULATED}), claims={"measurement": frozenset({MEASUREMENT.hex()})}),
        "labels": frozenset({TeeLabel.SIMULATED}),
        "trust": {Kind.SIMULATED: [simulator.root_fingerprint]},
    }
    return RemotePolicy(**{**fields, **changes})


@dataclass
class Stand:
    """Everything between a client and a toy function."""

    serving: Serving
    proxy: Proxy
    client: httpx.AsyncClient
    middle: Middle
    key: ServerKey
    receipts_dir: Path
    tampering: Tampering

    async def ask(self, **changes: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={**BODY, **changes})


@dataclass
class Tampering:
    """What somebody does between proxy and server. ``json`` changes the answer of a GET whose path begins so."""

    request: Change = lambda frames: frames
    response: Change = lambda frames: frames
    json: dict[str, Callable[[dict[str, Any]], None]] = field(default_factory=dict)
    flipped_header: str = ""
    claimed_label: str = "simulated"
    simulator: Simulator | None = None
    artifact_digest: bytes | None = None


@contextlib.asynccontextmanager
async def stand(
    artifact: Artifact, directory: Path, simulator: Simulator, policy: RemotePolicy, tampering: Tampering
) -> AsyncIterator[Stand]:
    key = ServerKey()
    roots = VENDORS.trusting(Kind.SIMULATED, simulator.root_fingerprint)
    bindings = Bindings(key.public.public_bytes_raw(), receipt_key=SIGNING_KEY.public_key().public_bytes_raw())
    attester = Attester(tampering.simulator or simulator, bindings, TeeLabel.SIMULATED, roots)
    ledgers: list[Any] = []
    issuer = Issuer(Signer(SIGNING_KEY), lambda name: ledgers[0].get(name), attester, roots)

    def encrypted(app: ASGIApp) -> ASGIApp:
        return EncryptedBodies(app, key, 100_000, required=True)

    def with_receipts(app: ASGIApp) -> ASGIApp:
        return Receipts(app, issuer)

    running = serving(
        artifact,
        directory,
        middleware=[encrypted, with_receipts],
        attester=attester,
        tee=TeeLabel.SIMULATED,
    )
    async with running as served:
        ledgers.append(served.ledger)
        middle = Middle(tampering.request, tampering.response, tampering.flipped_header)
        app = _labelled(middle.around(served.app), tampering.claimed_label)
        transport = httpx.ASGITransport(_changing(app, tampering.json))

        def make_client(url: httpx.URL, proven: object) -> httpx.AsyncClient:
            return httpx.AsyncClient(transport=transport, base_url=url)

        proxy = Proxy("http://remote", policy, directory / "receipts", make_client)
        through = httpx.ASGITransport(proxy.app())
        async with httpx.AsyncClient(transport=through, base_url="http://proxy") as client:
            yield Stand(served, proxy, client, middle, key, directory / "receipts", tampering)


def _labelled(app: ASGIApp, label: str) -> ASGIApp:
    """Return an app whose header of the label says this."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        async def changed(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [(name, value) for name, value in message["headers"] if name != b"x-pilotlight-tee"]
                message = {**message, "headers": [*others, (b"x-pilotlight-tee", label.encode())]}
            await send(message)

        await app(scope, receive, changed)

    return handle


def _changing(app: ASGIApp, changes: dict[str, Callable[[dict[str, Any]], None]]) -> ASGIApp:
    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        change = next((found for path, found in changes.items() if scope["path"].startswith(path)), None)
        if change is None or scope["method"] != "GET":
            await app(scope, receive, send)
            return

        async def changed(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                message = {**message, "headers": kept}
            elif message.get("body"):
                content = json.loads(message["body"])
                change(content)
                message = {**message, "body": json.dumps(content, separators=(",", ":")).encode()}
            await send(message)

        await app(scope, receive, changed)

    return handle


Scenario = Callable[[Stand], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def run(toy_artifact: Artifact, tmp_path: Path, simulator: Simulator) -> Run:
    def run_one(scenario: Scenario, tampering: Tampering | None = None, **policy: Any) -> None:
        async def main() -> None:
            chosen = policy_for(simulator, **policy)
            async with stand(toy_artifact, tmp_path, simulator, chosen, tampering or Tampering()) as there:
                await scenario(there)

        asyncio.run(main())

    return run_one


def test_an_answer_comes_through_and_its_receipt_is_kept(
    run: Run, toy_artifact: Artifact, simulator: Simulator, tmp_path: Path
) -> None:
    answers: list[bytes] = []

    async def scenario(there: Stand) -> None:
        for stream in (False, True):
            response = await there.ask(stream=stream)
            assert response.status_code == 200, response.text
            assert response.headers["x-pilotlight-tee"] == "simulated"
            answers.append(response.content)
        assert events(answers[1].decode())
        assert answers[1].endswith(b"data: [DONE]\n\n")
        assert (await there.client.get("/v1/models")).json()["data"][0]["id"] == "toy"
        for _, body in there.middle.requests:
            assert b"velvet" not in body

    run(scenario, artifacts=frozenset({toy_artifact.digest}))
    files = sorted((tmp_path / "receipts").iterdir())
    assert len(files) == 2
    whole = next(file for file in files if json.loads(answers[0])["id"] == file.stem)
    profile, appraisal = verify_by_evidence(whole.read_bytes(), policy_for(simulator))
    assert profile.artifact_digest == toy_artifact.digest
    assert profile.tee is TeeLabel.SIMULATED
    assert profile.record.completion_tokens == 6
    assert profile.record.cost_micros > 0
    assert appraisal.label is TeeLabel.SIMULATED
    air = json.loads(whole.read_bytes())["air"]
    claims = verify_air(base64.b64decode(air), SIGNING_KEY.public_key())
    assert claims["response_hash"].hex() == profile.response_sha256
    assert claims["enclave_measurements"]["measurement"] == MEASUREMENT


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            content = content[name]
        content[last] = value

    return change


def _flip_evidence(content: dict[str, Any]) -> None:
    body = bytearray(base64.b64decode(content["evidence"]["body"]))
    body[100] ^= 1
    content["evidence"]["body"] = base64.b64encode(body).decode()


def _add_device(content: dict[str, Any]) -> None:
    content["evidence"]["devices"] = [dict(content["evidence"])]


def _flip_text(name: str, at: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        text = content[name]
        content[name] = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]

    return change


def _relabel(content: dict[str, Any]) -> None:
    """Write another label into what is signed, and leave the signature as it was."""
    head, payload, signature = content["profile"].split(".")
    text = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)).replace(b'"simulated"', b'"hardware"')
    content["profile"] = f"{head}.{base64.urlsafe_b64encode(text).rstrip(b'=').decode()}.{signature}"


STOPPED: dict[str, tuple[Tampering, dict[str, Any]]] = {
    "a foreign HPKE key": (Tampering(json={"/attestation": _set("bindings.hpke_key", "11" * 32)}), {}),
    "a foreign receipt key": (Tampering(json={"/attestation": _set("bindings.receipt_key", "11" * 32)}), {}),
    "a foreign artifact": (Tampering(json={"/attestation": _set("bindings.manifest_digest", "11" * 32)}), {}),
    "altered evidence": (Tampering(json={"/attestation": _flip_evidence}), {}),
    "no evidence": (Tampering(json={"/attestation": _set("evidence", None)}), {}),
    "another chip": (Tampering(simulator=Simulator.create()), {}),
    "an artifact that was not asked for": (Tampering(), {"artifacts": frozenset({f"sha256:{'00' * 32}"})}),
    "a label that is not enough": (Tampering(), {"labels": frozenset({TeeLabel.HARDWARE})}),
    "another measurement": (
        Tampering(),
        {"evidence": Policy(kinds=frozenset({Kind.SIMULATED}), claims={"measurement": frozenset({"00" * 48})})},
    ),
    "a root that is not trusted": (Tampering(), {"trust": {}}),
    "a flipped bit of the request": (Tampering(request=flipped(0)), {}),
    "a flipped bit of the answer": (Tampering(response=flipped(0)), {}),
    "a flipped bit of the end": (Tampering(response=flipped(-1)), {}),
    "an answer without its end": (Tampering(response=lambda frames: frames[:-1]), {}),
    "an empty answer": (Tampering(response=lambda _: []), {}),
    "an answer that is cut within a frame": (Tampering(response=lambda frames: [*frames[:-1], frames[-1][:-1]]), {}),
    "something behind the end": (Tampering(response=lambda frames: [*frames, frames[-1]]), {}),
    "frames of the answer in another order": (
        Tampering(response=lambda frames: [*frames[1:-1], frames[0], frames[-1]] if len(frames) > 2 else frames[::-1]),
        {},
    ),
    "a frame of the answer twice": (Tampering(response=lambda frames: [frames[0], *frames]), {}),
    "another encapsulated key": (Tampering(flipped_header="ehbp-encapsulated-key"), {}),
    "another nonce of the answer": (Tampering(flipped_header="ehbp-response-nonce"), {}),
    "another name of the request": (Tampering(flipped_header="x-request-id"), {}),
    "a foreign TLS key": (Tampering(json={"/attestation": _set("bindings.tls_key_hash", "11" * 32)}), {}),
    "evidence of another kind": (Tampering(json={"/attestation": _set("evidence.kind", "sev-snp")}), {}),
    "evidence without its chain": (Tampering(json={"/attestation": _set("evidence.certificates", "")}), {}),
    "evidence with a device": (Tampering(json={"/attestation": _add_device}), {}),
    "a receipt with another AIR": (Tampering(json={"/v1/receipts/": _flip_text("air", 200)}), {}),
    "a receipt with other evidence": (Tampering(json={"/v1/receipts/": _flip_text("attestation", 100)}), {}),
    "a receipt with another label": (Tampering(json={"/v1/receipts/": _relabel}), {}),
    "an altered receipt": (Tampering(json={"/v1/receipts/": _set("profile", "a.b.c")}), {}),
    "a receipt without its AIR": (Tampering(json={"/v1/receipts/": _set("air", None)}), {}),
    "a receipt without its evidence": (Tampering(json={"/v1/receipts/": _set("attestation", None)}), {}),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("tampering", "policy"), STOPPED.values(), ids=STOPPED.keys())
def test_each_tampering_stops_it(run: Run, tampering: Tampering, policy: dict[str, Any], stream: bool) -> None:
    async def scenario(there: Stand) -> None:
        response = await there.ask(stream=stream)
        if response.status_code == 200:
            assert stream
            assert b"[DONE]" not in response.content
            assert "error" in events(response.text)[-1]
        else:
            assert 400 <= response.status_code < 600
            assert response.json()["error"]["code"]
        assert not list(there.receipts_dir.glob("*"))

    run(scenario, tampering, **policy)


def test_nothing_is_sent_to_a_server_that_does_not_prove_itself(run: Run) -> None:
    async def scenario(there: Stand) -> None:
        assert (await there.ask()).status_code == 502
        assert there.middle.requests == []

    run(scenario, Tampering(json={"/attestation": _flip_evidence}))


def _replaying(kept: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """Return what answers with the first answer again."""

    def change(content: dict[str, Any]) -> None:
        kept.append(json.loads(json.dumps(content)))
        content.clear()
        content.update(kept[0])

    return change


def test_evidence_for_an_earlier_nonce_is_refused(run: Run) -> None:
    kept: list[dict[str, Any]] = []

    async def scenario(there: Stand) -> None:
        now = [0.0]
        there.proxy._clock = lambda: now[0]
        assert (await there.ask()).status_code == 200
        now[0] = PROVE_AGAIN_AFTER_S
        answer = await there.ask()
        assert answer.status_code == 502
        assert "nonce" in answer.json()["error"]["message"]
        assert len(kept) == 2
        assert len(there.middle.requests) == 1

    run(scenario, Tampering(json={"/attestation": _replaying(kept)}))


def test_the_receipt_of_an_earlier_request_is_refused(run: Run) -> None:
    async def scenario(there: Stand) -> None:
        assert (await there.ask()).status_code == 200
        answer = await there.ask()
        assert answer.status_code == 502
        assert "receipt" in answer.json()["error"]["message"]
        assert len(list(there.receipts_dir.iterdir())) == 1

    run(scenario, Tampering(json={"/v1/receipts/": _replaying([])}))


def test_the_label_that_a_client_sees_is_what_the_evidence_was_worth(run: Run) -> None:
    """The server's own header goes in clear, and anybody can write `hardware` into it."""

    async def scenario(there: Stand) -> None:
        answer = await there.ask()
        assert answer.status_code == 200
        assert answer.headers.get_list("x-pilotlight-tee") == ["simulated"]

    run(scenario, Tampering(claimed_label="hardware"))


def test_one_receipt_does_not_stand_for_another(run: Run, simulator: Simulator, tmp_path: Path) -> None:
    async def scenario(there: Stand) -> None:
        await there.ask()
        await there.ask(max_tokens=3)

    run(scenario)
    first, second = ((tmp_path / "receipts" / file.name).read_bytes() for file in (tmp_path / "receipts").iterdir())
    one, other = json.loads(first), json.loads(second)
    key = SIGNING_KEY.public_key()
    verify_receipt(first, key)
    with pytest.raises(ReceiptRefused, match="AIR"):
        verify_receipt(json.dumps({**one, "air": other["air"]}).encode(), key)
    with pytest.raises(ReceiptRefused, match="another request"):
        verify_receipt(first, key, Exchange.of(b"{}"))
    with pytest.raises(ReceiptRefused):
        verify_receipt(first, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(PilotlightError):
        verify_by_evidence(first, policy_for(Simulator.create()))
    with pytest.raises(PilotlightError):
        verify_by_evidence(first, policy_for(simulator, artifacts=frozenset({f"sha256:{'00' * 32}"})))


def test_a_renewed_key_is_proven_again(run: Run) -> None:
    async def scenario(there: Stand) -> None:
        assert (await there.ask()).status_code == 200
        there.key._max_seen = 0  # the next request uses the key up
        assert (await there.ask()).status_code == 200
        answer = await there.ask()
        assert answer.status_code == 502, "an attester that was not told has evidence for the old key"

    run(scenario)


def test_a_server_proves_itself_again_after_a_while(run: Run) -> None:
    async def scenario(there: Stand) -> None:
        now = [0.0]
        there.proxy._clock = lambda: now[0]
        assert (await there.ask()).status_code == 200
        there.tampering.json["/attestation"] = _flip_evidence
        assert (await there.ask()).status_code == 200
        now[0] = PROVE_AGAIN_AFTER_S
        assert (await there.ask()).status_code == 502

    run(scenario, Tampering())


def test_bodies_that_cannot_be_forwarded_are_refused(run: Run) -> None:
    async def scenario(there: Stand) -> None:
        for content in (b"", b"[]", b'{"model": 1}', b"\xff"):
            response = await there.client.post("/v1/chat/completions", content=content)
            assert response.status_code == 400

    run(scenario)


@given(content=st.binary(max_size=300))
def test_any_bytes_are_no_attestation_no_receipt_and_no_air(simulator: Simulator, content: bytes) -> None:
    with pytest.raises(PilotlightError):
        prove(content, bytes(32), policy_for(simulator), datetime.now(UTC))
    with pytest.raises(ReceiptRefused):
        verify_receipt(content, SIGNING_KEY.public_key())
    with pytest.raises(ReceiptRefused):
        verify_by_evidence(content, policy_for(simulator))
    with pytest.raises(NotAnAir):
        verify_air(content, SIGNING_KEY.public_key())


@pytest.fixture(scope="module")
def a_receipt(toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory, simulator: Simulator) -> bytes:
    directory = tmp_path_factory.mktemp("receipt")

    async def main() -> None:
        async with stand(toy_artifact, directory, simulator, policy_for(simulator), Tampering()) as there:
            await there.ask()

    asyncio.run(main())
    return next((directory / "receipts").iterdir()).read_bytes()


@given(data=st.data())
def test_a_mutated_receipt_is_refused(a_receipt: bytes, simulator: Simulator, data: st.DataObject) -> None:
    mutated = bytearray(a_receipt)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] = (mutated[at] + data.draw(st.integers(1, 255))) % 256
    try:
        profile, _ = verify_by_evidence(bytes(mutated), policy_for(simulator))
    except PilotlightError:
        return
    assert profile == verify_receipt(a_receipt, SIGNING_KEY.public_key()), "what is accepted says the same"


@given(data=st.data())
def test_a_mutated_air_is_refused(a_receipt: bytes, data: st.DataObject) -> None:
    mutated = bytearray(base64.b64decode(json.loads(a_receipt)["air"]))
    at = data.draw(st.integers(0, len(mutated) - 1))
    mutated[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(NotAnAir):
        verify_air(bytes(mutated), SIGNING_KEY.public_key())


def test_the_label_in_a_receipt_is_that_of_its_evidence(a_receipt: bytes, simulator: Simulator) -> None:
    """Even the holder of the receipt key cannot call simulated evidence hardware."""
    key = SIGNING_KEY.public_key()
    profile = verify_receipt(a_receipt, key)
    record = msgspec.structs.replace(profile.record, tee=TeeLabel.HARDWARE)
    lie = msgspec.json.encode(msgspec.structs.replace(profile, tee=TeeLabel.HARDWARE, record=record)).decode()
    head, signature = Signer(SIGNING_KEY).sign(lie).split(".")
    payload = base64.urlsafe_b64encode(lie.encode()).rstrip(b"=").decode()
    forged = json.dumps({**json.loads(a_receipt), "profile": f"{head}.{payload}.{signature}"}).encode()
    assert verify_receipt(forged, key).tee is TeeLabel.HARDWARE
    with pytest.raises(ReceiptRefused, match="says hardware"):
        verify_by_evidence(forged, policy_for(simulator))


def test_a_receipt_without_evidence_needs_the_key(a_receipt: bytes, simulator: Simulator) -> None:
    """Where there is no trusted execution environment, a receipt says so, and is signed all the same."""
    key = SIGNING_KEY.public_key()
    record = msgspec.structs.replace(verify_receipt(a_receipt, key).record, tee=TeeLabel.NONE)
    exchange = Exchange.of(b"question")
    exchange.received(b"answer")
    receipt = issue(record, exchange, Signer(SIGNING_KEY), None, 1).encode()
    profile = verify_receipt(receipt, key, exchange)
    assert (profile.tee, profile.evidence_digest, profile.air_sha256) == (TeeLabel.NONE, None, None)
    with pytest.raises(ReceiptRefused, match="no evidence"):
        verify_by_evidence(receipt, policy_for(simulator))
    air = json.loads(a_receipt)["air"]
    with pytest.raises(ReceiptRefused, match="AIR"):
        verify_receipt(json.dumps({**json.loads(receipt), "air": air}).encode(), key)


def test_who_says_that_the_key_has_changed_when_it_has_not_gets_no_second_request(run: Run) -> None:
    """Somebody in between could pass the first one on, and have the same question answered, and paid, twice."""
    seen: list[bytes] = []

    def reject(frames: list[bytes]) -> list[bytes]:
        seen.append(b"".join(frames))
        return flipped(0)(frames)

    async def scenario(there: Stand) -> None:
        answer = await there.ask()
        assert answer.status_code == 502
        assert "has changed, and it has not" in answer.json()["error"]["message"]
        assert len(seen) == 1

    run(scenario, Tampering(request=reject))


@pytest.mark.parametrize("headers", [[], [(b"content-encoding", b"gzip")]], ids=["long", "packed"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
def test_an_answer_without_an_end_is_not_read_to_it(
    simulator: Simulator, path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    given: list[int] = []

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                given.append(1)
                yield b" " * 65536

    async def main() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, stream=Endless()))
        proxy = Proxy(
            "http://remote",
            policy_for(simulator),
            make_client=lambda url, _: httpx.AsyncClient(transport=transport, base_url=url),
        )
        through = httpx.ASGITransport(proxy.app())
        async with httpx.AsyncClient(transport=through, base_url="http://proxy") as client:
            answer = await (client.get(path) if path.endswith("models") else client.post(path, json=BODY))
        assert answer.status_code == 502
        assert "TooLarge" in answer.json()["error"]["message"]

    asyncio.run(main())
    assert len(given) <= MAX_ATTESTATION_BYTES // 65536 + 1
