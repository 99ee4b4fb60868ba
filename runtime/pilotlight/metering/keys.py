"""API keys: what one may do, and how its secret is made and checked.

A token is ``pl_KEYID_SECRET``. The key id finds the key; the secret, 256 random bits, is kept as a salted hash only.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

Limit = Annotated[int, Meta(ge=1)]
_TOKEN = re.compile(r"pl_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How much a key may use; None is no limit. Minutes, days and months are those of UTC.

    Money is in millionths of ``currency``. Tokens are those of prompts and answers together.
    """

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrent: Limit | None = None
    tokens_per_day: Limit | None = None
    tokens_per_month: Limit | None = None
    micros_per_day: Limit | None = None
    micros_per_month: Limit | None = None
    currency: str = "USD"

    @property
    def in_money(self) -> bool:
        return self.micros_per_day is not None or self.micros_per_month is not None


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A key without its secret. ``functions`` None means all of them; an ``admin`` key may read and change the host."""

    key_id: str
    name: str
    tenant: str
    created_at_utc: str
    functions: tuple[str, ...] | None = None
    admin: bool = False
    limits: Limits = Limits()


class Secret(NamedTuple):
    """What is kept of a secret."""

    salt: bytes
    hash: bytes


def new_key_id() -> str:
    return secrets.token_hex(8)


def new_token(key_id: str) -> tuple[str, Secret]:
    """Return a token, which is shown once, and what is kept of it."""
    secret = secrets.token_urlsafe(32)
    salt = secrets.token_bytes(16)
    return f"pl_{key_id}_{secret}", Secret(salt, _hash(secret, salt))


def split_token(token: str) -> tuple[str, str] | None:
    """Return key id and secret of a token, or None when it is none."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else (match[1], match[2])


def matches(secret: str, kept: Secret) -> bool:
    """Compare a secret with what is kept of one, in constant time."""
    return hmac.compare_digest(_hash(secret, kept.salt), kept.hash)


def _hash(secret: str, salt: bytes) -> bytes:
    # A slow hash guards secrets that people choose; nobody can try out 256 random bits.
    return hashlib.sha256(salt + secret.encode()).digest()
