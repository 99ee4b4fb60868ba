"""What the machines cost: how long each replica lived and worked, and whose work that was.

A replica costs from its start to its end, whether it works or is only kept warm. The time in which it worked is shared
out among the invocations by their busy time; the rest is the cost of keeping warm. Shares are exact: they add up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from pilotlight.errors import ConfigError

MS_PER_HOUR = 3_600_000
_AMOUNT = re.compile(r"(\d{1,10})(?:\.(\d{1,6}))?", re.ASCII)


class ReplicaTime(msgspec.Struct, frozen=True):
    """How long a replica lived, and how long of that at least one invocation ran on it, on one day."""

    replica_id: str
    function: str
    day: str
    currency: str
    micros_per_hour: int
    alive_ms: int
    busy_ms: int


def micros_per_hour(amount: str, where: str) -> int:
    """Read what a replica costs an hour, a decimal string.

    Raises:
        ConfigError: that is not an amount with at most six decimals.
    """
    match = _AMOUNT.fullmatch(amount)
    if match is None:
        raise ConfigError(f'{where} = {amount!r}: expected an amount with at most six decimals, such as "0.096"')
    return int(match[1]) * 1_000_000 + int((match[2] or "").ljust(6, "0"))


def share_out(micros: int, weights: Sequence[int]) -> list[int]:
    """Split an amount in proportion to the weights, exactly: what rounding leaves goes to the largest remainders."""
    total = sum(weights)
    if total == 0:
        return [0 for _ in weights]
    shares = [micros * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(micros * weights[i] % total), i))
    for index in by_remainder[: micros - sum(shares)]:
        shares[index] += 1
    return shares
