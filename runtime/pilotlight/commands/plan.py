"""`pilotlight plan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pilotlight.commands.table import table
from pilotlight.config import FunctionSettings, load_settings
from pilotlight.errors import ConfigError

if TYPE_CHECKING:
    from pilotlight.plan.compare import Comparison
    from pilotlight.plan.result import Result
    from pilotlight.plan.trace import Scaling

PLACES = ("own", "machines", "spot", "mixed", "lambda", "modal")
WARMTHS = ("cold", "light", "warm")
SERIES = ("num_queued", "num_running", "num_replicas", "memory_bytes", "kv_used_bytes")
NUM_SHOWN = 12


def _cuts(command: Any) -> Any:
    """Add the options that cut and scale a trace."""
    for option in (
        click.option("--repeat", type=click.IntRange(min=1), default=1, help="Put the trace so often in a row."),
        click.option("--max-new", type=click.IntRange(min=1), help="Cut longer answers to so many tokens."),
        click.option("--answer-scale", type=click.FloatRange(0, min_open=True), default=1.0, help="Scale answers."),
        click.option("--prompt-scale", type=click.FloatRange(0, min_open=True), default=1.0, help="Scale prompts."),
        click.option("--speed-up", type=click.FloatRange(0, min_open=True), default=1.0, help="Let it pass faster."),
        click.option("--requests", type=click.IntRange(min=1), help="Take so many requests."),
        click.option("--duration", type=click.FloatRange(0, min_open=True), help="Take so many seconds of the trace."),
        click.option("--from", "from_s", type=click.FloatRange(0), default=0.0, help="Begin so many seconds in."),
    ):
        command = option(command)
    return command


def _limits(command: Any) -> Any:
    """Add the options that say what the user can live with."""
    for option in (
        click.option("--max-unserved", type=click.FloatRange(0, 1), default=0.01, show_default=True,
                     help="Share of requests without an answer."),
        click.option("--max-cold-starts", type=click.IntRange(min=0), help="Replica starts on demand."),
        click.option("--max-cost", type=click.FloatRange(0), help="Cost of the whole trace."),
        *(click.option(f"--max-ttft-{share}", f"max_{share}", type=click.FloatRange(0),
                       help=f"Seconds to the first token, {share}.") for share in ("p99", "p95", "p50")),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(short_help="Say what a trace would cost on different machines.")
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="Requests over time, CSV or JSON lines.")
@click.option(
    "--rates", type=click.Path(path_type=Path), required=True, help="From `pilotlight bench ARTIFACT --rates`."
)
@click.option("--config", type=click.Path(path_type=Path), help="A pilotlight.toml with the function's settings.")
@click.option("--function", "name", help="Which of its functions [default: the only one].")
@click.option("--prices", type=click.Path(path_type=Path), help="Prices and assumptions of your own (TOML).")
@click.option("--place", "places", type=click.Choice(PLACES), multiple=True, help="Only these places.")
@click.option("--warmth", "warmths", type=click.Choice(WARMTHS), multiple=True, help="Only these ways to sleep.")
@click.option("--max-replicas", type=click.IntRange(1, 256), help="Instead of the configuration's.")
@_cuts
@_limits
@click.option("--seed", type=int, default=0, show_default=True, help="Of interruptions and of the host's clock.")
@click.option("--processes", type=click.IntRange(min=1), help="Plans simulated at a time [default: the cores].")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture (SVG).")
@click.option("--series", "shows_series", is_flag=True, help="Print the cheapest plan's fleet over time, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, series included.")
def plan(
    trace: Path,
    rates: Path,
    config: Path | None,
    name: str | None,
    prices: Path | None,
    places: tuple[str, ...],
    warmths: tuple[str, ...],
    max_replicas: int | None,
    from_s: float,
    duration: float | None,
    requests: int | None,
    speed_up: float,
    prompt_scale: float,
    answer_scale: float,
    max_new: int | None,
    repeat: int,
    max_p50: float | None,
    max_p95: float | None,
    max_p99: float | None,
    max_cost: float | None,
    max_cold_starts: int | None,
    max_unserved: float,
    seed: int,
    processes: int | None,
    plot: Path | None,
    shows_series: bool,
    as_json: bool,
) -> None:
    """Simulate a trace on the host's own scheduler and autoscaler, for each place and each way to sleep, and name the
    cheapest plan within the limits. docs/planning.md says what is modelled and what is not.
    """
    from pilotlight.host.rates import read_rates
    from pilotlight.host.sizing import num_cores
    from pilotlight.plan.compare import compare
    from pilotlight.plan.drawing import draw
    from pilotlight.plan.plans import Place, Warmth, plans
    from pilotlight.plan.prices import read_prices
    from pilotlight.plan.result import Limits
    from pilotlight.plan.simulate import Conditions, context_of
    from pilotlight.plan.trace import Scaling, read_trace

    settings, memory_budget_mb = _settings(config, name)
    if max_replicas is not None:
        settings = msgspec.structs.replace(settings, max_replicas=max_replicas)
    conditions = Conditions(settings, read_rates(rates), read_prices(prices), seed=seed)
    if memory_budget_mb:
        conditions = conditions.with_memory(memory_budget_mb * 1_000_000)
    context = context_of(settings, conditions.rates.artifact)
    scaling = Scaling(from_s, duration, requests, speed_up, prompt_scale, answer_scale, context, max_new, repeat)
    arrivals = read_trace(trace, scaling)
    limits = Limits(max_p50, max_p95, max_p99, max_cost, max_cold_starts, max_unserved)
    chosen = plans(frozenset(map(Place, places or PLACES)), frozenset(map(Warmth, warmths or WARMTHS)))
    if not chosen:
        raise click.UsageError("no such plan: only own machines can sleep lightly")
    comparison = compare(chosen, arrivals, conditions, limits, processes or num_cores())
    if plot is not None:
        _write(plot, draw(comparison))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(comparison), indent=1))
        return
    click.echo(_head(trace, scaling, len(arrivals), arrivals[-1].at_s))
    click.echo(_text(comparison, shows_series))


def _settings(config: Path | None, name: str | None) -> tuple[FunctionSettings, int]:
    """Return a function's settings, and the host's memory budget."""
    if config is None:
        return FunctionSettings("", max_replicas=8), 0
    environment = {key: value for key, value in os.environ.items() if key != "PORT"}
    settings = load_settings(config, environment)
    if name is None and len(settings.functions) == 1:
        name = next(iter(settings.functions))
    if name not in settings.functions:
        known = ", ".join(settings.functions)
        raise ConfigError(f"{config}: choose a function with --function; there are: {known or 'none'}")
    return settings.functions[name], settings.host.memory_budget_mb


def _head(trace: Path, scaling: Scaling, num_requests: int, duration_s: float) -> str:
    scales = {"prompts": scaling.prompt_scale, "answers": scaling.answer_scale, "speed": scaling.speed_up}
    scaled = [f"{label} × {value:g}" for label, value in scales.items() if value != 1]
    return (
        f"{trace.name}: {num_requests:,} requests in {duration_s / 3600:.2f} h{''.join(f', {one}' for one in scaled)}\n"
    )


def _text(comparison: Comparison, shows_series: bool) -> str:
    parts = [table([_row(result, comparison) for result in comparison.results])]
    parts += [_savings(result) for result in comparison.results if result.spot is not None]
    best = next((result for result in comparison.results if result.plan == comparison.cheapest), None)
    if best is None:
        parts.append("No plan keeps the limits.")
    else:
        parts.append(f"The cheapest plan that keeps the limits: {best.plan}, at {best.cost:.4f} USD")
        if shows_series:
            parts.append(table(_series(best)))
    return "\n\n".join(parts)


def _row(result: Result, comparison: Comparison) -> dict[str, object]:
    return {
        "plan": result.plan,
        "cost": f"{result.cost:.4f}",
        "per_hour": f"{result.cost_per_hour:.4f}",
        "served": result.num_served,
        "unserved": result.num_requests - result.num_served,
        "cold_starts": result.num_cold_starts,
        "waited": result.num_waited_for_start,
        **{f"ttft_{p}": _seconds(getattr(result, f"ttft_{p}_s")) for p in ("p50", "p95", "p99")},
        "queue": f"{result.mean_queued:.1f}/{result.max_queued}",
        "slots": f"{result.mean_slots_used:.1f}",
        "replicas": result.max_replicas,
        "memory_mb": f"{result.max_memory_bytes / 1e6:,.0f}",
        "breaks": ", ".join(comparison.broken[result.plan]) or None,
    }


def _savings(result: Result) -> str:
    spot = result.spot
    assert spot is not None
    head = f"{result.plan}: {spot.num_interruptions} interruptions, {spot.availability:.1%} of the time on spot"
    if spot.saving is None or spot.saving_by_formula is None or spot.over_provisioning is None:
        return head
    a, d, o = spot.availability, spot.discount, spot.over_provisioning
    return (
        f"{head}; saves {spot.saving:.1%} of the same plan on demand "
        f"(1 - ({a:.3f} × (1 - {d:.3f}) × (1 + {o:.3f}) + (1 - {a:.3f})) = {spot.saving_by_formula:.1%})"
    )


def _series(result: Result) -> list[dict[str, object]]:
    times = result.series["at_s"]
    every = max(1, len(times) // NUM_SHOWN)
    return [
        {"at_s": f"{times[index]:.0f}", **{name: f"{result.series[name][index]:,.0f}" for name in SERIES}}
        for index in range(0, len(times), every)
    ]


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
