"""The metrics line, by the rules of the embedded metric format."""

from __future__ import annotations

import json

from emf import emf_line
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import Admission, UsageRecord, final_record
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason


def record(timings: Timings) -> UsageRecord:
    admission = Admission(
        request_id="a",
        function="demo",
        artifact_digest="sha256:1",
        precision="fp32",
        provider="cpu",
        replica_id="replica-1",
        started_at_utc="2026-11-22T12:00:00.000000Z",
        prices=PriceTable.from_config({"completion_per_million_tokens": "1000000"}),
    )
    return final_record(admission, Usage(4, completion_tokens=10), timings, FinishReason.LENGTH)


def test_every_metric_that_is_announced_has_its_value() -> None:
    raw = emf_line(record(Timings(ttft_ms=12.5, total_ms=80.0, cold_start_ms=400.0)), now_ms=1_795_000_000_000)
    assert raw.count(b"\n") == 1
    line = json.loads(raw)
    (directive,) = line["_aws"]["CloudWatchMetrics"]
    assert line["_aws"]["Timestamp"] == 1_795_000_000_000
    assert (directive["Namespace"], directive["Dimensions"]) == ("Pilotlight", [["function"]])
    values = {metric["Name"]: line[metric["Name"]] for metric in directive["Metrics"]}
    assert values == {
        "PromptTokens": 4,
        "CompletionTokens": 10,
        "CostMicros": 10_000_000,
        "TimeToFirstToken": 12.5,
        "Total": 80.0,
        "ColdStart": 400.0,
    }
    assert (line["function"], line["request_id"], line["finish_reason"]) == ("demo", "a", "length")


def test_what_was_not_measured_is_no_metric() -> None:
    line = json.loads(emf_line(record(Timings()), now_ms=0))
    names = {metric["Name"] for metric in line["_aws"]["CloudWatchMetrics"][0]["Metrics"]}
    assert names.isdisjoint({"TimeToFirstToken", "ColdStart"})
    assert names <= line.keys()
