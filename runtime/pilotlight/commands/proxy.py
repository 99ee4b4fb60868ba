"""`pilotlight proxy`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Encrypt a client's prompts for a server that proves itself.")
@click.argument("url")
@click.option("--policy", type=click.Path(path_type=Path), required=True, help="What the server has to prove: TOML.")
@click.option("--model", help="Have the server prove this function before the first request, too.")
@click.option("--receipts", type=click.Path(path_type=Path), help="Demand a receipt of each answer and keep it here.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="Which port, 0 for any.")
def proxy(url: str, policy: Path, model: str | None, receipts: Path | None, address: str, port: int) -> None:
    """Serve the OpenAI API on this machine, and forward what comes, encrypted, to the server at URL.

    Nothing is sent to it before its evidence has met the policy, and nothing comes back that is not complete.
    """
    from pilotlight.confidential.extra import require_extra

    require_extra()
    import asyncio

    from pilotlight.confidential.proxy import Proxy
    from pilotlight.confidential.remote import RemotePolicy
    from pilotlight.host.serving import serve_app

    read = RemotePolicy.read(policy)
    if model is not None:
        proven = asyncio.run(Proxy(url, read).prove(model))
        click.echo(f"{model}: {proven.artifact_digest}, {proven.appraisal.label}")
    serve_app(Proxy(url, read, receipts).app(), address, port, lambda own: click.echo(f"forwarding {own}/v1 to {url}"))
