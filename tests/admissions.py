"""Admissions and records for tests of the ledger: four prompt tokens and at most six new ones, a unit of money each."""

from __future__ import annotations

from datetime import UTC, datetime

from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord, final_record, utc_text
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason

NOON = datetime(2026, 11, 22, 12, 0, 15, tzinfo=UTC)
UNIT_A_TOKEN = PriceTable.from_config(
    {"prompt_per_million_tokens": "1000000", "completion_per_million_tokens": "1000000"}
)
PROMPT, MAX_NEW = 4, 6
RESERVED = PROMPT + MAX_NEW


def admission(request_id: str, key_id: str | None, at: datetime = NOON, currency: str = "USD") -> Admission:
    return Admission(
        request_id=request_id,
        function="demo",
        artifact_digest="sha256:1",
        precision="fp32",
        provider="cpu",
        replica_id="replica-1",
        started_at_utc=utc_text(at),
        prices=PriceTable.from_config({"currency": currency}) if currency != "USD" else UNIT_A_TOKEN,
        key_id=key_id,
        reserved_tokens=RESERVED,
        reserved_micros=UNIT_A_TOKEN.most_micros(PROMPT, MAX_NEW, 0),
    )


def ended(admitted: Admission, completion_tokens: int) -> UsageRecord:
    usage = Usage(prompt_tokens=PROMPT, completion_tokens=completion_tokens)
    return final_record(admitted, usage, Timings(), FinishReason.STOP)
