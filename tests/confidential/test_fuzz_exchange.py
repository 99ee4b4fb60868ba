"""The longer form of the fuzzers: every parser here that reads bytes of strangers, for minutes (``make soak``).

Nothing may crash, hang, or be accepted. The short forms are beside what they test.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confidential.test_key_release import attestation, enveloped, policy
from pilotlight.confidential.air import Inference, sign_air, verify_air
from pilotlight.confidential.aws import open_enveloped
from pilotlight.confidential.ehbp import Frames, Sent, ServerKey, decode_key, encode_key
from pilotlight.confidential.kbs import KeyBroker
from pilotlight.confidential.keyserver import KeyServer
from pilotlight.confidential.keyserver_policy import KeyPolicy
from pilotlight.confidential.receipts import verify_receipt
from pilotlight.confidential.remote import RemotePolicy, prove
from pilotlight.confidential.sealed_manifest import SealedFile, SealedManifest, decode_sealed_manifest
from pilotlight.confidential.simulator import Simulator
from pilotlight.errors import PilotlightError
from pilotlight.metering.signing import Signer

SECONDS_EACH = 45.0
MAX_CASE_S = 2.0
KEY = Ed25519PrivateKey.generate()

Parse = Callable[[bytes], object]

SIGNED = ("air", "envelope", "attestation", "receipt", "attest", "frames", "a key server's answer")
"""What nobody can make without a key: nothing but the original is accepted."""


def mutated(rng: random.Random, seed: bytes) -> bytes:
    """Return bytes that look like something: a few changed, cut out, doubled or put in."""
    content = bytearray(seed)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(content) + 1)
        how = rng.randrange(5)
        if how == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif how == 1:
            content[at:at] = rng.randbytes(rng.randint(1, 16))
        elif how == 2:
            del content[at : at + rng.randint(1, 16)]
        elif how == 3:
            content[at:at] = content[at : at + rng.randint(1, 64)]
        else:
            content[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"[[[[", b"\x80\x00\x00\x00"])
    return bytes(content) if rng.random() < 0.9 else rng.randbytes(rng.randint(0, 400))


def _air() -> bytes:
    digest = bytes(range(32))
    measurements: dict[str, bytes | str] = {"measurement": bytes(48), "measurement_type": "sev-snp"}
    inference = Inference("i", 1, "m", "v", digest, digest, digest, digest, measurements, 1, 1, 1, "simulated")
    return sign_air(inference, Signer(KEY))


def _sealed_manifest() -> bytes:
    return SealedManifest(
        1, f"sha256:{'0' * 64}", "0" * 64, "0" * 64, 16, {"manifest.json": SealedFile(20, ["0" * 64] * 2)}, []
    ).encode()


def _attest_at(simulator: Simulator) -> tuple[Parse, bytes]:
    import asyncio

    app = KeyServer(policy(simulator), Path("nowhere")).app()

    async def post(content: bytes) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://keys") as client:
            await client.post("/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"})
            answer = await client.post("/kbs/v0/attest", content=content)
            assert 400 <= answer.status_code < 500, answer.text
        raise PilotlightError("refused, as it has to be")

    return lambda content: asyncio.run(post(content)), json.dumps(attestation(simulator, "AA==")).encode()


def _request(content: bytes) -> None:
    key = ServerKey()
    sent = Sent(key.public)
    frames = Frames(1 << 16)
    first, *_ = [*frames.feed(content), b""]
    key.receive(sent.header, first)


def _answer_of_a_key_server(simulator: Simulator) -> Parse:
    def parse(content: bytes) -> None:
        client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=content)))
        KeyBroker("http://keys", simulator, client).resource("a/b/c", "sha256:0")

    return parse


def _targets() -> dict[str, Callable[[], tuple[Parse, bytes]]]:
    simulator = Simulator.create()
    vault = rsa.generate_private_key(65537, 2048)
    public = KEY.public_key()
    asked = RemotePolicy(evidence=next(iter(policy(simulator).release)).evidence)
    nonce = bytes(32)
    evidence = {"tee": "simulated", "nonce": "00" * 32, "bindings": dict.fromkeys(
        ("hpke_key", "tls_key_hash", "receipt_key", "manifest_digest"), "00" * 32
    ), "evidence": json.loads(simulator.attest(bytes(64)).to_json())}  # fmt: skip
    receipt = {"profile": "e30.e30.AA", "air": base64.b64encode(_air()).decode(), "attestation": json.dumps(evidence)}
    return {
        "air": lambda: (lambda content: verify_air(content, public), _air()),
        "envelope": lambda: (lambda content: open_enveloped(content, vault), enveloped(vault.public_key(), bytes(32))),
        "attestation": lambda: (
            lambda content: prove(content, nonce, asked, datetime.now(UTC)),
            json.dumps(evidence).encode(),
        ),
        "receipt": lambda: (lambda content: verify_receipt(content, public), json.dumps(receipt).encode()),
        "attest": lambda: _attest_at(simulator),
        "frames": lambda: (_request, Sent(ServerKey().public).seal(b"hello")),
        "a key server's answer": lambda: (_answer_of_a_key_server(simulator), b'{"nonce": "AAAA", "token": "a.b.c"}'),
    }


ACCEPTING: dict[str, tuple[Parse, bytes]] = {
    "key configuration": (decode_key, encode_key(ServerKey().public)),
    "sealed manifest": (lambda content: decode_sealed_manifest(content, Path("x")), _sealed_manifest()),
}
"""What has no signature of its own: some mutations are as good as the original."""


def _fuzz(parse: Parse, seed: bytes, seconds: float, may_accept: Callable[[bytes], bool]) -> int:
    rng = random.Random(len(seed))
    ends_at = time.monotonic() + seconds
    num_cases = 0
    while time.monotonic() < ends_at:
        content = mutated(rng, seed)
        if content == seed:
            continue
        begun_at = time.monotonic()
        try:
            parse(content)
            assert may_accept(content), content
        except PilotlightError:
            pass
        assert time.monotonic() - begun_at < MAX_CASE_S * 5, content
        num_cases += 1
    return num_cases


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", ["air", "envelope", "attestation", "receipt", "attest", "frames", "a key server's answer"]
)
def test_nothing_is_accepted(name: str) -> None:
    parse, seed = _targets()[name]()
    # AES-CBC has no authentication of its own: what an altered envelope decrypts to is refused by the key's commitment.
    num_cases = _fuzz(parse, seed, SECONDS_EACH, lambda _: name == "envelope")
    print(f"{name}: {num_cases:,} cases")


@pytest.mark.soak
@pytest.mark.parametrize("name", ACCEPTING)
def test_nothing_crashes(name: str) -> None:
    print(f"{name}: {_fuzz(*ACCEPTING[name], SECONDS_EACH, lambda _: True):,} cases")


@pytest.mark.parametrize(
    "name", ["air", "envelope", "attestation", "receipt", "attest", "frames", "a key server's answer"]
)
def test_the_fuzzers_run(name: str) -> None:
    parse, seed = _targets()[name]()
    assert _fuzz(parse, seed, 0.2, lambda _: name == "envelope") > 0


def test_a_policy_that_is_any_text_is_refused(tmp_path: Path) -> None:
    rng = random.Random(1)
    file = tmp_path / "policy.toml"
    for _ in range(200):
        file.write_bytes(mutated(rng, b'[[release]]\nresource = "a/b/c"\n[release.evidence]\nkinds = ["simulated"]\n'))
        try:
            KeyPolicy.read(file)
        except PilotlightError:
            continue
