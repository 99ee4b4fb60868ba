"""`pilotlight inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pilotlight.artifact import Artifact


@click.command(short_help="Describe an artifact and verify its checksums.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("--publisher", type=click.Path(path_type=Path), help="Of a sealed artifact: whose signature counts.")
def inspect(artifact: Path, as_json: bool, publisher: Path | None) -> None:
    """Describe ARTIFACT and verify every checksum in it. No key is needed for a sealed one."""
    from pilotlight.artifact import SEALED_MANIFEST, open_artifact

    if (artifact / SEALED_MANIFEST).exists():
        _inspect_sealed(artifact, as_json, publisher)
        return
    opened = open_artifact(artifact)
    opened.verify()
    if as_json:
        click.echo(opened.manifest.encode().decode(), nl=False)
    else:
        click.echo(_description(opened))


def _inspect_sealed(path: Path, as_json: bool, publisher: Path | None) -> None:
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.confidential.sealed_contents import verify_chunks
    from pilotlight.confidential.sealed_manifest import decode_sealed_manifest, read_raw, read_signed
    from pilotlight.metering.signing import read_verifying_key

    raw = read_raw(path) if publisher is None else read_signed(path, read_verifying_key(publisher))
    sealed = decode_sealed_manifest(raw, path)
    verify_chunks(path, sealed)
    if as_json:
        click.echo(raw.decode(), nl=False)
        return
    total_bytes = sum(file.size_bytes for file in sealed.files.values())
    lines = [
        ("sealed artifact", sealed.artifact_digest),
        *((f"recipient {recipient.kind}", recipient.id) for recipient in sealed.recipients),
        *(
            (f"  {name}", f"{file.size_bytes:>13,} bytes  {len(file.chunks):,} chunks")
            for name, file in sealed.files.items()
        ),
        ("signature", "not verified: name the --publisher" if publisher is None else f"verified with {publisher}"),
        ("checksums", f"all {len(sealed.files)} files verified, {total_bytes / 1e6:,.1f} MB"),
    ]
    click.echo("\n".join(f"{name:<24} {text}" for name, text in lines))


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
        *_listed("verification", manifest.verification),
        *_listed("tools", manifest.tools),
        *((f"  {name}", f"{file.size_bytes:>13,} bytes  {file.sha256[:16]}…") for name, file in manifest.files.items()),
        ("checksums", f"all {len(manifest.files)} files verified, {total_bytes / 1e6:,.1f} MB"),
    ]  # fmt: skip
    return "\n".join(f"{name:<24} {text}" for name, text in lines if text)


def _listed(head: str, values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield one line each, the first of them behind ``head``."""
    for number, (key, value) in enumerate(values.items()):
        yield head if number == 0 else "", _pairs({key: value})


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )
