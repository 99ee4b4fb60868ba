"""The usage record and its JSON form."""

import importlib.resources
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from hatchling.builders.wheel import WheelBuilder

from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import SCHEMA_VERSION, Admission, Capacity, UsageRecord, final_record, utc_text
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from pilotlight.tee import TeeLabel

REPO = Path(__file__).parents[2]
SCHEMA = "usage_record.schema.json"

ADMISSION = Admission(
    request_id="req-1",
    function="demo",
    artifact_digest="sha256:1",
    precision="int4",
    provider="cpu",
    replica_id="replica-1",
    started_at_utc="2026-11-22T10:00:00.000000Z",
    model="org/model",
    capacity=Capacity.SPOT,
    tee=TeeLabel.SIMULATED,
    attempt=2,
    tenant="acme",
    key_id="0123456789abcdef",
    idempotency_key="order-7",
    reserved_tokens=20,
    reserved_micros=7,
    resumes="req-0",
    resumed_tokens=9,
    prices=PriceTable.from_config({"id": "autumn", "currency": "EUR", "completion_per_million_tokens": "2"}),
)


def test_a_record_holds_what_was_admitted_used_timed_and_charged() -> None:
    usage = Usage(
        prompt_tokens=5,
        cached_tokens=1,
        completion_tokens=3,
        delivered_tokens=2,
        recomputed_tokens=4,
        busy_ms=7,
        reasoning_tokens=1,
        migrations=2,
    )
    timings = Timings(
        queue_ms=1, cold_start_ms=2, fork_ms=1.5, session_ms=0.5, prefill_ms=3, ttft_ms=4, decode_ms=5, total_ms=15
    )
    record = final_record(ADMISSION, usage, timings, FinishReason.STOP, "\n\n")
    assert msgspec.to_builtins(record) == {
        "schema_version": SCHEMA_VERSION,
        "event_id": record.event_id,
        "request_id": "req-1",
        "attempt": 2,
        "function": "demo",
        "artifact_digest": "sha256:1",
        "precision": "int4",
        "provider": "cpu",
        "replica_id": "replica-1",
        "model": "org/model",
        "capacity": "spot",
        "tee": "simulated",
        "tenant": "acme",
        "key_id": "0123456789abcdef",
        "idempotency_key": "order-7",
        "reserved_tokens": 20,
        "reserved_micros": 7,
        "resumes": "req-0",
        "resumed_tokens": 9,
        "started_at_utc": "2026-11-22T10:00:00.000000Z",
        "prompt_tokens": 5,
        "cached_tokens": 1,
        "completion_tokens": 3,
        "delivered_tokens": 2,
        "recomputed_tokens": 4,
        "reasoning_tokens": 1,
        "migrations": 2,
        "queue_ms": 1,
        "cold_start_ms": 2,
        "fork_ms": 1.5,
        "map_ms": 0.0,
        "unseal_ms": 0.0,
        "session_ms": 0.5,
        "warm_up_ms": 0.0,
        "prefill_ms": 3,
        "ttft_ms": 4,
        "decode_ms": 5,
        "total_ms": 15,
        "busy_ms": 7,
        "finish_reason": "stop",
        "stop_detail": "\n\n",
        "price_table_id": "autumn",
        "cost_micros": 6,
        "currency": "EUR",
    }


@pytest.mark.parametrize(
    ("finish_reason", "reserved_micros", "cost_micros"),
    [
        (FinishReason.STOP, None, 6),
        (FinishReason.STOP, 6, 6),
        (FinishReason.STOP, 5, 5),
        (FinishReason.CRASHED, 7, 6),
        (FinishReason.REJECTED, 7, 0),
    ],
)
def test_nothing_costs_more_than_was_reserved_and_what_never_ran_costs_nothing(
    finish_reason: FinishReason, reserved_micros: int | None, cost_micros: int
) -> None:
    admission = msgspec.structs.replace(ADMISSION, reserved_micros=reserved_micros)
    assert final_record(admission, Usage(completion_tokens=3), Timings(), finish_reason).cost_micros == cost_micros


def test_a_record_of_version_1_can_still_be_read() -> None:
    record = final_record(ADMISSION, Usage(), Timings(), FinishReason.STOP)
    fields = msgspec.to_builtins(record) | {"schema_version": 1}
    for name in ("model", "capacity", "tee", "idempotency_key", "reserved_tokens", "reserved_micros", "migrations"):
        del fields[name]
    del fields["reasoning_tokens"]
    old = msgspec.json.decode(json.dumps(fields), type=UsageRecord)
    assert (old.schema_version, old.capacity, old.tee, old.reserved_tokens) == (
        1,
        Capacity.ON_DEMAND,
        TeeLabel.NONE,
        None,
    )


def test_every_record_is_an_event_of_its_own() -> None:
    records = [final_record(ADMISSION, Usage(), Timings(), FinishReason.STOP) for _ in range(100)]
    assert len({record.event_id for record in records}) == 100


def test_the_schema_in_the_repository_is_the_record_s() -> None:
    published = json.loads(importlib.resources.files("pilotlight.metering").joinpath(SCHEMA).read_text())
    assert published.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert published == msgspec.json.schema(UsageRecord)


def test_the_schema_is_part_of_the_wheel() -> None:
    included = {file.distribution_path for file in WheelBuilder(str(REPO)).recurse_included_files()}
    assert f"pilotlight/metering/{SCHEMA}" in included


@pytest.mark.parametrize("offset_hours", [-11, 0, 9])
def test_instants_are_written_in_utc(offset_hours: int) -> None:
    zone = timezone(timedelta(hours=offset_hours))
    instant = datetime(2026, 1, 2, 3, 4, 5, 600, tzinfo=zone) + timedelta(hours=offset_hours)
    assert utc_text(instant) == "2026-01-02T03:04:05.000600Z"
