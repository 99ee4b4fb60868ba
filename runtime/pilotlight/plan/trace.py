"""Requests over time: when each came, how long prompt and answer were, and what the prompt began with.

Four formats are told apart by their first line; docs/planning.md shows them. Ours are the two that name ``at_s``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from pilotlight.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. Prompts whose ``block_ids`` begin the same begin with the same tokens, ``block_tokens`` for each."""

    at_s: float
    num_prompt_tokens: int
    num_new_tokens: int
    tenant: str | None = None
    block_ids: tuple[int, ...] = ()
    block_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a trace is cut and scaled: other models read shorter prompts, and a replay may have to be short.

    ``from_s`` and ``duration_s`` cut by the trace's own clock, ``num_requests`` by count; then times are divided by
    ``speed_up``, lengths multiplied, and what exceeds ``max_context_tokens`` is cut, the answer first to
    ``max_new_tokens`` and the prompt to what is left. ``repeat`` puts the result so often in a row.
    """

    from_s: float = 0.0
    duration_s: float | None = None
    num_requests: int | None = None
    speed_up: float = 1.0
    prompt_scale: float = 1.0
    answer_scale: float = 1.0
    max_context_tokens: int | None = None
    max_new_tokens: int | None = None
    repeat: int = 1


def read_trace(path: Path, scaling: Scaling) -> list[Arrival]:
    """Return the requests of a trace by time, the first at 0 s.

    Raises:
        ConfigError: the file is missing, is in none of the formats, or has nothing within the cut.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rows = list(_scaled(_cut(_read(path, file), scaling), scaling))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a trace ({type(error).__name__}: {error})") from error
    if not rows:
        raise ConfigError(f"{path}: has no request within the cut")
    return _repeated(rows, scaling.repeat)


def _read(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    lines = iter(lines)
    head = next(lines, "")
    if head.lstrip().startswith("{"):
        first = json.loads(head)
        read = next((read for key, read in JSON_FORMATS.items() if key in first), None)
        if read is not None:
            yield read(first)
            yield from (read(json.loads(line)) for line in lines if line.strip())
            return
    else:
        columns = next(csv.reader([head]), [])
        found = next((read for key, read in CSV_FORMATS.items() if key in columns), None)
        if found is not None:
            yield from (found(row) for row in csv.DictReader(lines, columns))
            return
    known = ", ".join((*CSV_FORMATS, *JSON_FORMATS))
    raise ConfigError(f"{path}: is not a trace; expected CSV or JSON lines with one of the fields {known}")


def _cut(arrivals: Iterator[Arrival], scaling: Scaling) -> Iterator[Arrival]:
    ordered = sorted(arrivals, key=lambda one: one.at_s)
    begin_s = (ordered[0].at_s if ordered else 0.0) + scaling.from_s
    end_s = float("inf") if scaling.duration_s is None else begin_s + scaling.duration_s
    return islice((one for one in ordered if begin_s <= one.at_s < end_s), scaling.num_requests)


def _scaled(arrivals: Iterator[Arrival], scaling: Scaling) -> Iterator[Arrival]:
    begin_s: float | None = None
    for one in arrivals:
        begin_s = one.at_s if begin_s is None else begin_s
        num_new = max(1, round(one.num_new_tokens * scaling.answer_scale))
        num_prompt = max(1, round(one.num_prompt_tokens * scaling.prompt_scale))
        if scaling.max_new_tokens is not None:
            num_new = min(num_new, scaling.max_new_tokens)
        if scaling.max_context_tokens is not None:
            num_new = min(num_new, max(1, scaling.max_context_tokens // 2))
            num_prompt = min(num_prompt, scaling.max_context_tokens - num_new)
        at_s = (one.at_s - begin_s) / scaling.speed_up
        yield Arrival(at_s, num_prompt, num_new, one.tenant, one.block_ids, one.block_tokens * scaling.prompt_scale)


def _repeated(arrivals: list[Arrival], repeat: int) -> list[Arrival]:
    """Return the arrivals so often in a row, a mean gap between one pass and the next."""
    period_s = arrivals[-1].at_s * (1 + 1 / len(arrivals))
    return [
        Arrival(number * period_s + one.at_s, one.num_prompt_tokens, one.num_new_tokens, one.tenant, one.block_ids,
                one.block_tokens)
        for number in range(repeat) for one in arrivals
    ]  # fmt: skip


def _own_json(row: dict[str, Any]) -> Arrival:
    block_ids = tuple(row.get("block_ids", ()))
    block_tokens = float(row["block_tokens"]) if block_ids else 0.0
    tenant = row.get("tenant")
    return Arrival(
        float(row["at_s"]), int(row["prompt_tokens"]), int(row["new_tokens"]), tenant, block_ids, block_tokens
    )


def _mooncake(row: dict[str, Any]) -> Arrival:
    block_ids, lengths = tuple(row.get("hash_ids", ())), (int(row["input_length"]), int(row["output_length"]))
    return Arrival(row["timestamp"] / 1000, *lengths, None, block_ids, MOONCAKE_BLOCK_TOKENS)


def _own_csv(row: dict[str, str]) -> Arrival:
    return Arrival(float(row["at_s"]), int(row["prompt_tokens"]), int(row["new_tokens"]), row.get("tenant") or None)


def _azure(row: dict[str, str]) -> Arrival:
    instant = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
    return Arrival(instant, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


JSON_FORMATS: dict[str, Callable[[dict[str, Any]], Arrival]] = {"at_s": _own_json, "input_length": _mooncake}
CSV_FORMATS: dict[str, Callable[[dict[str, str]], Arrival]] = {"at_s": _own_csv, "ContextTokens": _azure}
