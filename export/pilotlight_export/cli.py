"""The command line of the export; ``pilotlight export`` hands over to it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from pilotlight.errors import PilotlightError
from pilotlight_export.recipes import PRECISIONS


@click.command(name="pilotlight export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--precision", type=click.Choice(PRECISIONS), default="int4", show_default=True, help="Of the weights.")
@click.option("--recipe", help="How the precision is reached; docs/quantization.md compares them.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory of the artifact.  [default: artifacts/NAME-PRECISION]",
)
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
def main(model: str, precision: str, recipe: str | None, out: Path | None, revision: str | None) -> None:
    """Export MODEL, a Hugging Face hub id or a directory, into a verified artifact.

    An artifact that exists at the target already is replaced once the new one is complete.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    target = out or default_target(model, precision)
    try:
        from pilotlight_export.export import export_model

        export_model(model, target, precision=precision, recipe_name=recipe, revision=revision)
    except PilotlightError as error:
        fail(error.message)
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; the export needs more than the runtime: pip install 'pilotlight[export]'")
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
    click.echo(target)


def fail(line: str) -> NoReturn:
    """Say in one line why there is no artifact, and exit with status 1."""
    click.echo(f"pilotlight export: {line}", err=True)
    sys.exit(1)


def default_target(model: str, precision: str) -> Path:
    """Return where an artifact goes if nobody says otherwise, named after the model's last part."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return Path("artifacts") / f"{name}-{precision}"
