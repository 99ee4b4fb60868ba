"""`pilotlight keys`."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pilotlight.commands.table import table
from pilotlight.config import load_settings
from pilotlight.errors import ConfigError

if TYPE_CHECKING:
    from pilotlight.metering.database import Location
    from pilotlight.metering.dynamodb_keys import DynamoDbKeyDesk
    from pilotlight.metering.keyring import KeyDesk

_ledger = click.option("--ledger", help="The usage ledger, which also holds the keys [default: pilotlight.db].")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
_count = click.IntRange(min=1)


class _Money(click.ParamType[int]):
    """An amount with at most six decimals, as millionths."""

    name = "amount"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,10})(?:\.(\d{1,6}))?", str(value), re.ASCII)
        if match is None or (micros := int(match[1]) * 1_000_000 + int((match[2] or "").ljust(6, "0"))) == 0:
            self.fail(f"{value!r} is not an amount such as 5 or 0.25", param, ctx)
        return micros


@click.group(short_help="Make, list, end and renew API keys.")
def keys() -> None:
    """Make, list, end and renew API keys, also while a server is running.

    Without any key, a server listens on loopback only and asks nobody who they are. From the first key on, every
    request needs one: `Authorization: Bearer pl_…` or `x-api-key: pl_…`.
    """


@keys.command()
@click.argument("name")
@click.option("--tenant", help="Who pays [default: NAME].")
@click.option("--function", "functions", multiple=True, help="May call this function only; repeat it for several.")
@click.option("--admin", is_flag=True, help="May also read metrics, see all records and change the host.")
@click.option("--requests-per-minute", type=_count, help="At most so many requests in a minute.")
@click.option("--tokens-per-minute", type=_count, help="At most so many tokens, of prompts and answers, in a minute.")
@click.option("--max-concurrent", type=_count, help="At most so many requests at a time.")
@click.option("--tokens-per-day", type=_count, help="A budget of tokens for each day.")
@click.option("--tokens-per-month", type=_count, help="A budget of tokens for each month.")
@click.option("--cost-per-day", "micros_per_day", type=_Money(), help="A budget of money for each day, such as 2.50.")
@click.option("--cost-per-month", "micros_per_month", type=_Money(), help="A budget of money for each month.")
@click.option("--currency", default="USD", show_default=True, help="The currency of these budgets.")
@_ledger
@_json
def create(
    name: str,
    tenant: str | None,
    functions: tuple[str, ...],
    admin: bool,
    ledger: str | None,
    as_json: bool,
    **limits: int | str | None,
) -> None:
    """Make a key called NAME and print its token, which is not kept and cannot be shown again."""
    from pilotlight.metering.keys import Limits

    if re.fullmatch(r"[A-Z]{3}", str(limits["currency"])) is None:
        raise click.BadParameter("expected the three letters of a currency, such as USD", param_hint="--currency")
    location = _location(ledger)
    is_new = isinstance(location, Path) and not location.exists()
    with _desk(location) as desk:
        allowed = msgspec.convert(limits, Limits)
        key, token = desk.create(name, tenant or name, functions or None, allowed, admin=admin)
    if as_json:
        click.echo(msgspec.json.encode({"token": token, **msgspec.to_builtins(key)}))
    else:
        click.echo(token)
        click.echo(f"key {key.key_id} of tenant {key.tenant}; the token is not kept and not shown again", err=True)
    if is_new:
        click.echo(f"{location} is a new ledger: the key is for servers that are started with it", err=True)


@keys.command("list")
@_ledger
@_json
def list_keys(ledger: str | None, as_json: bool) -> None:
    """List all keys, without their secrets."""
    with _existing_desk(ledger) as desk:
        found = desk.listed()
    if as_json:
        for listed in found:
            click.echo(
                msgspec.json.encode({**msgspec.to_builtins(listed.key), "revoked_at_utc": listed.revoked_at_utc})
            )
    elif found:
        click.echo(
            table(
                [
                    {
                        "key_id": listed.key.key_id,
                        "name": listed.key.name,
                        "tenant": listed.key.tenant,
                        "functions": "all" if listed.key.functions is None else " ".join(listed.key.functions),
                        "admin": "yes" if listed.key.admin else "no",
                        "limits": " ".join(f"{k}={v}" for k, v in msgspec.to_builtins(listed.key.limits).items()),
                        "created_at_utc": listed.key.created_at_utc,
                        "revoked_at_utc": listed.revoked_at_utc,
                    }
                    for listed in found
                ]
            )
        )
    else:
        click.echo("there are no keys", err=True)


@keys.command()
@click.argument("key_id")
@_ledger
def revoke(key_id: str, ledger: str | None) -> None:
    """End the key KEY_ID at once and for good. Its records stay."""
    with _existing_desk(ledger) as desk:
        desk.revoke(key_id)
    click.echo(f"key {key_id} is revoked", err=True)


@keys.command()
@click.argument("key_id")
@click.option("--grace", default="0h", show_default=True, help="How long the old token stays valid, such as 24h or 7d.")
@_ledger
def rotate(key_id: str, grace: str, ledger: str | None) -> None:
    """Give the key KEY_ID a new token and print it. Limits and what was used go on as before."""
    match = re.fullmatch(r"([0-9]{1,4})([hd])", grace, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{grace!r} is not a span such as 24h or 7d", param_hint="--grace")
    span = timedelta(hours=int(match[1]) * (24 if match[2] == "d" else 1))
    with _existing_desk(ledger) as desk:
        click.echo(desk.rotate(key_id, span))


def _location(ledger: str | None) -> Location:
    from pilotlight.metering.database import located

    return located(load_settings(None, ledger=ledger).host.ledger)


def _existing_desk(ledger: str | None) -> KeyDesk | DynamoDbKeyDesk:
    location = _location(ledger)
    if isinstance(location, Path) and not location.exists():
        raise ConfigError(f"{location}: there is no usage ledger here; name that of the server with --ledger")
    return _desk(location)


def _desk(location: Location) -> KeyDesk | DynamoDbKeyDesk:
    from pilotlight.metering.database import DYNAMODB_SCHEME

    if isinstance(location, str) and location.startswith(DYNAMODB_SCHEME):
        from pilotlight.metering.dynamodb_keys import DynamoDbKeyDesk

        return DynamoDbKeyDesk(location)
    from pilotlight.metering.keyring import KeyDesk

    return KeyDesk(location)


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
def signing(file: Path) -> None:
    """Write a private key for signing records into FILE, and the public one into FILE.pub."""
    from pilotlight.metering.signing import make_signing_key

    click.echo(make_signing_key(file))


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
def recipient(file: Path) -> None:
    """Write a private key that artifacts can be sealed for into FILE, and the public one into FILE.pub."""
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.confidential.recipients import make_recipient_key

    click.echo(make_recipient_key(file))
