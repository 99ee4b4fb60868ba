"""`pilotlight receipt`."""

from __future__ import annotations

from pathlib import Path

import click

_file = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group(short_help="Verify receipts of invocations, offline.")
def receipt() -> None:
    """Verify receipts of invocations, without the server that issued them."""


@receipt.command()
@click.argument("file", type=_file)
@click.option("--policy", type=_file, help="What the receipt's own evidence has to prove: TOML, as for the proxy.")
@click.option("--public-key", type=_file, help="The receipt key, in PEM, where you have it from elsewhere.")
@click.option("--request", type=_file, help="The body that was sent: the receipt has to be of this one.")
@click.option("--response", type=_file, help="The body that came back.")
@click.option("--json", "as_json", is_flag=True, help="Print what is signed as JSON.")
def verify(
    file: Path,
    policy: Path | None,
    public_key: Path | None,
    request: Path | None,
    response: Path | None,
    as_json: bool,
) -> None:
    """Verify the receipt in FILE, by its own evidence (--policy) or by a key (--public-key)."""
    if (policy is None) == (public_key is None):
        raise click.UsageError("name either a --policy or a --public-key")
    if (request is None) != (response is None):
        raise click.UsageError("--request and --response go together")
    from pilotlight.confidential.extra import require_extra

    require_extra()
    import msgspec

    from pilotlight.confidential.receipts import Exchange, verify_by_evidence, verify_receipt
    from pilotlight.confidential.remote import RemotePolicy
    from pilotlight.metering.signing import read_verifying_key

    exchange = None
    if request is not None and response is not None:
        exchange = Exchange.of(_content(request))
        exchange.received(_content(response))
    if policy is not None:
        profile, _ = verify_by_evidence(_content(file), RemotePolicy.read(policy), exchange)
    else:
        assert public_key is not None
        profile = verify_receipt(_content(file), read_verifying_key(public_key), exchange)
    if as_json:
        click.echo(msgspec.json.encode(profile).decode())
        return
    record = profile.record
    lines = [
        ("request", record.request_id),
        ("function", record.function),
        ("artifact", record.artifact_digest),
        ("label", f"{profile.tee}" + ("" if policy is not None else ", by the signer's own word")),
        ("tokens", f"{record.prompt_tokens} + {record.completion_tokens}"),
        ("cost", f"{record.cost_micros} micro-{record.currency}"),
        ("request sha256", profile.request_sha256),
        ("response sha256", profile.response_sha256),
    ]
    click.echo("\n".join(f"{name:<16} {text}" for name, text in lines))


def _content(path: Path) -> bytes:
    from pilotlight.errors import ConfigError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
