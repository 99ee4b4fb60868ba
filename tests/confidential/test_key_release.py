"""Key release: our client against our key server, and against answers of Azure and AWS in their recorded shapes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from asn1crypto import algos, cms, core
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import ECKey, RSAKey
from moto import mock_aws

from evidence_files import evidence_file
from pilotlight.artifact import Artifact
from pilotlight.confidential.appraisal import Evidence, Kind, Policy
from pilotlight.confidential.aws import AwsKms, encrypt_at_aws, open_enveloped
from pilotlight.confidential.azure import SecureKeyRelease
from pilotlight.confidential.kbs import GuestService, KeyBroker, runtime_hash
from pilotlight.confidential.key_release import KeyNotReleased, Unsealing
from pilotlight.confidential.keyserver import SESSION_COOKIE, SESSION_TTL_S, KeyServer
from pilotlight.confidential.keyserver_policy import KeyPolicy, Release
from pilotlight.confidential.sealed_manifest import Recipient, SealedFile, SealedManifest
from pilotlight.confidential.sealing import Publisher, seal
from pilotlight.confidential.simulator import MEASUREMENT, Simulator
from pilotlight.errors import ConfigError
from pilotlight.tee import TeeLabel

KEY = bytes(range(32))
RESOURCE = "default/key/toy"
ARTIFACT = f"sha256:{'ab' * 32}"


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator.create()


def sealed_for(*recipients: Recipient) -> SealedManifest:
    files = {"manifest.json": SealedFile(0, ["00" * 32])}
    return SealedManifest(1, ARTIFACT, "00" * 32, "00" * 32, 16, files, list(recipients))


@dataclass
class Wire:
    """A key server in this process; what goes over the wire can be seen and changed."""

    server: KeyServer
    change: Callable[[httpx.Request], httpx.Request] = lambda request: request
    change_answer: Callable[[str, dict[str, Any]], None] = lambda path, answer: None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def client(self) -> httpx.Client:
        app = self.server.app()

        def handle(request: httpx.Request) -> httpx.Response:
            changed = self.change(request)
            answer = asyncio.run(_through(app, changed))
            content = json.loads(answer.content) if b"{" in answer.content[:1] else {}
            self.seen.append((changed.url.path, content))
            self.change_answer(changed.url.path, content)
            headers = [(name, value) for name, value in answer.headers.multi_items() if name != "content-length"]
            return httpx.Response(answer.status_code, headers=headers, content=json.dumps(content))

        return httpx.Client(transport=httpx.MockTransport(handle))


async def _through(app: Any, request: httpx.Request) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        answer = await client.request(request.method, request.url, content=request.content, headers=request.headers)
    headers = [(name, value) for name, value in answer.headers.multi_items() if name != "content-length"]
    return httpx.Response(answer.status_code, headers=headers, content=answer.content)


def policy(simulator: Simulator, **changes: Any) -> KeyPolicy:
    measured = Policy.parse({"kinds": ["simulated"], "claims": {"measurement": [MEASUREMENT.hex()]}}, "policy")
    rule = {"resource": RESOURCE, "evidence": measured, "labels": frozenset({TeeLabel.SIMULATED}), **changes}
    trust: Any = {"simulated": [simulator.root_fingerprint]}
    return KeyPolicy(release=[Release(**rule)], trust=trust)


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    (tmp_path / RESOURCE).parent.mkdir(parents=True)
    (tmp_path / RESOURCE).write_bytes(KEY)
    return tmp_path


def broker(wire: Wire, source: Any) -> KeyBroker:
    return KeyBroker("http://keys", source, wire.client())


def test_a_key_comes_for_evidence_that_the_policy_accepts(simulator: Simulator, keys_dir: Path) -> None:
    log: list[str] = []
    wire = Wire(KeyServer(policy(simulator, artifacts=frozenset({ARTIFACT})), keys_dir, log=log.append))
    assert broker(wire, simulator).release(sealed_for(Recipient("kbs", f"kbs:///{RESOURCE}"))) == KEY
    assert [path.rpartition("/v0/")[2] for path, _ in wire.seen] == ["auth", "attest", f"resource/{RESOURCE}"]
    (line,) = log
    assert line.startswith(f"released {RESOURCE}: label simulated")
    over_the_wire = json.dumps(wire.seen)
    assert KEY.hex() not in over_the_wire
    assert base64.b64encode(KEY).decode() not in over_the_wire
    token = json.loads(_part(wire.seen[1][1]["token"], 1))
    assert token["eat_profile"] == "tag:github.com,2024:confidential-containers/Trustee"
    assert token["submods"]["cpu0"]["ear.status"] == "warning"


def _part(token: str, number: int) -> bytes:
    return _decoded(token.split(".")[number])


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def refusal(wire: Wire, source: Any, path: str = RESOURCE, artifact: str = ARTIFACT) -> str:
    with pytest.raises(KeyNotReleased) as refused:
        broker(wire, source).resource(path, artifact)
    return refused.value.message


class Source:
    """Evidence that was tampered with."""

    def __init__(self, attest: Callable[[bytes], Evidence]) -> None:
        self.attest = attest


def test_each_wrong_evidence_gets_nothing(simulator: Simulator, keys_dir: Path) -> None:
    wire = Wire(KeyServer(policy(simulator), keys_dir))

    def flipped(report_data: bytes) -> Evidence:
        good = simulator.attest(report_data)
        body = bytearray(good.body)
        body[0x90] ^= 1  # in the measurement
        return Evidence(good.kind, bytes(body), good.certificates)

    sources: dict[str, Callable[[bytes], Evidence]] = {
        "another chip": Simulator.create().attest,
        "another measurement": lambda data: simulator.attest(data, measurement=bytes(48)),
        "debug": lambda data: simulator.attest(data, policy=1 << 19 | 1 << 17),
        "not for this nonce": lambda _: simulator.attest(bytes(64)),
        "altered": flipped,
        "another kind": lambda data: Evidence(Kind.SEV_SNP, simulator.attest(data).body, simulator.certificates),
    }
    for name, attest in sources.items():
        assert "status 403" in refusal(wire, Source(attest)), name
    assert broker(wire, simulator).resource(RESOURCE, ARTIFACT) == KEY


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"labels": frozenset({TeeLabel.HARDWARE})}, "hardware is required"),
        ({"artifacts": frozenset({f"sha256:{'00' * 32}"})}, "the artifact is sha256:abab"),
        ({"resource": "default/key/other"}, "no rule gives default/key/toy"),
        ({"evidence": Policy()}, "names no allowed value"),
    ],
)
def test_what_the_policy_does_not_accept_gets_nothing(
    simulator: Simulator, keys_dir: Path, changes: dict[str, Any], why: str
) -> None:
    assert why in refusal(Wire(KeyServer(policy(simulator, **changes), keys_dir)), simulator)


def test_a_rule_without_a_key_gives_nothing(simulator: Simulator, tmp_path: Path) -> None:
    assert "there is no resource" in refusal(Wire(KeyServer(policy(simulator), tmp_path)), simulator)


def test_the_key_goes_to_the_key_in_the_evidence_only(simulator: Simulator, keys_dir: Path) -> None:
    """A man in the middle who puts in his own public key has evidence for another one."""
    other = {**ECKey.generate_key("P-256").as_dict(private=False), "alg": "ECDH-ES+A256KW"}

    def swap(request: httpx.Request) -> httpx.Request:
        if not request.url.path.endswith("attest"):
            return request
        body = json.loads(request.content)
        body["runtime-data"]["tee-pubkey"] = {name: other[name] for name in ("alg", "crv", "kty", "x", "y")}
        return httpx.Request("POST", request.url, json=body, headers={"cookie": request.headers["cookie"]})

    assert "nonce" in refusal(Wire(KeyServer(policy(simulator), keys_dir), swap), simulator)


def _flipped(text: str, at: int = 3) -> str:
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


@pytest.mark.parametrize("part", ["protected", "encrypted_key", "iv", "ciphertext", "tag"])
def test_an_altered_part_of_the_encrypted_key_is_refused(simulator: Simulator, keys_dir: Path, part: str) -> None:
    def alter(path: str, answer: dict[str, Any]) -> None:
        if "/resource/" in path:
            answer[part] = _flipped(answer[part])

    wire = Wire(KeyServer(policy(simulator), keys_dir), change_answer=alter)
    assert "not encrypted for us" in refusal(wire, simulator)


@pytest.mark.parametrize("part", ["protected", "encrypted_key", "iv", "ciphertext", "tag"])
def test_a_missing_part_of_the_encrypted_key_is_refused(simulator: Simulator, keys_dir: Path, part: str) -> None:
    def leave_out(path: str, answer: dict[str, Any]) -> None:
        answer.pop(part, None)

    wire = Wire(KeyServer(policy(simulator), keys_dir), change_answer=leave_out)
    assert "not encrypted for us" in refusal(wire, simulator)


def test_the_key_of_another_exchange_is_refused(simulator: Simulator, keys_dir: Path) -> None:
    """The server's answer to somebody else is encrypted for somebody else's key."""
    kept: list[dict[str, Any]] = []

    def replay(path: str, answer: dict[str, Any]) -> None:
        if "/resource/" in path:
            kept.append(dict(answer))
            answer.update(kept[0])

    wire = Wire(KeyServer(policy(simulator), keys_dir), change_answer=replay)
    assert broker(wire, simulator).resource(RESOURCE, ARTIFACT) == KEY
    assert "not encrypted for us" in refusal(wire, simulator)


def test_another_nonce_than_the_sessions_gets_nothing(simulator: Simulator, keys_dir: Path) -> None:
    def swap(path: str, answer: dict[str, Any]) -> None:
        if path.endswith("/auth"):
            answer["nonce"] = _flipped(answer["nonce"])

    wire = Wire(KeyServer(policy(simulator), keys_dir), change_answer=swap)
    assert "the nonce is not this session's" in refusal(wire, simulator)


def test_who_does_not_want_to_know_the_artifact_is_not_told(simulator: Simulator, keys_dir: Path) -> None:
    """Without our word in `extra-params` the hash is that of upstream: additional evidence is the empty text."""

    def forget(path: str, answer: dict[str, Any]) -> None:
        answer.get("extra-params", {}).pop("pilotlight-claims", None)

    any_artifact = Wire(KeyServer(policy(simulator), keys_dir), change_answer=forget)
    assert broker(any_artifact, simulator).resource(RESOURCE, ARTIFACT) == KEY
    one = policy(simulator, artifacts=frozenset({ARTIFACT}))
    assert "the artifact is not named" in refusal(Wire(KeyServer(one, keys_dir), change_answer=forget), simulator)


def test_the_claimed_artifact_is_bound_to_the_evidence(simulator: Simulator, keys_dir: Path) -> None:
    def claim(request: httpx.Request) -> httpx.Request:
        if not request.url.path.endswith("attest"):
            return request
        body = json.loads(request.content)
        body["tee-evidence"]["additional_evidence"] = json.dumps({"artifact": ARTIFACT})
        return httpx.Request("POST", request.url, json=body, headers={"cookie": request.headers["cookie"]})

    wire = Wire(KeyServer(policy(simulator, artifacts=frozenset({ARTIFACT})), keys_dir), claim)
    assert "status 403" in refusal(wire, simulator, artifact=f"sha256:{'00' * 32}")


def test_a_session_attests_once_and_ends(simulator: Simulator, keys_dir: Path) -> None:
    now = [0.0]
    server = KeyServer(policy(simulator), keys_dir, clock=lambda: now[0])
    client = Wire(server).client()
    nonce = client.post("http://keys/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"}).json()["nonce"]
    assert len(base64.b64decode(nonce)) == 32
    body = attestation(simulator, nonce)
    assert client.post("http://keys/kbs/v0/attest", json=body).status_code == 200
    again = client.post("http://keys/kbs/v0/attest", json=body)
    assert again.status_code == 401
    assert again.headers["content-type"] == "application/problem+json"
    assert client.get(f"http://keys/kbs/v0/resource/{RESOURCE}").status_code == 200
    now[0] = SESSION_TTL_S + 1
    assert client.get(f"http://keys/kbs/v0/resource/{RESOURCE}").status_code == 401


def attestation(simulator: Simulator, nonce: str) -> dict[str, Any]:
    public = {**ECKey.generate_key("P-256").as_dict(private=False), "alg": "ECDH-ES+A256KW"}
    jwk = {name: public[name] for name in ("alg", "crv", "kty", "x", "y")}
    evidence = json.loads(simulator.attest(runtime_hash(jwk, nonce, "")).to_json())
    return {
        "runtime-data": {"nonce": nonce, "tee-pubkey": jwk},
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
    }


def test_a_token_stands_for_its_session_and_an_altered_one_for_none(simulator: Simulator, keys_dir: Path) -> None:
    client = Wire(KeyServer(policy(simulator), keys_dir)).client()
    nonce = client.post("http://keys/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"}).json()["nonce"]
    token = client.post("http://keys/kbs/v0/attest", json=attestation(simulator, nonce)).json()["token"]
    client.cookies.delete(SESSION_COOKIE)
    url = f"http://keys/kbs/v0/resource/{RESOURCE}"
    assert client.get(url, headers={"authorization": f"Bearer {token}"}).status_code == 200
    head, claims, signature = token.split(".")
    for bad in ("x", f"{head}.{claims}.", f"{head}.{claims[:-2]}AA.{signature}", ""):
        assert client.get(url, headers={"authorization": f"Bearer {bad}"}).status_code == 401


@pytest.mark.parametrize("path", ["..%2F..%2Fetc/a/b", "default/key/..", "default/key/%2e%2e", "default/key/toy/x"])
def test_a_path_that_is_none_gets_nothing(simulator: Simulator, keys_dir: Path, path: str) -> None:
    client = Wire(KeyServer(policy(simulator), keys_dir)).client()
    nonce = client.post("http://keys/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"}).json()["nonce"]
    client.post("http://keys/kbs/v0/attest", json=attestation(simulator, nonce))
    assert client.get(f"http://keys/kbs/v0/resource/{path}").status_code in (403, 404)


@pytest.mark.parametrize("version", ["0.1.1", "0.4.1", ""])
def test_another_version_of_the_protocol_is_refused(simulator: Simulator, keys_dir: Path, version: str) -> None:
    client = Wire(KeyServer(policy(simulator), keys_dir)).client()
    answer = client.post("http://keys/kbs/v0/auth", json={"version": version, "tee": "sample"})
    assert answer.status_code == 400
    assert "0.4.0" in answer.json()["detail"]


@given(path=st.sampled_from(["auth", "attest"]), body=st.binary(max_size=200))
def test_any_body_is_answered_with_a_problem(simulator: Simulator, path: str, body: bytes) -> None:
    client = Wire(KeyServer(policy(simulator), Path("nowhere"))).client()
    answer = client.post(f"http://keys/kbs/v0/{path}", content=body)
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"


@given(status=st.sampled_from([200, 200, 401, 500]), content=st.binary(max_size=200) | st.just(b'{"nonce": "AA=="}'))
def test_any_answer_of_a_key_server_is_a_refusal(simulator: Simulator, status: int, content: bytes) -> None:
    client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(status, content=content)))
    with pytest.raises(KeyNotReleased):
        KeyBroker("http://keys", simulator, client).resource(RESOURCE, ARTIFACT)


def test_a_policy_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        f'[trust]\nsimulated = ["{"0" * 64}"]\n[[release]]\nresource = "{RESOURCE}"\nlabels = ["simulated"]\n'
        f'artifacts = ["{ARTIFACT}"]\n[release.evidence]\nkinds = ["simulated"]\nclaims.measurement = ["00"]\n'
    )
    (rule,) = KeyPolicy.read(file).release
    assert rule.labels == {TeeLabel.SIMULATED}
    for text in ("x = 1", "[[release]]\nresource = '../x/y'\n[release.evidence]", "release = 1", "["):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not a policy"):
            KeyPolicy.read(file)


def test_each_message_is_that_of_the_protocol(simulator: Simulator, keys_dir: Path) -> None:
    """Trustee's protocol 0.4.0, member by member, as a server that is not ours would check it."""
    asked: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Request:
        asked.append(request)
        return request

    wire = Wire(KeyServer(policy(simulator), keys_dir), note)
    broker(wire, simulator).resource(RESOURCE, ARTIFACT)
    auth, attest, resource = asked
    assert [(request.method, request.url.path) for request in asked] == [
        ("POST", "/kbs/v0/auth"),
        ("POST", "/kbs/v0/attest"),
        ("GET", f"/kbs/v0/resource/{RESOURCE}"),
    ]
    assert json.loads(auth.content) == {
        "version": "0.4.0",
        "tee": "sample",
        "extra-params": {"supported-hash-algorithms": ["sha384"]},
    }
    body = json.loads(attest.content)
    assert body.keys() == {"runtime-data", "tee-evidence"}
    assert body["runtime-data"].keys() == {"nonce", "tee-pubkey"}
    jwk = body["runtime-data"]["tee-pubkey"]
    assert jwk.keys() == {"kty", "crv", "alg", "x", "y"}
    assert (jwk["kty"], jwk["crv"], jwk["alg"]) == ("EC", "P-256", "ECDH-ES+A256KW")
    assert body["tee-evidence"].keys() == {"primary_evidence", "additional_evidence"}
    challenge, token, answer = (content for _, content in wire.seen)
    assert body["runtime-data"]["nonce"] == challenge["nonce"]
    hashed = {
        "additional-evidence": body["tee-evidence"]["additional_evidence"],
        "nonce": challenge["nonce"],
        "tee-pubkey": jwk,
    }
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    report = base64.b64decode(body["tee-evidence"]["primary_evidence"]["body"])
    assert report[80:144] == hashlib.sha384(text).digest() + bytes(16)
    cookie = attest.headers["cookie"]
    assert re.fullmatch(r"kbs-session-id=[A-Za-z0-9_-]{32}", cookie)
    assert resource.headers["cookie"] == cookie
    assert token.keys() == {"token"}
    assert answer.keys() == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
    header = json.loads(_decoded(answer["protected"]))
    assert (header["alg"], header["enc"], header["epk"]["crv"]) == ("ECDH-ES+A256KW", "A256GCM", "P-256")
    assert len(_decoded(answer["iv"])) == 12
    assert len(_decoded(answer["tag"])) == 16
    assert len(_decoded(answer["encrypted_key"])) == 40


