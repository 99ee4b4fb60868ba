"""What becomes of running sequences when their machine has to leave: those that fit finish, the others move. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MARGIN_S = 2.0
"""What a clean end needs after the last token: messages, records, and the clouds' clocks."""


@dataclass(frozen=True, slots=True)
class Open:
    """A sequence that runs or waits here, and the most tokens that it may still generate."""

    sequence_id: str
    num_left_tokens: int
    has_begun: bool = True


@dataclass(frozen=True, slots=True)
class Departure:
    """Who stays to the end, and who goes on elsewhere."""

    finishing: tuple[str, ...]
    moving: tuple[str, ...]


def admission_s(seconds_left: float, drain_timeout_s: float) -> float:
    """Return for how long a host that will be gone in ``seconds_left`` goes on taking requests.

    Somebody else starts its replacement, who sees that it is no longer ready; until there is one, requests had better
    be taken here than nowhere. What is taken last still has ``drain_timeout_s``.
    """
    return max(0.0, seconds_left - MARGIN_S - drain_timeout_s)


def plan_departure(sequences: Iterable[Open], inter_token_s: float, seconds_left: float) -> Departure:
    """Decide who can finish in the time that is left, at the pace that is measured now.

    Whoever leaves makes the others faster, so the pace is that of the worst case. A sequence may end earlier than its
    limit, but nobody can promise that. What has not begun moves at once: it loses nothing. Without a measured pace
    nothing is known to fit.
    """
    finishing: list[str] = []
    moving: list[str] = []
    usable_s = seconds_left - MARGIN_S
    for one in sequences:
        fits = one.has_begun and inter_token_s > 0 and one.num_left_tokens * inter_token_s <= usable_s
        (finishing if fits else moving).append(one.sequence_id)
    return Departure(tuple(finishing), tuple(moving))
