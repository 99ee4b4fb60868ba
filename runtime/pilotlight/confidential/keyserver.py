"""A small key server for development and small installations. It speaks Trustee's protocol (``kbs.py`` has the steps).

A key leaves it only for evidence that the policy accepts, which holds this session's nonce and the requester's public
key, and only encrypted for that key. A session attests once and is forgotten after a few minutes. Keys are files,
REPOSITORY/TYPE/TAG under one directory, as `pilotlight seal --keys` writes them.

The evidence has our own JSON form (``Evidence.to_json``): upstream's attesters send theirs in forms of their own, so
this server is for our clients, while our client asks upstream's servers where the attester's form is not read.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from joserfc import jwe, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pilotlight.confidential.appraisal import (
    MAX_EVIDENCE_BYTES,
    Appraisal,
    EvidenceRefused,
    MalformedEvidence,
    from_wire,
    shown,
)
from pilotlight.confidential.kbs import (
    ALGORITHMS,
    CLAIMS,
    HASH,
    KEY_ALGORITHM,
    PROTOCOL_VERSION,
    encoded_nonce,
    runtime_hash,
)
from pilotlight.confidential.keyserver_policy import KeyPolicy
from pilotlight.errors import PilotlightError
from pilotlight.tee import EvidenceObject, TeeLabel

SESSION_COOKIE = "kbs-session-id"
SESSION_TTL_S = 300.0
MAX_SESSIONS = 4096
NUM_NONCE_BYTES = 32
EAT_PROFILE = "tag:github.com,2024:confidential-containers/Trustee"
JWS_ALGORITHM = "ES256"
PROBLEM_TYPE = "application/problem+json"

T = TypeVar("T")


class Problem(PilotlightError):
    """A request that is not answered; ``status`` says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Auth(msgspec.Struct, frozen=True):
    version: str
    tee: str


class _PublicKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kty: Literal["EC"]
    crv: Literal["P-256", "P-521"]
    x: str
    y: str
    alg: Literal["ECDH-ES+A256KW"]


class _RuntimeData(msgspec.Struct, frozen=True, rename="kebab"):
    nonce: str
    tee_pubkey: _PublicKey


class _TeeEvidence(msgspec.Struct, frozen=True):
    primary_evidence: EvidenceObject
    additional_evidence: str = ""


class _Attest(msgspec.Struct, frozen=True, rename="kebab"):
    runtime_data: _RuntimeData
    tee_evidence: _TeeEvidence


class _Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    artifact: str


@dataclass(slots=True)
class _Session:
    nonce: str
    ends_at: float
    attested: _Attested | None = None
    used: bool = False


@dataclass(frozen=True, slots=True)
class _Attested:
    """What evidence with the session's nonce and this key is worth, for each resource that a rule names.

    The evidence itself is not kept: anybody may send megabytes of it that are worth nothing.
    """

    key: dict[str, Any]
    outcomes: dict[str, Appraisal]