def test_what_a_server_refuses_is_a_problem_document(simulator: Simulator, keys_dir: Path) -> None:
    client = Wire(KeyServer(policy(simulator), keys_dir)).client()
    for answer in (
        client.post("http://keys/kbs/v0/auth", json={"version": "0.1.1", "tee": "sample"}),
        client.post("http://keys/kbs/v0/attest", json={}),
        client.get(f"http://keys/kbs/v0/resource/{RESOURCE}"),
    ):
        assert 400 <= answer.status_code < 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json().keys() == {"type", "detail"}


@pytest.mark.parametrize("tee", ["snp", "tdx", "az-snp-vtpm"])
def test_the_protocol_has_its_own_words_for_kinds(tee: str) -> None:
    kind = {"snp": Kind.SEV_SNP, "tdx": Kind.TDX, "az-snp-vtpm": Kind.AZURE_VTPM_SNP}[tee]
    asked: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        problem = {"type": "https://github.com/confidential-containers/kbs/errors/TeeNotSupported", "detail": "no"}
        return httpx.Response(401, json=problem)

    client = httpx.Client(transport=httpx.MockTransport(handle))
    source = Source(lambda data: Evidence(kind, data))
    with pytest.raises(KeyNotReleased, match=r"http://keys refuses: no \(status 401\)"):
        KeyBroker("http://keys", source, client).resource(RESOURCE, ARTIFACT)
    assert [request["tee"] for request in asked] == [tee]


