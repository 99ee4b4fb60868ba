"""What `make gpu-check` found, as JSON and as a Markdown report, and what of it was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_measure import Figures, copies_the_cache
from gpu_parity import Parity

MANY_STREAMS, LEAST_GAIN, GAIN_SHAPE = 64, 20.0, "qwen2.5-0.5b"
"""Decode of so many streams has to be so many times that of one, for this shape."""


@dataclass
class Checked:
    """One artifact's results; ``failure`` says why there are none."""

    model: str
    precision: str
    parities: list[Parity] = field(default_factory=list)
    figures: Figures | None = None
    failure: str | None = None

    def verdicts(self) -> Iterator[tuple[str, bool]]:
        """Yield what was asked, and whether it holds."""
        if self.failure is not None:
            yield f"runs ({self.failure})", False
        for parity in self.parities:
            if parity.limit is not None:
                yield f"mean divergence from {parity.against} ≤ {parity.limit:g} nats", parity.holds
        if self.figures is not None:
            yield from _figure_verdicts(self.figures, self.model)


def _figure_verdicts(figures: Figures, model: str) -> Iterator[tuple[str, bool]]:
    rates = figures.decode_tokens_per_s
    if model == GAIN_SHAPE and {1, MANY_STREAMS} <= rates.keys():
        gain = rates[MANY_STREAMS] / rates[1]
        yield f"{MANY_STREAMS} streams decode at {gain:.1f} × one, asked is {LEAST_GAIN:g}", gain >= LEAST_GAIN
    yield "no copy of the cache between host and device", not copies_the_cache(figures.copies_in_decode)
    if figures.memory_used_bytes is not None:
        bound = figures.memory_bound_bytes
        yield f"memory within the computed {bound / 1e6:,.0f} MB", figures.memory_used_bytes <= bound


@dataclass(frozen=True)
class Report:
    """All that one run has found out."""

    device: str
    machine: dict[str, Any]
    checked: list[Checked]

    @property
    def holds(self) -> bool:
        return all(holds for checked in self.checked for _, holds in checked.verdicts())

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write both forms, and return where they are."""
        directory.mkdir(parents=True, exist_ok=True)
        stem = "gpu-check-" + "".join(letter if letter.isalnum() else "-" for letter in self.device.lower())
        as_json, as_text = directory / f"{stem}.json", directory / f"{stem}.md"
        as_json.write_text(json.dumps(asdict(self), indent=2) + "\n")
        as_text.write_text(self.text())
        return as_json, as_text

    def text(self) -> str:
        lines = [f"# {self.device}", "", ", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        for checked in self.checked:
            lines += [f"## {checked.model}, {checked.precision}", "", *_lines(checked), ""]
        return "\n".join(lines)


def _lines(checked: Checked) -> Iterator[str]:
    for what, holds in checked.verdicts():
        yield f"- {'holds' if holds else '**fails**'}: {what}"
    for parity in checked.parities:
        yield (
            f"- against {parity.against}: mean divergence {parity.mean_kl:.2g} nats, same likeliest token "
            f"{parity.top1_agreement:.1%}, largest difference {parity.largest_difference:.2g} "
            f"({parity.num_positions} positions)"
        )
    if (figures := checked.figures) is not None:
        yield from _figure_lines(figures)


def _figure_lines(figures: Figures) -> Iterator[str]:
    plan = figures.plan
    captured = "captured as CUDA graphs" if figures.captures_decode_steps else "without CUDA graphs"
    yield f"- {plan['num_slots']} slots of {plan['max_context_tokens']:,} tokens; decode steps {captured}"
    yield "- start, ms: " + ", ".join(f"{name} {ms:,.1f}" for name, ms in figures.start_ms.items())
    yield f"- prefill {figures.prefill_tokens_per_s:,.0f} tokens/s"
    used = figures.memory_used_bytes
    of_memory = "not measured" if used is None else f"{used / 1e6:,.0f} MB used"
    yield f"- memory: {of_memory}, {figures.memory_bound_bytes / 1e6:,.0f} MB at most by the plan"
    yield f"- the device copies its own memory at {figures.copy_gb_per_s:,.0f} GB/s, reads and writes counted"
    copies = ", ".join(f"{name} ({count})" for name, count in figures.copies_in_decode.items()) or "none"
    yield f"- copies between host and device in four decode steps: {copies}"
    yield ""
    yield "| streams | tokens/s | step, ms | share of the roofline |"
    yield "|---|---|---|---|"
    for streams, rate in figures.decode_tokens_per_s.items():
        share = figures.roofline_share[streams]
        yield f"| {streams} | {rate:,.0f} | {figures.step_ms[streams]:.2f} | {share:.0%} |"
