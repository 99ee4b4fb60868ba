"""`pilotlight inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pilotlight.artifact import Artifact


@click.command(short_help="Describe an artifact and verify its checksums.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(artifact: Path, as_json: bool) -> None:
    """Describe ARTIFACT and verify every checksum in it."""
    from pilotlight.artifact import open_artifact

    opened = open_artifact(artifact)
    opened.verify()
    if as_json:
        click.echo(opened.manifest.encode().decode(), nl=False)
    else:
        click.echo(_description(opened))


def _description(artifact: Artifact) -> str:
    manifest = artifact.manifest
    shapes = manifest.shapes
    total_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    lines = [
        ("artifact", artifact.digest),
        ("source", f"{manifest.source.model}" + (f" @ {manifest.source.revision}" if manifest.source.revision else "")),
        ("license", manifest.source.license or "unknown"),
        ("family", f"{manifest.family}, {manifest.num_parameters:,} parameters"),
        ("precision", manifest.precision + (f" ({_pairs(manifest.recipe)})" if manifest.recipe else "")),
        ("shapes", f"{shapes.num_layers} layers, {shapes.num_heads} heads of {shapes.head_size} "
                   f"({shapes.num_kv_heads} for keys and values), vocabulary {shapes.vocab_size:,}"),
        ("context", f"{shapes.max_context_tokens:,} tokens"),
        ("verification", _pairs(manifest.verification)),
        ("tools", _pairs(manifest.tools)),
        *((f"  {name}", f"{file.size_bytes:>13,} bytes  {file.sha256[:16]}…") for name, file in manifest.files.items()),
        ("checksums", f"all {len(manifest.files)} files verified, {total_bytes / 1e6:,.1f} MB"),
    ]  # fmt: skip
    return "\n".join(f"{name:<24} {text}" for name, text in lines if text)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