def test_the_guest_service_of_confidential_containers_is_asked() -> None:
    asked = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, content=KEY)

    sealed = sealed_for(Recipient("kbs", f"kbs:///{RESOURCE}"))
    assert GuestService(httpx.Client(transport=httpx.MockTransport(handle))).release(sealed) == KEY
    assert asked == [f"http://127.0.0.1:8006/cdh/resource/{RESOURCE}"]
    empty = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200)))
    with pytest.raises(KeyNotReleased):
        GuestService(empty).release(sealed)


@pytest.fixture(scope="module")
def vault_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def azure(answer: httpx.Response, asked: list[Any] | None = None) -> SecureKeyRelease:
    def handle(request: httpx.Request) -> httpx.Response:
        if asked is not None:
            asked.append((request.url.path, json.loads(request.content)))
        return answer

    return SecureKeyRelease(
        "http://sidecar", "https://maa.example.com/", httpx.Client(transport=httpx.MockTransport(handle))
    )


def test_azure_releases_the_key_that_unwraps_ours(vault_key: rsa.RSAPrivateKey) -> None:
    wrapped = vault_key.public_key().encrypt(KEY, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
    recipient = Recipient("azure", "https://v.vault.azure.net/keys/model/00ff", base64.b64encode(wrapped).decode())
    jwk = json.dumps(RSAKey.import_key(vault_key).as_dict(private=True))
    asked: list[Any] = []
    assert azure(httpx.Response(200, json={"key": jwk}), asked).release(sealed_for(recipient)) == KEY
    expected = {"maa_endpoint": "maa.example.com", "akv_endpoint": "v.vault.azure.net", "kid": "model"}
    assert asked == [("/key/release", expected)]
    public = json.dumps(RSAKey.import_key(vault_key).as_dict(private=False))
    for answer in (
        httpx.Response(403, text="denied"),
        httpx.Response(200, json={"key": "{}"}),
        httpx.Response(200, json={"key": public}),
        httpx.Response(200, json={}),
        httpx.Response(200, content=b"\xff"),
    ):
        with pytest.raises(KeyNotReleased):
            azure(answer).release(sealed_for(recipient))


def enveloped(public: rsa.RSAPublicKey, text: bytes) -> bytes:
    """Return what AWS KMS answers to an enclave, as its own sample has it."""
    content_key, iv = os.urandom(32), os.urandom(16)
    padder = PKCS7(128).padder()
    padded = padder.update(text) + padder.finalize()
    encryptor = Cipher(algorithms.AES(content_key), modes.CBC(iv)).encryptor()
    oaep = algos.RSAESOAEPParams({"hash_algorithm": {"algorithm": "sha256"}})
    info = cms.KeyTransRecipientInfo(
        {
            "version": "v2",
            "rid": cms.RecipientIdentifier({"subject_key_identifier": core.OctetString(b"x").native}),
            "key_encryption_algorithm": {"algorithm": "rsaes_oaep", "parameters": oaep},
            "encrypted_key": public.encrypt(content_key, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)),
        }
    )
    inner = {
        "content_type": "data",
        "content_encryption_algorithm": {"algorithm": "aes256_cbc", "parameters": core.OctetString(iv)},
        "encrypted_content": encryptor.update(padded) + encryptor.finalize(),
    }
    content = cms.EnvelopedData({"version": "v2", "recipient_infos": [info], "encrypted_content_info": inner})
    dumped: bytes = cms.ContentInfo({"content_type": "enveloped_data", "content": content}).dump()
    return dumped


