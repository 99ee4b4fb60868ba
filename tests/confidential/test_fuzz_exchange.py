"""The longer form of the fuzzers: every parser here that reads bytes of strangers, for minutes (``make soak``).

Nothing may crash, hang, or be accepted. The short forms are beside what they test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_der_x509_crl
from joserfc.jwk import ECKey, RSAKey

from confidential.soaking import rounds_for, seconds_each
from confidential.test_key_release import ARTIFACT, attestation, enveloped, policy, sealed_for
from confidential.test_sev_snp import tree
from confidential.test_tokens import eat, gpu_claims, machine, microsoft_key, token
from confidential.test_tokens import roots as token_roots
from evidence_files import utc
from pilotlight.confidential import chain
from pilotlight.confidential.air import Inference, sign_air, verify_air
from pilotlight.confidential.appraisal import Evidence, Kind, Policy, Refused
from pilotlight.confidential.attester import Attester
from pilotlight.confidential.aws import open_enveloped
from pilotlight.confidential.azure import SecureKeyRelease
from pilotlight.confidential.binding import Bindings
from pilotlight.confidential.ehbp import Frames, Sent, ServerKey, decode_key, encode_key
from pilotlight.confidential.issuer import Issuer
from pilotlight.confidential.kbs import KEY_ALGORITHM, KeyBroker
from pilotlight.confidential.keyserver import KeyServer, encrypted
from pilotlight.confidential.keyserver_policy import KeyPolicy
from pilotlight.confidential.pins import VENDORS
from pilotlight.confidential.receipts import Exchange, verify_by_evidence, verify_receipt
from pilotlight.confidential.remote import RemotePolicy, prove
from pilotlight.confidential.sealed_manifest import Recipient, SealedFile, SealedManifest, decode_sealed_manifest
from pilotlight.confidential.simulator import Simulator
from pilotlight.confidential.verify import appraise
from pilotlight.errors import PilotlightError
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord, final_record
from pilotlight.metering.signing import Signer
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from pilotlight.tee import TeeLabel

SECONDS_EACH = seconds_each(num_tests=14)
MAX_CASE_S = 10.0
KEY = Ed25519PrivateKey.generate()
SECRET = bytes(range(32))

Parse = Callable[[bytes], object]

NOW = utc("2026-11-01")
NONCE = bytes(32)


class SaysTheSame(PilotlightError):
    """A mutation left what is signed as it was: white space, or bits of base64 that mean nothing."""


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
    app = KeyServer(policy(simulator), Path("nowhere")).app()

    async def post(content: bytes) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://keys") as client:
            await client.post("/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"})
            answer = await client.post("/kbs/v0/attest", content=content)
            assert 400 <= answer.status_code < 500, answer.text
        raise PilotlightError("refused, as it has to be")

    return lambda content: asyncio.run(post(content)), json.dumps(attestation(simulator, "AA==")).encode()


def _frames() -> tuple[Parse, bytes]:
    key = ServerKey()
    sent = Sent(key.public)
    body = sent.seal(b"hello") + sent.seal(b"again")

    def parse(content: bytes) -> None:
        frames = Frames(1 << 16)
        received, text = key.receive(sent.header, next(frames.feed(content), b""))
        key._seen.clear()  # that a whole request is not taken twice is not what is asked here
        text += b"".join(received.open(frame) for frame in frames.feed(b""))
        frames.finish()
        if b"helloagain".startswith(text):
            raise SaysTheSame("a request that ends early has no closing brace: the API refuses it")

    return parse, body


def _answer_of_a_key_server() -> tuple[Parse, bytes]:
    simulator = Simulator.create()

    def parse(content: bytes) -> None:
        client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=content)))
        KeyBroker("http://keys", simulator, client).resource("a/b/c", "sha256:0")

    return parse, b'{"nonce": "AAAA", "token": "a.b.c"}'


def _encrypted_resource() -> tuple[Parse, bytes]:
    key = ECKey.generate_key("P-256")
    public = {**key.as_dict(private=False), "alg": KEY_ALGORITHM}
    broker = KeyBroker("http://keys", Simulator.create())

    def parse(content: bytes) -> None:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise PilotlightError("no JSON") from error
        if broker._opened(answer if isinstance(answer, dict) else {}, key) == SECRET:
            raise SaysTheSame("the key")

    return parse, json.dumps(
        encrypted(SECRET, {name: public[name] for name in ("alg", "crv", "kty", "x", "y")})
    ).encode()


def _answer_of_azure() -> tuple[Parse, bytes]:
    vault = rsa.generate_private_key(65537, 2048)
    wrapped = vault.public_key().encrypt(SECRET, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
    sealed = sealed_for(Recipient("azure", "https://v.vault.azure.net/keys/a/0", base64.b64encode(wrapped).decode()))

    def parse(content: bytes) -> None:
        client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=content)))
        if SecureKeyRelease("http://sidecar", "https://maa", client).release(sealed) == SECRET:
            raise SaysTheSame("the key")

    return parse, json.dumps({"key": json.dumps(RSAKey.import_key(vault).as_dict(private=True))}).encode()


def _token(kind: Kind, seed: bytes) -> tuple[Parse, bytes]:
    def judged(content: bytes) -> Any:
        policy = Policy(any_measurement=True)
        return appraise(Evidence(kind, content), nonce=None, policy=policy, at=NOW, roots=token_roots())

    genuine = judged(seed)
    assert genuine.accepted

    def parse(content: bytes) -> None:
        if judged(content).require().claims == genuine.claims:
            raise SaysTheSame("the token")

    return parse, seed


def _revocations() -> tuple[Parse, bytes]:
    root, leaf = tree()
    original = root.revoke()

    def parse(content: bytes) -> None:
        try:
            chain.check_not_revoked((leaf, root.certificate), [content], NOW)
        except Refused as refused:
            raise PilotlightError(str(refused)) from refused
        if _signed(content) == _signed(original):
            raise PilotlightError("it says the same")

    return parse, original


def _signed(revocations: bytes) -> bytes:
    """Return what the signature is of; the bits around it can be written in more than one way."""
    return load_der_x509_crl(revocations).tbs_certlist_bytes


def test_a_list_written_in_another_way_is_not_taken_for_another_list() -> None:
    """How many bits of the signature's last byte are unused is not signed, and does not matter where they are zero."""
    parse, original = _revocations()
    while original[-1] & 1:
        parse, original = _revocations()
    written_otherwise = bytearray(original)
    written_otherwise[-len(load_der_x509_crl(original).signature) - 1] = 1
    with pytest.raises(PilotlightError, match="says the same"):
        parse(bytes(written_otherwise))


