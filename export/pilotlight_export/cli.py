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
NUMBER = click.FloatRange(min=0)

revision_option = click.option("--revision", help="Branch, tag or commit of a model on the hub.")
pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Convert pytorch_model.bin where there are no safetensors; no code is loaded."
)
text_option = click.option("--text", type=FILE, help="Measure on this text, such as your users would write.")
max_kl_option = click.option(
    "--max-kl", type=NUMBER, help="Fail if the mean KL divergence from fp32 is larger, in nats."
)
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
        click.echo(f"verified: {artifact} against {confirmation.source}")


@main.command()
@click.argument("artifacts", nargs=-1, required=True, type=FILE)
@text_option
@click.option("--max-size-mb", type=NUMBER, help="Limit: size of all files.")
@click.option("--max-memory-mb", type=NUMBER, help="Limit: memory of a process that runs it, batch 1.")
@click.option("--max-bits-per-byte", type=NUMBER, help="Limit: loss on the text; comparable between all models.")
@click.option(
    "--max-kl", type=NUMBER, help="Limit: mean KL divergence from the model's most precise artifact, in nats."
)
@click.option("--min-top1", type=click.FloatRange(0, 1), help="Limit: agreement with that one's likeliest tokens.")
@click.option("--min-prefill-tps", type=NUMBER, help="Limit: prompt tokens a second.")
@click.option("--min-decode-tps", type=NUMBER, help="Limit: generated tokens a second, batch 1.")
@click.option("--plot", type=FILE, help="Draw size, quality and speed into this SVG file.")
@json_option
def evaluate(
    artifacts: tuple[Path, ...], text: Path | None, plot: Path | None, as_json: bool, **bounds: float | None
) -> None:
    """Compare ARTIFACTS of one model or of several, and name the smallest that meets all limits.

    KL and top-1 compare each artifact with the most precise one of its model that is named. Exit status 1 if there are
    limits and no artifact meets them all.
    """
    if plot is not None and plot.suffix != ".svg":
        raise click.BadParameter("only .svg files can be drawn", param_hint="--plot")
    with _one_line_failures("evaluate", "interrupted"):
        from pilotlight_export.evaluate.budget import judge, limits_of
        from pilotlight_export.evaluate.evaluation import evaluate_artifacts, write_plot
        from pilotlight_export.evaluate.table import table, verdict_lines

        limits = limits_of(bounds)
        rows = evaluate_artifacts(artifacts, text)
        verdict = judge(rows, limits) if limits else None
        if plot is not None:
            write_plot(rows, plot)
    if as_json:
        found = {"artifacts": [asdict(row) for row in rows], "verdict": verdict and asdict(verdict)}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n\n".join([table(rows), *([verdict_lines(verdict)] if verdict else [])]))
    if verdict is not None and verdict.chosen is None:
        sys.exit(1)


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