def test_aws_answers_to_the_key_in_the_document() -> None:
    asked: list[tuple[str, bytes, bytes]] = []

    def decrypt(arn: str, wrapped: bytes, document: bytes) -> bytes:
        asked.append((arn, wrapped, document))
        public = load_der_public_key(document)
        assert isinstance(public, rsa.RSAPublicKey)
        return enveloped(public, KEY)

    arn = "arn:aws:kms:eu-central-1:123456789012:key/model"
    recipient = Recipient("aws", arn, base64.b64encode(b"blob").decode())
    assert AwsKms(lambda public: public, decrypt).release(sealed_for(recipient)) == KEY
    assert asked[0][:2] == (arn, b"blob")


def test_aws_encrypts_at_sealing_time_and_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        kms = boto3.client("kms", region_name="eu-central-1")
        arn = kms.create_key()["KeyMetadata"]["Arn"]
        blob = encrypt_at_aws(arn, KEY)
        assert blob != KEY
        assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == KEY
        with pytest.raises(ConfigError, match="AWS KMS does not encrypt"):
            encrypt_at_aws(arn[:-1] + ("0" if arn[-1] != "0" else "1"), KEY)
        recipient = Recipient("aws", arn, base64.b64encode(blob).decode())
        with pytest.raises(KeyNotReleased, match="AWS KMS does not release"):  # moto knows no recipients
            AwsKms(lambda public: public).release(sealed_for(recipient))


