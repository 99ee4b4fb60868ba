"""`pilotlight invoke`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pilotlight.config import FunctionSettings, Settings, load_settings

if TYPE_CHECKING:
    from pilotlight.metering.record import UsageRecord


@click.command(short_help="Answer one prompt on the terminal, without a server.")
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


async def _invoke(artifact: Path, settings: Settings, request: Any, quiet: bool) -> tuple[str, UsageRecord]:
    from pilotlight.host.inprocess import open_function
    from pilotlight.metering.database import located
    from pilotlight.metering.opening import open_ledger

    with open_ledger(located(settings.host.ledger), cache_dir=settings.host.cache_dir) as ledger:
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


def _summary(record: UsageRecord) -> str:
    return (
        f"{record.prompt_tokens} + {record.completion_tokens} tokens, first after {record.ttft_ms or 0:.0f} ms, "
        f"cold start {record.cold_start_ms:.0f} ms, cost {record.cost_micros} micro-{record.currency} "
        f"({record.finish_reason})"
    )
