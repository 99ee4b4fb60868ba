"""`pilotlight usage`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import msgspec

from pilotlight.commands.table import table
from pilotlight.config import load_settings


@click.command(short_help="Show what was used and what it cost.")
@click.option("--records", is_flag=True, help="List the records, the latest first, instead of totals.")
@click.option("--function", help="Only the records of this function.")
@click.option("--since", help="Only what started in the last so many hours, such as 24h, or days, such as 7d.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many records.")
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def usage(
    records: bool, function: str | None, since: str | None, limit: int | None, ledger: str | None, as_json: bool
) -> None:
    """Show what was used and what it cost, also while a server is running."""
    from pilotlight.metering.ledger_reader import LedgerReader

    if not records and (function is not None or limit is not None):
        raise click.UsageError("--function and --limit go with --records")
    start = None if since is None else _start(since)
    with LedgerReader(Path(load_settings(None, ledger=ledger).host.ledger)) as reader:
        rows = [*reader.records(function, start, limit)] if records else [*reader.totals(start)]
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row))
    elif rows:
        click.echo(table([_row(row) for row in rows]))
    else:
        click.echo("nothing was used yet", err=True)


def _row(row: msgspec.Struct) -> dict[str, object]:
    columns = ("started_at_utc", "request_id", "function", "num_invocations", "prompt_tokens", "completion_tokens",
               "ttft_ms", "total_ms", "finish_reason", "cost_micros", "currency")  # fmt: skip
    fields = msgspec.structs.asdict(row)
    return {name: fields[name] for name in columns if name in fields}


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