def test_the_sample_of_aws_is_read_and_is_not_for_us(vault_key: rsa.RSAPrivateKey) -> None:
    sample = evidence_file("kms/ciphertext_for_recipient.ber")
    parsed = cms.ContentInfo.load(sample)["content"]
    (info,) = parsed["recipient_infos"]
    assert info.chosen["key_encryption_algorithm"]["algorithm"].native == "rsaes_oaep"
    with pytest.raises(KeyNotReleased, match="not encrypted for this enclave"):
        open_enveloped(sample, vault_key)


@given(st.data())
def test_a_mutated_envelope_is_refused_or_harmless(vault_key: rsa.RSAPrivateKey, data: st.DataObject) -> None:
    good = bytearray(enveloped(vault_key.public_key(), KEY))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        open_enveloped(bytes(good), vault_key)
    except KeyNotReleased:
        return


@given(st.binary(max_size=300))
def test_any_bytes_in_place_of_an_envelope_are_refused(vault_key: rsa.RSAPrivateKey, content: bytes) -> None:
    with pytest.raises(KeyNotReleased):
        open_enveloped(content, vault_key)


def test_a_document_of_one_enclave_does_not_open_the_answer_to_another(vault_key: rsa.RSAPrivateKey) -> None:
    other = rsa.generate_private_key(65537, 2048)
    with pytest.raises(KeyNotReleased):
        open_enveloped(enveloped(other.public_key(), KEY), vault_key)


