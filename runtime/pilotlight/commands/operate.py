"""`pilotlight ps` and `pilotlight swap`: what a running server does, and with which artifacts."""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from typing import Any

import click
import msgspec

from pilotlight.commands.table import table
from pilotlight.config import load_settings
from pilotlight.errors import PilotlightError

TIMEOUT_S = 4000

STAGES = ("fork", "map", "unseal", "session", "warm_up")


def _server(command: Any) -> Any:
    """Add the options that say which server is meant."""
    for option in (
        click.option("--config", type=click.Path(path_type=Path), help="The pilotlight.toml of the server."),
        click.option("--address", help="Where the server listens [default: 127.0.0.1]."),
        click.option("--port", type=click.IntRange(1, 65535), help="Its port [default: 8080, or $PORT]."),
    ):
        command = option(command)
    return command


@click.command(short_help="Show the functions of a running server.")
@_server
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ps(config: Path | None, address: str | None, port: int | None, as_json: bool) -> None:
    """Show functions, versions, replicas, their state, slots, queue, memory and idle countdown. Wakes nothing.

    An admin key is taken from $PILOTLIGHT_API_KEY.
    """
    answer = _ask(config, address, port, "GET", "/admin/functions", None)
    if as_json:
        click.echo(answer)
        return
    click.echo(table([row for function in msgspec.json.decode(answer)["functions"] for row in _rows(function)]))


@click.command(short_help="Serve another artifact under a function's name.")
@click.argument("name")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--canary", help="Give it only this share of the requests, such as 10%.")
@_server
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def swap(
    name: str,
    artifact: Path,
    canary: str | None,
    config: Path | None,
    address: str | None,
    port: int | None,
    as_json: bool,
) -> None:
    """Have ARTIFACT serve the function NAME of a running server. No request fails; if the swap does, nothing changes.

    An admin key is taken from $PILOTLIGHT_API_KEY.
    """
    body = {"artifact": str(artifact.resolve()), "canary_percent": None if canary is None else _percent(canary)}
    answer = _ask(config, address, port, "POST", f"/admin/functions/{name}/swap", msgspec.json.encode(body))
    if as_json:
        click.echo(answer)
        return
    report = msgspec.json.decode(answer)
    click.echo(
        f"{name}: {report['digest'][7:19]} is {report['role']} after {report['ready_ms']:,.0f} ms, "
        f"{report['num_probe_tokens']} tokens probed (before: {report['previous_digest'][7:19]})"
    )


def _percent(text: str) -> float:
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a share such as 10%", param_hint="--canary") from error


def _ask(config: Path | None, address: str | None, port: int | None, method: str, path: str, body: bytes | None) -> str:
    host = load_settings(config, address=address, port=port).host
    headers = {"content-type": "application/json"}
    if key := os.environ.get("PILOTLIGHT_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(host.address, host.port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read().decode()
    except OSError as error:
        raise PilotlightError(
            f"no server answers at {host.address}:{host.port} ({error.strerror or error}); "
            "start one with `pilotlight serve`, or name its --address and --port"
        ) from error
    finally:
        connection.close()
    if response.status != 200:
        raise PilotlightError(msgspec.json.decode(answer)["error"]["message"])
    return answer


def _rows(function: dict[str, Any]) -> list[dict[str, object]]:
    rows = []
    for version in function["versions"]:
        common = {"function": function["name"], "version": version["digest"][7:19], "role": version["role"]}
        queue = {"queued": version["num_queued"], "sleeps_in_s": version["sleeps_in_s"]}
        for replica in version["replicas"]:
            rows.append({
                **common, "replica": replica["id"], "state": replica["state"],
                "slots": f"{replica['num_running']}/{replica['num_slots']}", **queue,
                "memory_mb": _mb(replica["memory_bytes"]), "private_mb": _mb(replica["private_bytes"]),
                "start_ms": round(sum(replica[f"{stage}_ms"] for stage in STAGES)),
            })  # fmt: skip
        if not version["replicas"]:
            state = version["failure"] or f"{version['sleep']} sleep"
            rows.append({
                **common, "replica": None, "state": state, "slots": None, **queue, "memory_mb": None,
                "private_mb": None, "start_ms": None,
            })  # fmt: skip
    return rows


def _mb(num_bytes: int | None) -> str | None:
    return None if num_bytes is None else f"{num_bytes / 1e6:,.0f}"
