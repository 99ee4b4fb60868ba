"""The two ends of an invocation in the ledger: its admission, and its one final usage record."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from enum import StrEnum

import msgspec

from pilotlight.metering.prices import PriceTable
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from pilotlight.tee import TeeLabel

SCHEMA_VERSION = 2
CRASH_DETAIL = "the process ended before the invocation did"


class Capacity(StrEnum):
    """How the machine is paid for."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"


class Admission(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of an invocation before its first token, and enough to close it after a crash.

    ``model`` is the artifact's source; ``tee`` says what the machine could prove of itself. What is reserved is the
    most that the invocation can use and cost.
    One that continues an answer ``resumes`` the request that began it; ``resumed_tokens`` of prompt and answer were
    paid for there.
    """

    request_id: str
    function: str
    artifact_digest: str
    precision: str
    provider: str
    replica_id: str
    started_at_utc: str
    prices: PriceTable
    model: str | None = None
    capacity: Capacity = Capacity.ON_DEMAND
    tee: TeeLabel = TeeLabel.NONE
    attempt: int = 1
    tenant: str | None = None
    key_id: str | None = None
    idempotency_key: str | None = None
    reserved_tokens: int | None = None
    reserved_micros: int | None = None
    resumes: str | None = None
    resumed_tokens: int = 0


class UsageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One invocation, finished. ``usage_record.schema.json`` describes its JSON form.

    ``event_id`` names this record wherever it is sent; ``cost_micros`` is in millionths of ``currency``, by the price
    table ``price_table_id``, and never more than was reserved. The other fields are those of ``Admission``, ``Usage``
    and ``Timings``. Those with a default are missing in records of version 1.
    """

    schema_version: int = SCHEMA_VERSION
    event_id: str
    request_id: str
    attempt: int
    function: str
    artifact_digest: str
    precision: str
    provider: str
    replica_id: str
    tenant: str | None
    key_id: str | None
    started_at_utc: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    delivered_tokens: int
    recomputed_tokens: int
    queue_ms: float
    cold_start_ms: float
    fork_ms: float = 0.0
    map_ms: float = 0.0
    unseal_ms: float = 0.0
    session_ms: float = 0.0
    warm_up_ms: float = 0.0
    prefill_ms: float
    ttft_ms: float | None
    decode_ms: float
    total_ms: float
    busy_ms: int
    finish_reason: FinishReason
    stop_detail: str | None
    price_table_id: str
    cost_micros: int
    currency: str
    model: str | None = None
    capacity: Capacity = Capacity.ON_DEMAND
    tee: TeeLabel = TeeLabel.NONE
    idempotency_key: str | None = None
    reserved_tokens: int | None = None
    reserved_micros: int | None = None
    resumes: str | None = None
    resumed_tokens: int = 0
    reasoning_tokens: int = 0
    migrations: int = 0


def final_record(
    admission: Admission,
    usage: Usage,
    timings: Timings,
    finish_reason: FinishReason,
    stop_detail: str | None = None,
) -> UsageRecord:
    """Return the record that ends an invocation, priced by the table it was admitted under.

    ``stop_detail`` says more about the reason: the stop string that was matched, or the error.
    """
    fields = msgspec.structs.asdict(admission)
    prices: PriceTable = fields.pop("prices")
    return UsageRecord(
        event_id=os.urandom(16).hex(),
        finish_reason=finish_reason,
        stop_detail=stop_detail,
        price_table_id=prices.id,
        cost_micros=price(prices, usage, finish_reason, admission.reserved_micros),
        currency=prices.currency,
        **fields,
        **msgspec.structs.asdict(usage),
        **msgspec.structs.asdict(timings),
    )


def price(prices: PriceTable, usage: Usage, finish_reason: FinishReason, reserved_micros: int | None) -> int:
    """Return the price of an invocation; one that never ran is free, and none costs more than was reserved for it."""
    if finish_reason is FinishReason.REJECTED:
        return 0
    cost_micros = prices.cost_micros(usage)
    return cost_micros if reserved_micros is None else min(cost_micros, reserved_micros)


def crashed_record(admission: Admission, usage: Usage) -> UsageRecord:
    """Return the record of an invocation whose process is gone."""
    return final_record(admission, usage, Timings(), FinishReason.CRASHED, CRASH_DETAIL)


def utc_text(instant: datetime) -> str:
    """Return an instant as records write it; these texts sort like the instants themselves."""
    return instant.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