def test_a_sealed_artifact_opens_through_the_key_server(
    toy_artifact: Artifact, simulator: Simulator, tmp_path: Path
) -> None:
    signing = Ed25519PrivateKey.generate()
    publisher = tmp_path / "publisher.pub"
    publisher.write_bytes(signing.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    recipients = [f"kbs:///{RESOURCE}"]
    seal(toy_artifact, tmp_path / "sealed", Publisher(signing, recipients, tmp_path / "keys", lambda _, key: key))
    wire = Wire(KeyServer(policy(simulator, artifacts=frozenset({toy_artifact.digest})), tmp_path / "keys"))
    opened = Unsealing(publisher, broker(wire, simulator)).open(tmp_path / "sealed")
    assert opened.digest == toy_artifact.digest


def test_evidence_that_is_worth_nothing_is_not_kept(simulator: Simulator, keys_dir: Path) -> None:
    """Anybody may send megabytes of it, in thousands of sessions."""
    server = KeyServer(policy(simulator), keys_dir)
    client = Wire(server).client()
    nonce = client.post("http://keys/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"}).json()["nonce"]
    body = attestation(simulator, nonce)
    body["tee-evidence"]["primary_evidence"]["certificates"] = "x" * 1_000_000
    assert client.post("http://keys/kbs/v0/attest", json=body).status_code == 200
    (session,) = server._sessions.values()
    assert len(repr(session.attested)) < 10_000
    assert client.get(f"http://keys/kbs/v0/resource/{RESOURCE}").status_code == 403


