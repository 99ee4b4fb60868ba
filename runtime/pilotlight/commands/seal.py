"""`pilotlight seal`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Encrypt an artifact for its recipients, and sign it.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--recipient",
    "recipients",
    multiple=True,
    required=True,
    help="Who gets the key: kbs:///REPOSITORY/TYPE/TAG, an ARN of AWS KMS, "
    "https://VAULT/keys/NAME/VERSION=PUBLIC_KEY.pem of Azure, or the file of an X25519 or RSA public key. "
    "Repeat it for several.",
)
@click.option("--signing-key", type=click.Path(path_type=Path), required=True, help="The publisher's private key.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The directory to make.")
@click.option("--keys", "keys_dir", type=click.Path(path_type=Path), help="Where the key for kbs:/// goes.")
@click.option("--chunk-mib", type=click.IntRange(1, 64), default=4, show_default=True, help="How long a chunk is.")
def seal(
    artifact: Path, recipients: tuple[str, ...], signing_key: Path, out: Path, keys_dir: Path | None, chunk_mib: int
) -> None:
    """Encrypt ARTIFACT under a fresh key, so that nobody but its recipients can use it.

    `pilotlight keys signing FILE` makes the publisher's key, and `pilotlight keys recipient FILE` one to seal for.
    """
    from pilotlight.artifact import open_artifact
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.confidential.aws import encrypt_at_aws
    from pilotlight.confidential.sealing import Publisher, seal
    from pilotlight.metering.signing import read_signing_key

    publisher = Publisher(read_signing_key(signing_key), recipients, keys_dir, encrypt_at_aws)
    manifest = seal(open_artifact(artifact), out, publisher, chunk_mib * 1024 * 1024)
    total_bytes = sum(file.size_bytes for file in manifest.files.values())
    click.echo(f"{out}")
    click.echo(f"  artifact    {manifest.artifact_digest}")
    click.echo(f"  sealed      {len(manifest.files)} files, {total_bytes / 1e6:,.1f} MB")
    for recipient in manifest.recipients:
        click.echo(f"  recipient   {recipient.kind} {recipient.id}")
