"""A usage record as a CloudEvent, and when it is tried again.

Source: the CloudEvents specification 1.0.2, JSON event format.
"""

from __future__ import annotations

import random

import msgspec

TYPE = "pilotlight.usage.recorded"
CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
MAX_DELAY_S = 600.0


def cloud_event(record: str, source: str) -> bytes:
    """Return the event of a record, which is JSON text. Its source and id are the same at every delivery."""
    fields = msgspec.json.decode(record)
    event = {
        "specversion": "1.0",
        "type": TYPE,
        "source": source,
        "id": fields["event_id"],
        "time": fields["started_at_utc"],
        "subject": fields["request_id"],
        "datacontenttype": "application/json",
        "data": msgspec.Raw(record.encode()),
    }
    return msgspec.json.encode(event)


def delay_s(num_attempts: int, first_s: float, rng: random.Random) -> float:
    """Return how long to wait after so many attempts: twice as long each time, and never quite the same."""
    longest = min(MAX_DELAY_S, first_s * 2.0 ** min(num_attempts - 1, 40))
    return longest * rng.uniform(0.5, 1.0)