def test_a_stranger_cannot_write_a_line_of_the_log(simulator: Simulator, keys_dir: Path) -> None:
    lines: list[str] = []
    client = Wire(KeyServer(policy(simulator), keys_dir, log=lines.append)).client()
    nonce = client.post("http://keys/kbs/v0/auth", json={"version": "0.4.0", "tee": "sample"}).json()["nonce"]
    client.post("http://keys/kbs/v0/attest", json=attestation(Simulator.create(), nonce))
    answer = client.get("http://keys/kbs/v0/resource/a/b/c%0Areleased%20default%2Fkey%2Ftoy%1B%5B2J")
    assert answer.status_code in (403, 404)
    client.get("http://keys/kbs/v0/resource/a/b/c%0Areleased%1B")
    assert lines
    assert all(line.isprintable() and line.startswith("refused ") for line in lines)


@pytest.mark.parametrize("headers", [{}, {"content-encoding": "gzip"}], ids=["long", "packed"])
def test_an_answer_without_an_end_is_not_read_to_it(simulator: Simulator, headers: dict[str, str]) -> None:
    given = []

    def pieces() -> Iterator[bytes]:
        while True:
            given.append(1)
            yield b" " * 65536

    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, stream=Endless(pieces())))
    client = httpx.Client(transport=transport)
    with pytest.raises(KeyNotReleased, match="more than"):
        KeyBroker("http://keys", simulator, client).resource("a/b/c", ARTIFACT)
    assert len(given) <= 17


class Endless(httpx.SyncByteStream):
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces
