"""Sums over a ledger: by function, key, tenant, model and day, with what the machines cost, and what is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from pilotlight.metering.database import Connection
from pilotlight.metering.machine_cost import MS_PER_HOUR, share_out

GROUPS = {
    "function": "function",
    "key": "json_extract(record, '$.key_id')",
    "tenant": "json_extract(record, '$.tenant')",
    "model": "json_extract(record, '$.model')",
    "day": "substr(started_at_utc, 1, 10)",
}
"""What records can be summed by, and where that stands."""

_SUMS = "count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), sum(cost_micros)"
_COUNTED = "record IS NOT NULL AND (:since IS NULL OR started_at_utc >= :since)"
_POOLS = """
SELECT function, day, currency, sum(busy_ms * micros_per_hour), sum(alive_ms * micros_per_hour)
FROM replica_time WHERE :since IS NULL OR day >= substr(:since, 1, 10) GROUP BY function, day, currency
"""


class Totals(msgspec.Struct, frozen=True):
    """The sums over the records of one group in one currency; ``machine_micros`` is their share of busy replicas."""

    group: dict[str, str | None]
    currency: str
    num_invocations: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_micros: int
    machine_micros: int

    def row(self) -> dict[str, object]:
        """Return the sums as one flat row, the group first and the currency last."""
        fields = msgspec.structs.asdict(self)
        group, currency = fields.pop("group"), fields.pop("currency")
        return {**group, **fields, "currency": currency}


class Margin(msgspec.Struct, frozen=True):
    """What a function earned and cost: ``busy_micros`` for its invocations, ``warm_micros`` for waiting for them."""

    function: str
    currency: str
    num_invocations: int
    cost_micros: int
    busy_micros: int
    warm_micros: int
    margin_micros: int


def totals(connection: Connection, by: Sequence[str], since: str | None) -> list[Totals]:
    """Return the sums of each group, in the order of the groups; ``by`` names some of ``GROUPS``."""
    columns = ", ".join(["currency", *(GROUPS[name] for name in by)])
    query = f"SELECT {columns}, {_SUMS} FROM invocations WHERE {_COUNTED} GROUP BY {columns} ORDER BY {columns}"  # noqa: S608
    machine = _machine_micros(connection, by, since)
    found = []
    for currency, *rest in connection.execute(query, {"since": since}):
        *key, num_invocations, prompt_tokens, cached_tokens, completion_tokens, cost_micros = rest
        found.append(
            Totals(
                group=dict(zip(by, key, strict=True)),
                currency=currency,
                num_invocations=num_invocations,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=completion_tokens,
                cost_micros=cost_micros,
                machine_micros=machine[(currency, *key)],
            )
        )
    return sorted(found, key=lambda row: [value or "" for value in row.group.values()])


def margins(connection: Connection, since: str | None) -> list[Margin]:
    """Return what each function earned and cost."""
    earned = {(row.group["function"], row.currency): row for row in totals(connection, ("function",), since)}
    alive: dict[tuple[str | None, str], int] = defaultdict(int)
    for function, _, currency, _, alive_cost in connection.execute(_POOLS, {"since": since}):
        alive[function, currency] += alive_cost
    return [
        _margin(function or "", currency, earned.get((function, currency)), alive[function, currency] // MS_PER_HOUR)
        for function, currency in sorted(earned.keys() | alive.keys(), key=str)
    ]


def _margin(function: str, currency: str, earned: Totals | None, machine_micros: int) -> Margin:
    cost_micros, busy_micros = (earned.cost_micros, earned.machine_micros) if earned else (0, 0)
    num_invocations = earned.num_invocations if earned else 0
    warm_micros = max(0, machine_micros - busy_micros)
    left = cost_micros - busy_micros - warm_micros
    return Margin(function, currency, num_invocations, cost_micros, busy_micros, warm_micros, left)


def _machine_micros(connection: Connection, by: Sequence[str], since: str | None) -> dict[tuple[Any, ...], int]:
    """Share out the busy time of each function's replicas of a day among the invocations that began on it."""
    columns = ", ".join(["currency", *(GROUPS[name] for name in by)])
    query = f"""
        SELECT function, substr(started_at_utc, 1, 10), {_COUNTED}, sum(busy), {columns}
        FROM (
            SELECT *, CAST(json_extract(record, '$.busy_ms') AS BIGINT) AS busy
            FROM invocations WHERE record IS NOT NULL
        ) AS recorded
        WHERE :since IS NULL OR started_at_utc >= substr(:since, 1, 10)
        GROUP BY 1, 2, 3, {columns}
    """  # noqa: S608
    shared: dict[tuple[Any, ...], list[tuple[bool, int, tuple[Any, ...]]]] = defaultdict(list)
    for function, day, counts, busy_ms, currency, *key in connection.execute(query, {"since": since}):
        shared[function, day, currency].append((bool(counts), busy_ms, (currency, *key)))
    found: dict[tuple[Any, ...], int] = defaultdict(int)
    for function, day, currency, busy_cost, _ in connection.execute(_POOLS, {"since": since}):
        groups = shared[function, day, currency]
        for (counts, _, key), share in zip(groups, _shares(busy_cost // MS_PER_HOUR, groups), strict=True):
            found[tuple(key)] += share if counts else 0
    return found


def _shares(micros: int, groups: Iterable[tuple[bool, int, tuple[Any, ...]]]) -> list[int]:
    return share_out(micros, [busy_ms for _, busy_ms, _ in groups])
