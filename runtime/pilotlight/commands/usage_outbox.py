"""`pilotlight usage outbox`."""

from __future__ import annotations

import click
import msgspec

from pilotlight.commands.table import table
from pilotlight.config import load_settings


@click.command("outbox", short_help="Show which events wait for their receiver.")
@click.option("--retry-dead", is_flag=True, help="Try the dead letters again.")
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def show_outbox(retry_dead: bool, ledger: str | None, as_json: bool) -> None:
    """Show how many usage events wait for each receiver, and how many were given up."""
    from pilotlight.metering.database import connect_writer, located, transaction
    from pilotlight.metering.ledger_reader import LedgerReader
    from pilotlight.metering.outbox import revive

    location = located(load_settings(None, ledger=ledger).host.ledger)
    with LedgerReader(location) as reader:
        if retry_dead:
            connection = connect_writer(location)
            try:
                with transaction(connection):
                    num_revived = revive(connection)
            finally:
                connection.close()
            click.echo(f"{num_revived} dead letters are tried again", err=True)
        rows: list[dict[str, object]] = [
            {"url": url, "num_waiting": num_waiting, "num_dead": num_dead}
            for url, num_waiting, num_dead in reader.outbox_counts()
        ]
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row))
    elif rows:
        click.echo(table(rows))
    else:
        click.echo("nothing waits", err=True)
