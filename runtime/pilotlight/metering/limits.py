"""The limits of a key, checked and taken in the transaction that admits an invocation, and settled with its record.

What an invocation could use at most is reserved when it is admitted and replaced by what it did use when it ends, in
the minute, the day and the month in which it began. ``key_use`` holds both together, so there is nothing to spend
between a check and a booking, and nothing that a restart forgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

import msgspec

from pilotlight.errors import InvalidKey, InvalidRequest, LimitExceeded, NotPermitted, PilotlightError
from pilotlight.metering.database import Connection
from pilotlight.metering.keys import Key, Limits
from pilotlight.metering.record import Admission, UsageRecord


class Span(StrEnum):
    """What a row of ``key_use`` sums up: all that runs now, or what began in one minute, day or month."""

    OPEN = "open"
    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"


class Use(NamedTuple):
    """Requests, and what they used or still hold reserved."""

    num_requests: int = 0
    num_tokens: int = 0
    micros: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """How much of its limits by the minute a key has left. The headers' names are OpenAI's."""

    limits: Limits
    this_minute: Use
    reset_s: float

    def headers(self) -> dict[str, str]:
        """Return the ``x-ratelimit-*`` headers of a response."""
        found = {}
        for name, limit, used in (
            ("requests", self.limits.requests_per_minute, self.this_minute.num_requests),
            ("tokens", self.limits.tokens_per_minute, self.this_minute.num_tokens),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                found[f"x-ratelimit-reset-{name}"] = f"{self.reset_s:.3f}s"
        return found


class Admitted(NamedTuple):
    """What the ledger answers to an admission: how its key stands now, if it has one, and which attempt it is."""

    standing: Standing | None = None
    attempt: int = 1


def periods(started_at_utc: str) -> dict[Span, str]:
    """Return the names of the rows that an invocation counts in, by its start as records write it."""
    return {
        Span.OPEN: Span.OPEN,
        Span.MINUTE: started_at_utc[:16],
        Span.DAY: started_at_utc[:10],
        Span.MONTH: started_at_utc[:7],
    }


def refusal(limits: Limits, asked: Use, used: Mapping[Span, Use], now: datetime) -> PilotlightError | None:
    """Decide whether what is asked for fits beside what is used, and say what does not."""
    this_minute = Standing(limits, used[Span.MINUTE], _left_s(Span.MINUTE, now)).headers()
    for limit, span, taken, wanted, unit in (
        (limits.max_concurrent, Span.OPEN, used[Span.OPEN].num_requests, 1, "requests"),
        (limits.requests_per_minute, Span.MINUTE, used[Span.MINUTE].num_requests, 1, "requests"),
        (limits.tokens_per_minute, Span.MINUTE, used[Span.MINUTE].num_tokens, asked.num_tokens, "tokens"),
        (limits.tokens_per_day, Span.DAY, used[Span.DAY].num_tokens, asked.num_tokens, "tokens"),
        (limits.tokens_per_month, Span.MONTH, used[Span.MONTH].num_tokens, asked.num_tokens, "tokens"),
        (limits.micros_per_day, Span.DAY, used[Span.DAY].micros, asked.micros, f"micro-{limits.currency}"),
        (limits.micros_per_month, Span.MONTH, used[Span.MONTH].micros, asked.micros, f"micro-{limits.currency}"),
    ):
        if limit is None or taken + wanted <= limit:
            continue
        of_key = f"{limit:,} {unit} {'at a time' if span is Span.OPEN else f'a {span}'}"
        if wanted > limit:
            return InvalidRequest(
                "max_tokens", f"the request may use up to {wanted:,} {unit}; its key allows {of_key}; set max_tokens"
            )
        kind = "insufficient_quota" if span in (Span.DAY, Span.MONTH) else unit
        message = f"the key's limit of {of_key} is reached: {taken:,} are used or reserved, {wanted:,} are asked for"
        return LimitExceeded(message, kind, _left_s(span, now), this_minute)
    return None


def reserve(connection: Connection, admission: Admission) -> Standing | PilotlightError:
    """Take what an invocation could use from the limits of its key, or return why it may not."""
    row = connection.execute("SELECT key FROM keys WHERE key_id = ? AND revoked_at_utc IS NULL", (admission.key_id,))
    if (found := row.fetchone()) is None:
        return InvalidKey()
    limits = msgspec.json.decode(found[0], type=Key).limits
    if limits.in_money and limits.currency != admission.prices.currency:
        return NotPermitted(
            f"the key's budget is in {limits.currency}, and {admission.function!r} costs {admission.prices.currency}"
        )
    now = datetime.fromisoformat(admission.started_at_utc)
    spans = periods(admission.started_at_utc)
    used = _used(connection, admission.key_id or "", spans)
    asked = Use(1, admission.reserved_tokens or 0, admission.reserved_micros or 0)
    if (refused := refusal(limits, asked, used, now)) is not None:
        return refused
    if used[Span.MINUTE].num_requests == 0:
        forget = "DELETE FROM key_use WHERE key_id = ? AND length(period) = 16 AND period < ?"
        connection.execute(forget, (admission.key_id, spans[Span.MINUTE]))
    book = """
        INSERT INTO key_use VALUES (?, ?, ?, ?, ?) ON CONFLICT (key_id, period) DO UPDATE SET
        num_requests = key_use.num_requests + excluded.num_requests,
        num_tokens = key_use.num_tokens + excluded.num_tokens, micros = key_use.micros + excluded.micros
    """
    connection.executemany(book, [(admission.key_id, period, *asked) for period in spans.values()])
    taken = Use(*(a + b for a, b in zip(used[Span.MINUTE], asked, strict=True)))
    return Standing(limits, taken, _left_s(Span.MINUTE, now))


def settle(connection: Connection, record: UsageRecord) -> None:
    """Replace what the invocation had reserved by what it used."""
    if record.key_id is None:
        return
    reserved_tokens, reserved_micros = record.reserved_tokens or 0, record.reserved_micros or 0
    used_tokens = record.prompt_tokens + record.completion_tokens
    book = """
        UPDATE key_use SET num_requests = num_requests + ?, num_tokens = num_tokens + ?, micros = micros + ?
        WHERE key_id = ? AND period = ?
    """
    for span, period in periods(record.started_at_utc).items():
        if span is Span.OPEN:
            change = Use(-1, -reserved_tokens, -reserved_micros)
        else:
            change = Use(0, used_tokens - reserved_tokens, record.cost_micros - reserved_micros)
        connection.execute(book, (*change, record.key_id, period))


def _used(connection: Connection, key_id: str, spans: Mapping[Span, str]) -> dict[Span, Use]:
    query = "SELECT num_requests, num_tokens, micros FROM key_use WHERE key_id = ? AND period = ?"
    rows = {span: connection.execute(query, (key_id, period)).fetchone() for span, period in spans.items()}
    return {span: Use(*(row or ())) for span, row in rows.items()}


def _left_s(span: Span, now: datetime) -> float:
    """Return how long the minute, the day or the month still lasts; what runs now may end any second."""
    if span is Span.OPEN:
        return 1.0
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    end = {
        Span.MINUTE: now.replace(second=0, microsecond=0) + timedelta(minutes=1),
        Span.DAY: midnight + timedelta(days=1),
        Span.MONTH: (midnight.replace(day=1) + timedelta(days=32)).replace(day=1),
    }[span]
    return (end - now).total_seconds()