def a_record() -> UsageRecord:
    admission = Admission(
        request_id="req-1",
        function="demo",
        artifact_digest=ARTIFACT,
        precision="int4",
        provider="cpu",
        replica_id="replica-1",
        started_at_utc="2026-11-22T10:00:00.000000Z",
        tee=TeeLabel.SIMULATED,
        prices=PriceTable.from_config({"id": "autumn", "currency": "EUR", "completion_per_million_tokens": "2"}),
    )
    return final_record(admission, Usage(1, 0, 2, 2), Timings(), FinishReason.STOP)


def attester(simulator: Simulator) -> Attester:
    roots = VENDORS.trusting(Kind.SIMULATED, simulator.root_fingerprint)
    keys = Bindings(b"h" * 32, receipt_key=KEY.public_key().public_bytes_raw())
    return Attester(simulator, keys, TeeLabel.SIMULATED, roots)


def asked(simulator: Simulator) -> RemotePolicy:
    return RemotePolicy(
        evidence=next(iter(policy(simulator).release)).evidence,
        labels=frozenset({TeeLabel.SIMULATED}),
        trust={Kind.SIMULATED: [simulator.root_fingerprint]},
    )


def _attestation() -> tuple[Parse, bytes]:
    simulator = Simulator.create()
    seed = msgspec.json.encode(attester(simulator).attest(NONCE, b"m" * 32))
    genuine = prove(seed, NONCE, asked(simulator), datetime.now(UTC))

    def parse(content: bytes) -> None:
        if prove(content, NONCE, asked(simulator), datetime.now(UTC)).bindings == genuine.bindings:
            raise SaysTheSame("the attestation")

    return parse, seed


