"""CloudWatch metrics as log lines in the embedded metric format: no call, no agent, and nothing to import.

Source: the Amazon CloudWatch user guide, "Specification: Embedded metric format"; decision 7.
"""

from __future__ import annotations

import sys
import time

import msgspec

from pilotlight.api.metrics import Metrics
from pilotlight.metering.record import UsageRecord

NAMESPACE = "Pilotlight"
UNITS = {
    "PromptTokens": "Count",
    "CompletionTokens": "Count",
    "CostMicros": "Count",
    "TimeToFirstToken": "Milliseconds",
    "Total": "Milliseconds",
    "ColdStart": "Milliseconds",
}


class EmfMetrics(Metrics):
    """Writes one line for every record, before the client sees the end of its answer and the platform freezes us."""

    def finished(self, record: UsageRecord) -> None:
        super().finished(record)
        sys.stdout.buffer.write(emf_line(record, round(time.time() * 1000)))
        sys.stdout.buffer.flush()


def emf_line(record: UsageRecord, now_ms: int) -> bytes:
    """Return a record as one line; what was not measured is left out. ``now_ms`` counts from the epoch."""
    values = {
        "PromptTokens": record.prompt_tokens,
        "CompletionTokens": record.completion_tokens,
        "CostMicros": record.cost_micros,
        "TimeToFirstToken": record.ttft_ms,
        "Total": record.total_ms,
        "ColdStart": record.cold_start_ms or None,
    }
    measured = {name: value for name, value in values.items() if value is not None}
    metrics = [{"Name": name, "Unit": UNITS[name]} for name in measured]
    directive = {"Namespace": NAMESPACE, "Dimensions": [["function"]], "Metrics": metrics}
    labels = {"function": record.function, "request_id": record.request_id, "finish_reason": record.finish_reason}
    metadata = {"Timestamp": now_ms, "CloudWatchMetrics": [directive]}
    return msgspec.json.encode({"_aws": metadata, **labels, **measured}) + b"\n"
