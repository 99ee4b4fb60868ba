"""`pilotlight serve`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pilotlight.config import FUNCTION_NAME, FunctionSettings, Settings, load_settings
from pilotlight.errors import ConfigError

if TYPE_CHECKING:
    from pilotlight.function import Function


@click.command(short_help="Serve functions over the OpenAI API.")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--config", type=click.Path(path_type=Path), help="Serve the functions of this pilotlight.toml instead.")
@click.option("--name", help="What clients call the function [default: the artifact's directory name].")
@click.option("--address", help="Where to listen [default: 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65535), help="Which port, 0 for any free one [default: 8080, or $PORT].")
@click.option(
    "--slots", type=click.IntRange(min=1), help="How many requests are generated at the same time [default: 8]."
)
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
def serve(
    artifact: Path | None,
    config: Path | None,
    name: str | None,
    address: str | None,
    port: int | None,
    slots: int | None,
    ledger: str | None,
) -> None:
    """Serve ARTIFACT, or all functions of a pilotlight.toml, over the OpenAI API."""
    if (artifact is None) == (config is None):
        raise click.UsageError("name either an ARTIFACT or a --config file")
    if config is not None and (name is not None or slots is not None):
        raise click.UsageError("--name and --slots go with an ARTIFACT; a --config file has its own")
    settings = load_settings(config, address=address, port=port, ledger=ledger)
    if artifact is not None:
        of_function = FunctionSettings(artifact=str(artifact))
        if slots is not None:
            of_function = msgspec.structs.replace(of_function, num_slots=slots)
        settings = Settings(settings.host, {_function_name(name, artifact): of_function})
    if not settings.functions:
        raise ConfigError(f"{config}: defines no function; add a table [functions.NAME]")
    from pilotlight.host.server import run

    run(settings, lambda url, running: _announce(url, settings, running))


def _function_name(name: str | None, artifact: Path) -> str:
    found = artifact.resolve().name if name is None else name
    if not re.fullmatch(FUNCTION_NAME, found):
        raise click.UsageError(
            f"{found!r} cannot be the name of a function; choose a --name of letters, digits and . _ / -, 128 at most"
        )
    return found


def _announce(url: str, settings: Settings, functions: Mapping[str, Function]) -> None:
    from pilotlight.metering.database import shown

    for name, function in functions.items():
        manifest = function.artifact.manifest
        click.echo(
            f"{name}: {manifest.precision}, {manifest.num_parameters / 1e6:,.1f} M parameters, "
            f"context {function.max_context_tokens:,}, {settings.functions[name].num_slots} slots, "
            f"starts when it is called"
        )
    click.echo(f"serving {url}/v1   usage ledger {shown(settings.host.ledger)}")
    sys.stdout.flush()
