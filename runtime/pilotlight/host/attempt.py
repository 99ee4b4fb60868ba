"""What travels between a host and a replica on another machine: one attempt at a sequence, and its tokens in parts.

An attempt has the number of its epoch, and a part says how many tokens came before it. So a host can tell the tokens of
a replica that it has given up from those that it waits for, however late they are.
"""

from __future__ import annotations

import msgspec

from pilotlight.host.wire import Stages
from pilotlight.request import Sequence, TokenEvent


class Attempt(msgspec.Struct, array_like=True, frozen=True):
    """Generate what follows in ``sequence``, for one of the functions that a replica has."""

    function: str
    sequence: Sequence
    epoch: int


class Part(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """Some tokens in a row, the first of which is number ``position`` of the answer.

    Instants in the events are those of the replica's monotonic clock, which said ``sent_at`` when the part left.
    The first part of an attempt that had to wait for a model to load says how long each stage took.
    """

    epoch: int
    position: int
    replica_id: str
    sent_at: float
    events: list[TokenEvent]
    stages: Stages | None = None


class HandOver(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """The replica has to leave: the sequence goes on elsewhere, behind the tokens that were sent."""

    epoch: int
    replica_id: str


FromAttempt = Part | HandOver

_attempts = msgspec.msgpack.Decoder(Attempt)
_answers = msgspec.msgpack.Decoder(FromAttempt)


def read_attempt(payload: bytes) -> Attempt:
    return _attempts.decode(payload)


def read_answer(payload: bytes) -> FromAttempt:
    found: FromAttempt = _answers.decode(payload)
    return found
