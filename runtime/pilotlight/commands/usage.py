"""`pilotlight usage`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pilotlight.commands.table import table
from pilotlight.commands.usage_export import export_records
from pilotlight.commands.usage_outbox import show_outbox
from pilotlight.commands.usage_verify import verify_receipts
from pilotlight.config import load_settings

if TYPE_CHECKING:
    from pilotlight.metering.ledger_reader import LedgerReader

COLUMNS = ("started_at_utc", "request_id", "function", "prompt_tokens", "completion_tokens", "ttft_ms", "total_ms",
           "finish_reason", "cost_micros", "currency")  # fmt: skip
"""What the table of records shows; ``--json`` shows everything."""

Row = dict[str, object]


@click.group(short_help="Show what was used and what it cost.", invoke_without_command=True)
@click.option("--by", multiple=True, type=click.Choice(["function", "key", "tenant", "model", "day"]),
              help="What to sum up by; repeat it for several [default: function].")  # fmt: skip
@click.option("--records", is_flag=True, help="List the records, the latest first, instead of totals.")
@click.option("--margin", is_flag=True, help="Show what each function earned, and what its replicas cost.")
@click.option("--reprice", is_flag=True, help="Show what the prices in --config would change; changes nothing.")
@click.option("--config", type=click.Path(path_type=Path), help="The pilotlight.toml with the prices to compare with.")
@click.option("--function", help="Only the records of this function.")
@click.option("--since", help="Only what started in the last so many hours, such as 24h, or days, such as 7d.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many records.")
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.pass_context
def usage(
    ctx: click.Context,
    by: tuple[str, ...],
    records: bool,
    margin: bool,
    reprice: bool,
    config: Path | None,
    function: str | None,
    since: str | None,
    limit: int | None,
    ledger: str | None,
    as_json: bool,
) -> None:
    """Show what was used and what it cost, also while a server is running."""
    if ctx.invoked_subcommand is not None:
        return
    if not records and (function is not None or limit is not None):
        raise click.UsageError("--function and --limit go with --records")
    if [bool(by), records, margin, reprice].count(True) > 1:
        raise click.UsageError("choose one of --by, --records, --margin and --reprice")
    if reprice != (config is not None):
        raise click.UsageError("--reprice and --config go together")
    start = None if since is None else _start(since)
    from pilotlight.metering.database import located
    from pilotlight.metering.ledger_reader import LedgerReader

    with LedgerReader(located(load_settings(None, ledger=ledger).host.ledger)) as reader:
        if records:
            found = [msgspec.to_builtins(record) for record in reader.records(function, start, limit)]
        elif margin:
            found = [msgspec.structs.asdict(row) for row in reader.margins(start)]
        elif config is not None:
            found = _repriced(reader, config, start)
        else:
            found = [row.row() for row in reader.totals(by or ("function",), start)]
    if as_json:
        for row in found:
            click.echo(msgspec.json.encode(row))
    elif found:
        click.echo(table([{name: row[name] for name in COLUMNS} for row in found] if records else _shown(found)))
    else:
        click.echo("nothing was used yet", err=True)


usage.add_command(export_records)
usage.add_command(verify_receipts)
usage.add_command(show_outbox)


def _shown(rows: list[Row]) -> list[Row]:
    """Leave out the columns that say nothing here."""
    silent = {name for name in ("cached_tokens", "machine_micros") if not any(row.get(name) for row in rows)}
    return [{name: value for name, value in row.items() if name not in silent} for row in rows]


def _repriced(reader: LedgerReader, config: Path, start: datetime | None) -> list[Row]:
    """Return what each function's records cost, and what they would cost by the prices of a configuration."""
    from pilotlight.metering.price_schedule import PriceSchedule, repriced_micros

    functions = load_settings(config).functions
    schedules = {
        name: PriceSchedule.from_config(of_function.prices, f"functions.{name}.prices")
        for name, of_function in functions.items()
    }
    sums: dict[tuple[str, str], list[int]] = {}
    for record in reader.records(since=start):
        if (schedule := schedules.get(record.function)) is None:
            continue
        would_cost = schedule.at(record.started_at_utc)
        repriced = repriced_micros(record, would_cost)
        counts = sums.setdefault((record.function, would_cost.currency), [0, 0, 0, 0])
        differs = repriced != record.cost_micros or would_cost.currency != record.currency
        for index, count in enumerate((1, int(differs), record.cost_micros, repriced)):
            counts[index] += count
    return [
        {
            "function": name,
            "num_invocations": counts[0],
            "num_changed": counts[1],
            "cost_micros": counts[2],
            "repriced_micros": counts[3],
            "difference_micros": counts[3] - counts[2],
            "currency": currency,
        }
        for (name, currency), counts in sorted(sums.items())
    ]


def _start(since: str) -> datetime:
    """Return the instant that lies so long ago."""
    match = re.fullmatch(r"([0-9]{1,6})([hd])", since)
    if match is None:
        raise click.BadParameter(f"{since!r} is not a span such as 24h or 7d", param_hint="--since")
    hours = int(match[1]) * (24 if match[2] == "d" else 1)
    try:
        return datetime.now(UTC) - timedelta(hours=hours)
    except OverflowError as error:
        raise click.BadParameter(f"{since!r} is too long ago", param_hint="--since") from error
