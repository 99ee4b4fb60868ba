"""`pilotlight bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pilotlight.commands.table import table

if TYPE_CHECKING:
    from pilotlight.host.bench import StepProfile


@click.command(short_help="Measure an artifact's speed, and where the time of a step goes.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--profile", is_flag=True, help="Time the stages of a decode step, and the operators of its run.")
@click.option("--rates", is_flag=True, help="Print prefill and decode rates as JSON.")
@click.option("--streams", default="1,8,32", show_default=True, help="With --profile: how many streams at a time.")
@click.option("--steps", type=click.IntRange(min=2), default=40, show_default=True, help="With --profile: steps timed.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="With --profile: 0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="With --profile.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime [default: the cores].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    artifact: Path,
    profile: bool,
    rates: bool,
    streams: str,
    steps: int,
    temperature: float,
    top_p: float,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure ARTIFACT on this machine, behind prompts of 128 random tokens."""
    from pilotlight.config import load_settings
    from pilotlight.host.bench import Bench
    from pilotlight.host.stolen import NOTABLE_SHARE
    from pilotlight.request import SamplingParams

    if profile == rates:
        raise click.UsageError("choose one of --profile and --rates")
    to_measure = Bench(artifact, threads, load_settings(None).host.cache_dir)
    if rates:
        found = to_measure.rates()
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
        if (share := found["stolen_share"]) > NOTABLE_SHARE:
            click.echo(f"The machine's hardware worked for others {share:.1%} of the time: measure again.", err=True)
        return
    profiles = to_measure.profiles(SamplingParams(temperature=temperature, top_p=top_p), _counts(streams), steps)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(profiles), indent=2))
    else:
        click.echo("\n\n".join(_text(one) for one in profiles))


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise click.UsageError(f"--streams is {text!r}; expected numbers as in 1,8,32")
    return counts


def _text(profile: StepProfile) -> str:
    head = (
        f"{profile.num_streams} streams: {profile.step_ms:.2f} ms a step, {profile.named:.1%} of it named, "
        f"{profile.python:.1%} outside the graph"
    )
    run_ms = profile.stages_ms["run"]
    rows: list[dict[str, object]] = []
    for stage, ms in sorted(profile.stages_ms.items(), key=lambda item: -item[1]):
        rows.append({"stage": stage, "ms": f"{ms:.3f}", "share": f"{ms / profile.step_ms:.1%}"})
        if stage == "run":
            for name, share in profile.run_shares.items():
                rows.append({"stage": f"  {name}", "ms": f"{share * run_ms:.3f}", "share": f"{share:.1%} of run"})
    return f"{head}\n{table(rows)}"
