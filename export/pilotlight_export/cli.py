"""The command line of the export; ``pilotlight export``, ``verify`` and ``evaluate`` hand over to it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import click

from pilotlight.errors import PilotlightError
from pilotlight_export.recipes import PRECISIONS

FILE = click.Path(path_type=Path)
NATS = click.FloatRange(min=0)

revision_option = click.option("--revision", help="Branch, tag or commit of a model on the hub.")
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Convert pytorch_model.bin where there are no safetensors; no code is loaded."
)
text_option = click.option("--text", type=FILE, help="Measure on this text, such as your users would write.")
max_kl_option = click.option("--max-kl", type=NATS, help="Fail if the mean KL divergence from fp32 is larger, in nats.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(name="pilotlight", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Make artifacts of models, verify them again, and compare them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@main.command()
@click.argument("model")
@click.option("--precision", type=click.Choice(PRECISIONS), default="int4", show_default=True, help="Of the weights.")
@click.option("--recipe", help="How the precision is reached; docs/quantization.md compares them.")
@click.option("--out", type=FILE, help="Directory of the artifact.  [default: artifacts/NAME-PRECISION]")
@revision_option
@pickle_option
@text_option
@max_kl_option
def export(
    model: str,
    precision: str,
    recipe: str | None,
    out: Path | None,
    revision: str | None,
    allow_pickle: bool,
    text: Path | None,
    max_kl: float | None,
) -> None:
    """Export MODEL, a Hugging Face hub id or a directory, into a verified artifact.

    An artifact that exists at the target already is replaced once the new one is complete.
    """
    target = out or default_target(model, precision)
    with _one_line_failures("export", "interrupted; nothing was written"):
        from pilotlight_export.export import export_model

        export_model(
            model,
            target,
            precision=precision,
            recipe_name=recipe,
            revision=revision,
            allow_pickle=allow_pickle,
            text_path=text,
            max_kl=max_kl,
        )
    click.echo(target)


@main.command()
@click.argument("artifact", type=FILE)
@click.option("--source", required=True, help="The model that it was made of: a hub id or a directory.")
@revision_option
@pickle_option
@text_option
@max_kl_option
@json_option
def verify(
    artifact: Path,
    source: str,
    revision: str | None,
    allow_pickle: bool,
    text: Path | None,
    max_kl: float | None,
    as_json: bool,
) -> None:
    """Verify ARTIFACT against its source again: checksums, parity with PyTorch, fidelity.

    A source on the hub is taken at the commit that the artifact names, unless there is a --revision.
    """
    with _one_line_failures("verify", "interrupted"):
        from pilotlight_export.reverify import verify_artifact

        confirmation = verify_artifact(
            artifact, source, revision=revision, allow_pickle=allow_pickle, text_path=text, max_kl=max_kl
        )
    if as_json:
        click.echo(json.dumps(asdict(confirmation), indent=2))
    else:
        for name, value in confirmation.figures.items():
            click.echo(f"{name:<36} {value}")
        click.echo(f"{artifact} is what {confirmation.source} says")


@contextmanager
def _one_line_failures(command: str, interrupted: str) -> Iterator[None]:
    try:
        yield
    except PilotlightError as error:
        _fail(command, error.message)
    except ModuleNotFoundError as error:
        needed = f"{error.name} is not installed; the export needs more than the runtime"
        _fail(command, f"{needed}: pip install 'pilotlight[export]'")
    except KeyboardInterrupt:
        _fail(command, interrupted)


def _fail(command: str, line: str) -> NoReturn:
    click.echo(f"pilotlight {command}: {line}", err=True)
    sys.exit(1)


def default_target(model: str, precision: str) -> Path:
    """Return where an artifact goes if nobody says otherwise, named after the model's last part."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return Path("artifacts") / f"{name}-{precision}"
