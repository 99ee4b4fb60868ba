"""Resume tokens: what a client needs to have an answer that was cut off continued, on any host of the same function.

A token holds the tokens that were generated, the seed, and what they belong to: caller, function, artifact and a hash
of the request's body, which the client sends again. It is signed and short-lived; nothing is kept on the host. What it
says is known to its client anyway, so it is not encrypted.

Source: decision 14.
"""

from __future__ import annotations

import array
import base64
import binascii
import hashlib
import hmac
import sys
import time
import zlib
from dataclasses import dataclass
from typing import Any

import msgspec

from pilotlight.errors import ConfigError, InvalidRequest
from pilotlight.request import Continuation

PARAM = "resume_token"
PREFIX = "plr1"
MIN_SECRET_CHARACTERS = 16
HOW_TO_DELIVER = frozenset({PARAM, "stream", "stream_options", "metadata", "user", "store"})
"""What a continuation's body may say differently: nothing of it changes a token of the answer."""


class _Content(msgspec.Struct, frozen=True, array_like=True):
    expires_at: int
    function: str
    artifact_digest: str
    tenant: str | None
    key_id: str | None
    body_hash: bytes
    first_id: str
    seed: int
    paid: bool
    emitted: bytes


@dataclass(frozen=True, slots=True)
class Bound:
    """What a token belongs to. ``path`` and ``body`` are those of the request that began the answer."""

    function: str
    artifact_digest: str
    tenant: str | None
    key_id: str | None
    path: str
    body: bytes

    def body_hash(self) -> bytes:
        """Return what is the same for the same request, however it is spelled and delivered."""
        asked: dict[str, Any] = msgspec.json.decode(self.body)
        said = {name: value for name, value in asked.items() if name not in HOW_TO_DELIVER and value is not None}
        return hashlib.sha256(self.path.encode() + b"\n" + msgspec.json.encode(said, order="sorted")).digest()


class ResumeTokens:
    """Seals and opens tokens with a secret that all hosts of a function share."""

    def __init__(self, secret: str, ttl_s: float) -> None:
        """``ttl_s`` is how long a token is good for.

        Raises:
            ConfigError: the secret is too short to be one.
        """
        if len(secret) < MIN_SECRET_CHARACTERS:
            raise ConfigError(f"host.resume_secret: expected at least {MIN_SECRET_CHARACTERS} characters")
        self._key = hmac.digest(secret.encode(), b"pilotlight resume token 1", "sha256")
        self._ttl_s = ttl_s

    def seal(self, bound: Bound, cut_off: Continuation) -> str:
        """Return the token with which an answer can be continued."""
        content = _Content(
            expires_at=int(time.time() + self._ttl_s),
            function=bound.function,
            artifact_digest=bound.artifact_digest,
            tenant=bound.tenant,
            key_id=bound.key_id,
            body_hash=bound.body_hash(),
            first_id=cut_off.first_id,
            seed=cut_off.seed,
            paid=cut_off.paid,
            emitted=_packed(cut_off.emitted_ids),
        )
        payload = msgspec.msgpack.encode(content)
        return ".".join((PREFIX, _text(payload), _text(self._signature(payload))))

    def artifact_digest(self, token: str) -> str:
        """Return which artifact made the answer that a token continues.

        Raises:
            InvalidRequest: the token is not one of ours, or has expired.
        """
        return self._content(token).artifact_digest

    def open(self, token: str, bound: Bound) -> Continuation:
        """Return what a token continues, for whoever sends the same request again.

        Raises:
            InvalidRequest: the token is not one of ours, has expired, or belongs to something else.
        """
        content = self._content(token)
        if (content.function, content.tenant, content.key_id) != (bound.function, bound.tenant, bound.key_id):
            raise _refusal("it belongs to another function or another API key")
        if content.artifact_digest != bound.artifact_digest:
            raise _refusal("the function runs another artifact now; send the request without it")
        if not hmac.compare_digest(content.body_hash, bound.body_hash()):
            raise _refusal("it goes with the body that it was given for; send that again, with resume_token added")
        return Continuation(content.first_id, _unpacked(content.emitted), content.seed, content.paid)

    def _content(self, token: str) -> _Content:
        prefix, *parts = token.split(".")
        try:
            payload, signature = (_bytes(part) for part in parts)
        except (binascii.Error, ValueError) as error:
            raise _refusal("this is no resume token") from error
        if prefix != PREFIX or not hmac.compare_digest(signature, self._signature(payload)):
            raise _refusal("this is no resume token of this function")
        content = msgspec.msgpack.decode(payload, type=_Content)
        if content.expires_at < time.time():
            raise InvalidRequest(PARAM, f"{PARAM}: it has expired; send the request without it", "resume_token_expired")
        return content

    def _signature(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, "sha256")


def continuation_id(token: str, attempt: int) -> str:
    """Return the request id of a token's continuation: the ledger takes it once, and so the paid prompt is free once.

    ``attempt`` counts the continuations that came to nothing by no fault of the client's.
    """
    named = hashlib.sha256(token.encode()).hexdigest()[:24]
    return f"resumed-{named}" if not attempt else f"resumed-{named}-{attempt + 1}"


def _packed(token_ids: tuple[int, ...]) -> bytes:
    """Return token ids as four bytes each, the lowest first, compressed; most of the upper ones are zero."""
    packed = array.array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return zlib.compress(packed.tobytes(), 6)


def _unpacked(packed: bytes) -> tuple[int, ...]:
    token_ids = array.array("I", zlib.decompress(packed))
    if sys.byteorder == "big":
        token_ids.byteswap()
    return tuple(token_ids)


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(PARAM, f"{PARAM}: {why}", "invalid_resume_token")
