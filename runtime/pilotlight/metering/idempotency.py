"""Idempotency keys: the client's promise that two requests are the same one, kept in the ledger until it expires.

A key is claimed in the transaction that admits its first request. Another request under it is not admitted, unless the
first one crashed or never ran: then it is the next attempt. The answer is kept beside the claim once it is complete.
"""

from __future__ import annotations

from typing import NamedTuple

from pilotlight.errors import IdempotencyConflict
from pilotlight.metering.database import Connection
from pilotlight.request import FinishReason

RETRIED = frozenset({FinishReason.CRASHED, FinishReason.REJECTED})
"""What ended so gave its client no answer, so the same key may ask again."""

_FIND = """
SELECT fingerprint, request_id, attempt, json_extract(record, '$.finish_reason'), answer
FROM answers LEFT JOIN invocations USING (request_id) WHERE caller = ? AND idempotency_key = ? AND expires_at > ?
"""
_CLAIM = """
INSERT INTO answers (caller, idempotency_key, fingerprint, request_id, attempt, expires_at) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (caller, idempotency_key) DO UPDATE SET fingerprint = excluded.fingerprint,
request_id = excluded.request_id, attempt = excluded.attempt, expires_at = excluded.expires_at, answer = NULL
"""
_KEEP = "UPDATE answers SET answer = ? WHERE request_id = ?"
_FORGET = "DELETE FROM answers WHERE expires_at <= ?"


class Claim(NamedTuple):
    """One use of an idempotency key. ``caller`` is the key id; ``fingerprint`` is that of path and body.

    ``now`` and ``expires_at`` are seconds since 1970.
    """

    caller: str
    idempotency_key: str
    fingerprint: str
    now: float
    expires_at: float


class Claimed(NamedTuple):
    """What the ledger knows of an idempotency key; ``finish`` is None while its request runs."""

    fingerprint: str
    request_id: str
    attempt: int
    finish: FinishReason | None
    answer: bytes | None

    @property
    def may_be_retried(self) -> bool:
        return self.finish in RETRIED


def find(connection: Connection, claim: Claim) -> Claimed | None:
    """Return the claim that holds, if there is one."""
    row = connection.execute(_FIND, (claim.caller, claim.idempotency_key, claim.now)).fetchone()
    if row is None:
        return None
    fingerprint, request_id, attempt, finish, answer = row
    return Claimed(fingerprint, request_id, attempt, None if finish is None else FinishReason(finish), answer)


def next_attempt(connection: Connection, claim: Claim) -> int | IdempotencyConflict:
    """Return which attempt a request would be, or why it is none."""
    held = find(connection, claim)
    if held is None:
        return 1
    return conflict_of(held, claim) or held.attempt + 1


def book(connection: Connection, claim: Claim, request_id: str, attempt: int) -> None:
    """Claim the key for a request, and forget what has expired."""
    connection.execute(_FORGET, (claim.now,))
    row = (claim.caller, claim.idempotency_key, claim.fingerprint, request_id, attempt, claim.expires_at)
    connection.execute(_CLAIM, row)


def conflict_of(held: Claimed, claim: Claim) -> IdempotencyConflict | None:
    """Return why a request may not run under a key that is held, if so."""
    if held.fingerprint != claim.fingerprint:
        return IdempotencyConflict("this Idempotency-Key was used for another request; a new request needs a new key")
    if held.may_be_retried:
        return None
    return IdempotencyConflict(
        f"the request {held.request_id!r} of this Idempotency-Key is running elsewhere or has run, and its answer is "
        f"not kept here; see GET /v1/usage/{held.request_id}"
    )


def keep(connection: Connection, request_id: str, answer: bytes) -> None:
    """Keep the answer of a request beside its claim."""
    connection.execute(_KEEP, (answer, request_id))