class KeyServer:
    """The server's endpoints and sessions. Everything happens on one event loop."""

    def __init__(
        self,
        policy: KeyPolicy,
        keys_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``log`` is told of every key that is given or refused; a line says to what evidence, and holds no key."""
        self._log = log
        self._policy = policy
        self._keys_dir = keys_dir
        self._clock = clock
        self._now = now
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._token_key = ECKey.generate_key("P-256")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/kbs/v0/auth", _answering(self.auth), methods=["POST"]),
                Route("/kbs/v0/attest", _answering(self.attest), methods=["POST"]),
                Route("/kbs/v0/resource/{repository}/{kind}/{tag}", _answering(self.resource), methods=["GET"]),
            ]
        )

    async def auth(self, request: Request) -> Response:
        asked = _decoded(await _body(request), _Auth)
        if asked.version != PROTOCOL_VERSION:
            raise Problem(400, f"the protocol's version is {PROTOCOL_VERSION}, not {asked.version[:20]}")
        self._forget_old()
        if len(self._sessions) >= MAX_SESSIONS:
            raise Problem(503, "there are too many sessions")
        session_id, nonce = secrets.token_urlsafe(24), encoded_nonce(secrets.token_bytes(NUM_NONCE_BYTES))
        self._sessions[session_id] = _Session(nonce, self._clock() + SESSION_TTL_S)
        answer = _json({"nonce": nonce, "extra-params": {"selected-hash-algorithm": HASH, CLAIMS: True}})
        answer.set_cookie(SESSION_COOKIE, session_id, httponly=True, samesite="strict", path="/kbs/v0")
        return answer

    async def attest(self, request: Request) -> Response:
        session_id = request.cookies.get(SESSION_COOKIE, "")
        session = self._session(session_id)
        asked = _decoded(await _body(request), _Attest)
        if session.used:
            raise Problem(401, "this session has attested already; begin another one")
        session.used = True  # whatever comes of it: a nonce is for one try
        if asked.runtime_data.nonce != session.nonce:
            raise Problem(401, "the nonce is not this session's")
        additional = asked.tee_evidence.additional_evidence
        artifact = _decoded(additional.encode(), _Claims).artifact if additional else None
        key = msgspec.to_builtins(asked.runtime_data.tee_pubkey)
        report_data = runtime_hash(key, session.nonce, additional)
        _import_key(key)
        evidence = from_wire(asked.tee_evidence.primary_evidence)
        session.attested = _Attested(key, self._policy.outcomes(evidence, report_data, artifact, self._now()))
        return _json({"token": self._token(session_id, session.attested, evidence.digest)})

    async def resource(self, request: Request) -> Response:
        path = "/".join(request.path_params[name] for name in ("repository", "kind", "tag"))
        attested = self._session(self._session_id(request)).attested
        if attested is None:
            raise Problem(401, "this session has not attested")
        appraisal = attested.outcomes.get(path)
        try:
            if appraisal is None:
                raise Problem(403, f"no rule gives {shown(path)}")
            appraisal.require()
        except (Problem, EvidenceRefused) as refusal:
            self._log(f"refused {shown(path)}: {refusal.message}")
            raise
        content = self._read(path)
        self._log(f"released {path}: label {appraisal.label}, evidence {appraisal.evidence_digest}")
        return _json(encrypted(content, attested.key))

    def _session_id(self, request: Request) -> str:
        """Return the session of the cookie, or of the token where there is one."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return request.cookies.get(SESSION_COOKIE, "")
        try:
            return str(jwt.decode(token, self._token_key, algorithms=[JWS_ALGORITHM]).claims["jti"])
        except (JoseError, ValueError, KeyError, TypeError) as error:
            raise Problem(401, "the token is not one of this server") from error

    def _session(self, session_id: str) -> _Session:
        self._forget_old()
        session = self._sessions.get(session_id)
        if session is None:
            raise Problem(401, "there is no such session; begin with auth")
        return session

    def _forget_old(self) -> None:
        now = self._clock()
        while self._sessions and next(iter(self._sessions.values())).ends_at <= now:
            self._sessions.popitem(last=False)

    def _token(self, session_id: str, attested: _Attested, evidence_digest: str) -> str:
        """Return a token that says what the evidence is worth by the best rule; no decision rests on it."""
        labels = [appraisal.label for appraisal in attested.outcomes.values()]
        label = max(labels, key=list(TeeLabel).index, default=TeeLabel.NONE)
        now = int(self._now().timestamp())
        status = {TeeLabel.HARDWARE: "affirming", TeeLabel.NONE: "contraindicated"}.get(label, "warning")
        claims = {
            "eat_profile": EAT_PROFILE,
            "iss": "pilotlight keyserver",
            "iat": now,
            "exp": now + int(SESSION_TTL_S),
            "jti": session_id,
            "tee-pubkey": attested.key,
            "submods": {
                "cpu0": {
                    "ear.status": status,
                    "ear.trustworthiness-vector": {},
                    "pilotlight.label": str(label),
                    "pilotlight.evidence": evidence_digest,
                }
            },
        }
        return jwt.encode({"alg": JWS_ALGORITHM, "typ": "JWT"}, claims, self._token_key)

    def _read(self, path: str) -> bytes:
        try:
            return (self._keys_dir / path).read_bytes()
        except OSError as error:
            raise Problem(404, f"there is no resource {path}") from error


def encrypted(content: bytes, key: dict[str, Any]) -> dict[str, Any]:
    """Return a flattened JWE whose ephemeral key is in the protected header, as in upstream's."""
    header = {"alg": KEY_ALGORITHM, "enc": "A256GCM"}
    compact = jwe.encrypt_compact(header, content, _import_key(key), algorithms=ALGORITHMS)
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    return dict(zip(names, compact.split("."), strict=True))


def _import_key(key: dict[str, Any]) -> ECKey:
    try:
        imported: ECKey = ECKey.import_key(key)
        imported.public_key  # noqa: B018 - whether it is a point of the curve is found out here
    except (JoseError, ValueError, TypeError, KeyError) as error:
        raise Problem(400, "the public key is none") from error
    return imported


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > 2 * MAX_EVIDENCE_BYTES:
            raise Problem(413, "the request is too large")
    return bytes(body)


def _decoded(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the request is not what is expected ({error})") from error


def _answering(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turn what an endpoint raises into a problem document (RFC 7807)."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (Problem, EvidenceRefused, MalformedEvidence) as problem:
            kind = type(problem).__name__
            body = {"type": f"https://github.com/confidential-containers/kbs/errors/{kind}", "detail": problem.message}
            return Response(msgspec.json.encode(body), problem.status, media_type=PROBLEM_TYPE)

    return answer


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
