"""`pilotlight usage verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from pilotlight.config import load_settings
from pilotlight.errors import ConfigError


@click.command("verify", short_help="Verify signed receipts, without a server.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--public-key", type=click.Path(path_type=Path), required=True, help="The public key, in PEM.")
@click.option("--ledger", help="Verify the receipts of this ledger where no FILE is given [default: pilotlight.db].")
def verify_receipts(file: Path | None, public_key: Path, ledger: str | None) -> None:
    """Verify the receipts in FILE, one a line, or those of a ledger. One that is not genuine is named, and fails."""
    from pilotlight.metering.signing import NotAReceipt, Verifier

    verifier = Verifier.from_file(public_key)
    num_verified = num_bad = 0
    for number, receipt in enumerate(_receipts(file, ledger), start=1):
        try:
            verifier.verify(receipt)
            num_verified += 1
        except NotAReceipt as error:
            num_bad += 1
            click.echo(f"receipt {number}: {error.message}", err=True)
    if num_bad:
        raise ConfigError(f"{num_bad} of {num_bad + num_verified} receipts are not genuine")
    click.echo(f"{num_verified} receipts are genuine")


def _receipts(file: Path | None, ledger: str | None) -> Iterator[str]:
    if file is not None:
        with file.open(encoding="utf-8") as lines:
            yield from (line.strip() for line in lines if line.strip())
        return
    from pilotlight.metering.database import located
    from pilotlight.metering.ledger_reader import LedgerReader

    with LedgerReader(located(load_settings(None, ledger=ledger).host.ledger)) as reader:
        yield from reader.receipts()