def _receipt() -> tuple[Parse, bytes]:
    simulator = Simulator.create()
    by_it = attester(simulator)
    issuer = Issuer(Signer(KEY), lambda _: a_record(), by_it, by_it.roots)

    async def make() -> bytes:
        await issuer.ended("req-1", Exchange.of(b"question"))
        return await issuer.receipt("req-1", lambda _: True)

    seed = asyncio.run(make())
    genuine, _ = verify_by_evidence(seed, asked(simulator))

    def parse(content: bytes) -> None:
        with contextlib.suppress(PilotlightError):
            assert verify_receipt(content, KEY.public_key()) == genuine
        found, _ = verify_by_evidence(content, asked(simulator))
        if found == genuine:
            raise SaysTheSame("the receipt")

    return parse, seed


def _envelope() -> tuple[Parse, bytes]:
    vault = rsa.generate_private_key(65537, 2048)
    seed = enveloped(vault.public_key(), SECRET)

    def parse(content: bytes) -> None:
        """AES-CBC has no authentication: what an altered envelope decrypts to, the key's commitment refuses."""
        open_enveloped(content, vault)
        raise SaysTheSame("or another key, which opens nothing")

    return parse, seed


TARGETS: dict[str, Callable[[], tuple[Parse, bytes]]] = {
    "air": lambda: (lambda content: verify_air(content, KEY.public_key()), _air()),
    "envelope": _envelope,
    "attestation": _attestation,
    "receipt": _receipt,
    "attest": lambda: _attest_at(Simulator.create()),
    "frames": _frames,
    "a key server's answer": _answer_of_a_key_server,
    "an encrypted resource": _encrypted_resource,
    "an answer of Azure's sidecar": _answer_of_azure,
    "a token of Microsoft": lambda: _token(Kind.MAA, token(microsoft_key(), machine()).encode()),
    "tokens of NVIDIA": lambda: _token(Kind.NRAS, eat([gpu_claims(0), gpu_claims(1)])),
    "revocations": _revocations,
}
"""What nobody can make without a key: nothing is accepted that says anything else than the original."""


ACCEPTING: dict[str, tuple[Parse, bytes]] = {
    "key configuration": (decode_key, encode_key(ServerKey().public)),
    "sealed manifest": (lambda content: decode_sealed_manifest(content, Path("x")), _sealed_manifest()),
}
"""What has no signature of its own: some mutations are as good as the original."""


def _fuzz(parse: Parse, seed: bytes, rng: random.Random) -> None:
    """Try one case. Its time is that of this thread: a busy machine is no hang."""
    content = mutated(rng, seed)
    if content == seed:
        return
    begun_at = time.thread_time()
    try:
        parse(content)
    except PilotlightError:
        pass
    else:
        raise AssertionError(f"accepted: {content!r}")
    assert time.thread_time() - begun_at < MAX_CASE_S, content


def _soak(parse: Parse, seed: bytes) -> None:
    """Try what chance brings until the time is up, in each run something else."""
    number = random.SystemRandom().getrandbits(32)
    rng = random.Random(number)
    num_cases = rounds_for(SECONDS_EACH, lambda: _fuzz(parse, seed, rng))
    print(f"{num_cases:,} cases from {number}")


def _any_answer(parse: Parse) -> Parse:
    def answered(content: bytes) -> None:
        parse(content)
        raise SaysTheSame("or something else that is as good")

    return answered


@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_accepted(name: str) -> None:
    _soak(*TARGETS[name]())


@pytest.mark.soak
@pytest.mark.parametrize("name", ACCEPTING)
def test_nothing_crashes(name: str) -> None:
    parse, seed = ACCEPTING[name]
    _soak(_any_answer(parse), seed)


@pytest.mark.parametrize("name", TARGETS)
def test_the_fuzzers_run(name: str) -> None:
    """The same few in each run of the suite: a change that has nothing to do with this meets no fault by chance."""
    parse, seed = TARGETS[name]()
    rng = random.Random(1)
    for _ in range(20):
        _fuzz(parse, seed, rng)


def test_a_policy_that_is_any_text_is_refused(tmp_path: Path) -> None:
    rng = random.Random(1)
    file = tmp_path / "policy.toml"
    for _ in range(200):
        file.write_bytes(mutated(rng, b'[[release]]\nresource = "a/b/c"\n[release.evidence]\nkinds = ["simulated"]\n'))
        try:
            KeyPolicy.read(file)
        except PilotlightError:
            continue
