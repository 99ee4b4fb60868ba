"""The command line. Exit status 0: done, 1: failed, with one line on standard error, 2: wrong usage."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pilotlight import __version__
from pilotlight.config import FUNCTION_NAME, FunctionSettings, Settings, load_settings
from pilotlight.errors import ConfigError, PilotlightError

if TYPE_CHECKING:
    from pilotlight.artifact import Artifact
    from pilotlight.function import Function
    from pilotlight.metering.record import UsageRecord

# Commands import what they need themselves: `--help` and `inspect` should not pay for a model runtime.


class _Commands(click.Group):
    """Lists commands in the order they are defined in, and turns our own errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PilotlightError as error:
            click.echo(f"pilotlight: {error.message}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pilotlight")
def main() -> None:
    """A function runtime for language models.

    Turn a Hugging Face model into a small verified artifact with `export`, look at it with `inspect`, try it with
    `invoke`, serve it over the OpenAI API with `serve`, and see what was used with `usage`.
    """


@main.command(short_help="Serve functions over the OpenAI API.")
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


@main.command(short_help="Answer one prompt on the terminal, without a server.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it stands instead of answering it as a chat message.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after so many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy [default: the model's own].")
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="Draw the same tokens again.")
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the text and the usage record.")
def invoke(
    artifact: Path,
    prompt: str,
    raw: bool,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    ledger: str | None,
    as_json: bool,
) -> None:
    """Answer one PROMPT ("-" reads it from standard input) on the terminal, without a server."""
    from pilotlight.function import Request

    settings = load_settings(None, ledger=ledger)
    text = sys.stdin.read() if prompt == "-" else prompt
    given = {"temperature": temperature, "seed": seed}
    request = Request(
        id=f"req-{os.urandom(12).hex()}",
        messages=None if raw else [{"role": "user", "content": text}],
        text=text if raw else None,
        max_new_tokens=max_tokens,
        sampling={key: value for key, value in given.items() if value is not None},
    )
    answer, record = asyncio.run(_invoke(artifact.resolve(), settings, request, quiet=as_json))
    if as_json:
        click.echo(msgspec.json.encode({"text": answer, "usage": record}))
    else:
        click.echo()
        click.echo(_summary(record), err=True)


_handed_over: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}


@main.command(short_help="Turn a Hugging Face model into an artifact.", context_settings=_handed_over)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def export(arguments: tuple[str, ...]) -> None:
    """Turn a Hugging Face model into an artifact (needs the extra `pilotlight[export]`)."""
    _run_exporter("export", arguments)


@main.command(short_help="Compare an artifact with its source again.", context_settings=_handed_over)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(arguments: tuple[str, ...]) -> None:
    """Compare an artifact with the model that it was made of again (needs the extra `pilotlight[export]`)."""
    _run_exporter("verify", arguments)


@main.command(short_help="Find the smallest artifact that is good enough.", context_settings=_handed_over)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def evaluate(arguments: tuple[str, ...]) -> None:
    """Compare artifacts by size, speed, memory and quality (needs the extra `pilotlight[export]`)."""
    _run_exporter("evaluate", arguments)


def _run_exporter(command: str, arguments: tuple[str, ...]) -> None:
    # The exporter is another program: the runtime never imports it, nor torch.
    if importlib.util.find_spec("optimum") is None:
        raise ConfigError(
            f"{command} needs more than a runtime does; install it with: pip install 'pilotlight[export]'"
        )
    # With -P, files in the current directory don't stand in for its modules.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "pilotlight_export", command, *arguments])  # noqa: S606


@main.command(short_help="Describe an artifact and verify its checksums.")
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


@main.command(short_help="Show what was used and what it cost.")
@click.option("--records", is_flag=True, help="List the records, the latest first, instead of totals.")
@click.option("--function", help="Only the records of this function.")
@click.option("--since", help="Only what started in the last so many hours, such as 24h, or days, such as 7d.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many records.")
@click.option("--ledger", help="The usage ledger [default: pilotlight.db].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def usage(
    records: bool, function: str | None, since: str | None, limit: int | None, ledger: str | None, as_json: bool
) -> None:
    """Show what was used and what it cost, also while a server is running."""
    from pilotlight.metering.ledger_reader import LedgerReader

    if not records and (function is not None or limit is not None):
        raise click.UsageError("--function and --limit go with --records")
    start = None if since is None else _start(since)
    with LedgerReader(Path(load_settings(None, ledger=ledger).host.ledger)) as reader:
        rows = [*reader.records(function, start, limit)] if records else [*reader.totals(start)]
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row))
    elif rows:
        click.echo(_table([_row(row) for row in rows]))
    else:
        click.echo("nothing was used yet", err=True)


def _function_name(name: str | None, artifact: Path) -> str:
    found = artifact.resolve().name if name is None else name
    if not re.fullmatch(FUNCTION_NAME, found):
        raise click.UsageError(
            f"{found!r} cannot be the name of a function; choose a --name of letters, digits and . _ / -, 128 at most"
        )
    return found


def _announce(url: str, settings: Settings, functions: Mapping[str, Function]) -> None:
    for name, function in functions.items():
        manifest = function.artifact.manifest
        click.echo(
            f"{name}: {manifest.precision}, {manifest.num_parameters / 1e6:,.1f} M parameters, "
            f"context {function.max_context_tokens:,}, {settings.functions[name].num_slots} slots, "
            f"ready in {function.cold_start_ms:,.0f} ms"
        )
    click.echo(f"serving {url}/v1   usage ledger {settings.host.ledger}")
    sys.stdout.flush()


async def _invoke(artifact: Path, settings: Settings, request: Any, quiet: bool) -> tuple[str, UsageRecord]:
    from pilotlight.host.inprocess import open_function
    from pilotlight.metering.ledger import Ledger

    with Ledger(Path(settings.host.ledger)) as ledger:
        of_function = FunctionSettings(artifact=str(artifact), num_slots=1)
        function = open_function(artifact.name, of_function, settings.host, ledger)
        try:
            invocation = await function.invoke(request)
            pieces = []
            async for delta in invocation:
                pieces.append(delta.text)
                if not quiet:
                    click.echo(delta.text, nl=False)
        finally:
            await function.close()
    assert invocation.record is not None
    return "".join(pieces), invocation.record


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


def _summary(record: UsageRecord) -> str:
    return (
        f"{record.prompt_tokens} + {record.completion_tokens} tokens, first after {record.ttft_ms or 0:.0f} ms, "
        f"cold start {record.cold_start_ms:.0f} ms, cost {record.cost_micros} micro-{record.currency} "
        f"({record.finish_reason})"
    )


def _row(row: msgspec.Struct) -> dict[str, object]:
    columns = ("started_at_utc", "request_id", "function", "num_invocations", "prompt_tokens", "completion_tokens",
               "ttft_ms", "total_ms", "finish_reason", "cost_micros", "currency")  # fmt: skip
    fields = msgspec.structs.asdict(row)
    return {name: fields[name] for name in columns if name in fields}


def _table(rows: list[dict[str, object]]) -> str:
    lines = [list(rows[0]), *(["" if value is None else str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _start(since: str) -> datetime:
    """Return the instant that lies so long ago."""
    match = re.fullmatch(r"([0-9]{1,6})([hd])", since)
    if match is None:
        raise click.BadParameter(f"{since!r} is not a span such as 24h or 7d", param_hint="--since")
    hours = int(match[1]) * (24 if match[2] == "d" else 1)
    try:
        return datetime.now(UTC) - timedelta(hours=hours)
    except OverflowError as error:
        raise click.BadParameter(f"{since!r} is too long ago", param_hint="--since") from error
