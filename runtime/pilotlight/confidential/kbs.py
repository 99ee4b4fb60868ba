"""A client for key brokers that speak the protocol of Confidential Containers' Trustee, 0.4.0.

    POST auth        version, kind of evidence                → a nonce, and a cookie for the session
    POST attest      our public key, evidence bound to both   → a token
    GET  resource    the cookie                               → the resource, encrypted for our public key

The evidence holds SHA-384 over the key and the nonce, as RFC 8785 writes them, so neither can be exchanged. Where the
other side is our own key server, the claim which artifact is to be opened is hashed along with them.

Source: confidential-containers/trustee at 78962cd, kbs/docs/kbs_attestation_protocol.md and its code.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any, Protocol

import httpx
import msgspec
import rfc8785
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from pilotlight.confidential.answers import PLAIN, TooLarge, read_at_most_now
from pilotlight.confidential.appraisal import Evidence, Kind, shown, to_wire
from pilotlight.confidential.binding import NUM_REPORT_DATA_BYTES
from pilotlight.confidential.chunks import NUM_KEY_BYTES
from pilotlight.confidential.key_release import KeyNotReleased, recipient_for
from pilotlight.confidential.recipients import KBS_URI
from pilotlight.confidential.sealed_manifest import SealedManifest

PROTOCOL_VERSION = "0.4.0"
HASH = "sha384"
KEY_ALGORITHM = "ECDH-ES+A256KW"
ALGORITHMS = [KEY_ALGORITHM, "A256GCM"]
TIMEOUT_S = 30.0
MAX_ANSWER_BYTES = 1024 * 1024
CLAIMS = "pilotlight-claims"
"""What our key server says in the ``extra-params`` of its answer to ``auth``: that it wants to know the artifact."""
TEES = {
    Kind.SIMULATED: "sample",
    Kind.SEV_SNP: "snp",
    Kind.TDX: "tdx",
    Kind.AZURE_VTPM_SNP: "az-snp-vtpm",
    Kind.NITRO: "nitro",
}
"""What the protocol calls a kind of evidence. ``nitro`` is a word of ours: upstream has none."""


class Source(Protocol):
    """Gives evidence that holds 64 bytes of report data."""

    def attest(self, report_data: bytes) -> Evidence: ...


class KeyBroker:
    """One key broker, as one machine with its evidence sees it."""

    def __init__(self, url: str, source: Source, client: httpx.Client | None = None) -> None:
        self._url = url.rstrip("/")
        self._source = source
        self._client = client or httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)

    def release(self, sealed: SealedManifest) -> bytes:
        match = KBS_URI.fullmatch(recipient_for(sealed, "kbs").id)
        if match is None:
            raise KeyNotReleased("the sealed manifest names no resource of a key server")
        key = self.resource("/".join(match.groups()), sealed.artifact_digest)
        if len(key) != NUM_KEY_BYTES:
            raise KeyNotReleased(f"{self._url} gives {len(key)} bytes, and a key has {NUM_KEY_BYTES}")
        return key

    def resource(self, path: str, artifact_digest: str) -> bytes:
        """Return a resource, REPOSITORY/TYPE/TAG.

        Raises:
            KeyNotReleased: it is not given, or the other side does not keep to the protocol.
            EvidenceUnavailable: there is no evidence to be had here.
        """
        key = ECKey.generate_key("P-256")
        tee = TEES.get(self._source.attest(bytes(NUM_REPORT_DATA_BYTES)).kind, "sample")
        asked = {"version": PROTOCOL_VERSION, "tee": tee, "extra-params": {"supported-hash-algorithms": [HASH]}}
        challenge = self._post("auth", asked)
        nonce, extra = challenge.get("nonce"), challenge.get("extra-params")
        if not isinstance(nonce, str):
            raise KeyNotReleased(f"{self._url} gives no nonce")
        wants_claims = isinstance(extra, dict) and extra.get(CLAIMS) is True
        additional = rfc8785.dumps({"artifact": artifact_digest}).decode() if wants_claims else ""
        public = {**key.as_dict(private=False), "alg": KEY_ALGORITHM}
        jwk = {name: public[name] for name in ("alg", "crv", "kty", "x", "y")}
        evidence = self._source.attest(runtime_hash(jwk, nonce, additional))
        primary = msgspec.to_builtins(to_wire(evidence))
        self._post(
            "attest",
            {
                "runtime-data": {"nonce": nonce, "tee-pubkey": jwk},
                "tee-evidence": {"primary_evidence": primary, "additional_evidence": additional},
            },
        )
        return self._opened(self._call("GET", f"resource/{path}"), key)

    def _opened(self, answer: dict[str, Any], key: ECKey) -> bytes:
        try:
            found: bytes | None = jwe.decrypt_json(answer, key, algorithms=ALGORITHMS).plaintext  # type: ignore[arg-type]
        except (JoseError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KeyNotReleased(f"{self._url} gives a resource that is not encrypted for us") from error
        if found is None:
            raise KeyNotReleased(f"{self._url} gives an empty resource")
        return found

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, content)

    def _call(self, method: str, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            with self._client.stream(method, f"{self._url}/kbs/v0/{path}", json=content, headers=PLAIN) as response:
                answer = _object(read_at_most_now(response, MAX_ANSWER_BYTES))
        except TooLarge as error:
            raise KeyNotReleased(f"{self._url} answers with more than {MAX_ANSWER_BYTES:,} bytes, or packed") from error
        except httpx.HTTPError as error:
            raise KeyNotReleased(f"{self._url} cannot be reached ({type(error).__name__})") from error
        if response.status_code != httpx.codes.OK:
            problem = shown(str(answer.get("detail") or answer.get("type") or "no reason is given"))
            raise KeyNotReleased(f"{self._url} refuses: {problem} (status {response.status_code})")
        return answer


class GuestService:
    """The service in a guest of Confidential Containers which attests, asks the key broker, and hands on what it gives.

    Source: confidential-containers/guest-components, api-server-rest; ``cdh/resource``.
    """

    URL = "http://127.0.0.1:8006"

    def __init__(self, client: httpx.Client | None = None) -> None:
        self._client = client or httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)

    def release(self, sealed: SealedManifest) -> bytes:
        path = recipient_for(sealed, "kbs").id.removeprefix("kbs:///")
        try:
            response = self._client.get(f"{self.URL}/cdh/resource/{path}")
        except httpx.HTTPError as error:
            raise KeyNotReleased(f"{self.URL} cannot be reached ({type(error).__name__})") from error
        if response.status_code != httpx.codes.OK or len(response.content) != NUM_KEY_BYTES:
            raise KeyNotReleased(f"{self.URL} gives no key (status {response.status_code})")
        return response.content


def runtime_hash(jwk: dict[str, Any], nonce: str, additional_evidence: str) -> bytes:
    """Return the 64 bytes that evidence has to hold: a SHA-384 and zeros."""
    data = rfc8785.dumps({"tee-pubkey": jwk, "nonce": nonce, "additional-evidence": additional_evidence})
    return hashlib.sha384(data).digest().ljust(NUM_REPORT_DATA_BYTES, b"\0")


def encoded_nonce(nonce: bytes) -> str:
    return base64.b64encode(nonce).decode()


def _object(content: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any]) if content else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
