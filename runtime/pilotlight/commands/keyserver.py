"""`pilotlight keyserver`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Give the keys of sealed artifacts for evidence.")
@click.option("--policy", type=click.Path(path_type=Path), required=True, help="Which key goes to whom: a TOML file.")
@click.option("--keys", "keys_dir", type=click.Path(path_type=Path), required=True, help="Where the keys are.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8090, show_default=True, help="Which port, 0 for any.")
@click.option("--tls-certificate", type=click.Path(path_type=Path), help="A certificate chain in PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key in PEM.")
def keyserver(
    policy: Path, keys_dir: Path, address: str, port: int, tls_certificate: Path | None, tls_key: Path | None
) -> None:
    """Serve the keys that `pilotlight seal --keys DIR` wrote, over the protocol of Trustee's key broker (0.4.0).

    A key leaves only for evidence that the policy accepts, and only encrypted for the key that this evidence holds.
    """
    from pilotlight.confidential.extra import require_extra

    require_extra()
    from pilotlight.confidential.keyserver import KeyServer
    from pilotlight.confidential.keyserver_policy import KeyPolicy
    from pilotlight.errors import ConfigError
    from pilotlight.host.serving import serve_app

    if not keys_dir.is_dir():
        raise ConfigError(f"{keys_dir}: is not a directory; `pilotlight seal --keys` makes it")
    if tls_certificate is None and tls_key is not None:
        raise click.UsageError("--tls-key needs --tls-certificate")
    server = KeyServer(KeyPolicy.read(policy), keys_dir, log=lambda line: click.echo(line, err=True))
    tls = None if tls_certificate is None else (tls_certificate, tls_key)
    serve_app(server.app(), address, port, lambda url: click.echo(f"key server {url}"), tls)
