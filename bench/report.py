"""A result as a Markdown table: medians with their spread, the paired ratio to the best peer, and what is asked."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from models import SHAPES
from results import Result, Values, best_peer, known, median, paired_ratios, read
from rows import WORKLOADS, Figure, Workload, step_bytes
from servers import OURS, LlamaServer

BLANK = [""] * 5


def table(result: Result) -> str:
    """Return the whole report of a shape."""
    peers = [name for name, record in result.peers.items() if record.state == "measured"]
    lines = [
        f"## {result.shape} shape, Pilotlight {result.recipe}",
        "",
        f"{result.machine['processor']}, {result.machine['threads_of_each_peer']} threads"
        f" ({', '.join(result.machine['instructions'])}). {_bandwidth_line(result)}",
        "",
        "Median (lowest–highest) of the rounds. The ratio is ours over the best four-bit peer's, paired by round.",
        "",
        "| Row | rounds | " + " | ".join(peers) + " | best peer | ratio | to llama-server | asked | |",
        "|---" * (len(peers) + 7) + "|",
    ]
    lines += [
        _line(result, peers, figure, by_peer)
        for workload in WORKLOADS.values()
        for figure in workload.figures
        if (by_peer := result.rows.get(workload.name, {}).get(figure.title))
    ]
    return "\n".join([*lines, *_share_lines(result, peers), "", *_notes(result)]) + "\n"


def _line(result: Result, peers: list[str], figure: Figure, by_peer: dict[str, Values]) -> str:
    num_rounds = str(max(map(len, by_peer.values())))
    cells = [num_rounds, *(_spread(by_peer.get(peer, []), 0 if figure.unit == "MiB" else 1) for peer in peers)]
    if figure.better == "neither":
        return _row(figure.title, cells, BLANK)
    rivals = [name for name in peers if name != OURS and result.peers[name].is_four_bit]
    best = best_peer(by_peer, rivals, figure.better)
    ratios = paired_ratios(by_peer[OURS], by_peer[best]) if best and OURS in by_peer else []
    if best is None or not ratios:
        return _row(figure.title, cells, BLANK)
    asked = dict(figure.asked).get(result.shape)
    rest = [best, _spread([*ratios], 2), _to_llama(by_peer), _asked(asked, figure), _verdict(ratios, asked, figure)]
    return _row(figure.title, cells, rest)


def _to_llama(by_peer: dict[str, Values]) -> str:
    ratios = paired_ratios(by_peer[OURS], by_peer[LlamaServer.name]) if LlamaServer.name in by_peer else []
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _row(title: str, cells: list[str], rest: list[str]) -> str:
    return "| " + " | ".join([title, *cells, *rest]) + " |"


def _spread(values: Values, digits: int) -> str:
    present = known(values)
    if not present:
        return "–"
    middle = f"{statistics.median(present):.{digits}f}"
    return middle if len(present) == 1 else f"{middle} ({min(present):.{digits}f}–{max(present):.{digits}f})"


def _asked(asked: float | None, figure: Figure) -> str:
    if asked is None:
        return ""
    return f"{'≤' if figure.better == 'less' else '≥'} {asked:g}"


def _verdict(ratios: list[float], asked: float | None, figure: Figure) -> str:
    if asked is None:
        return ""
    middle = statistics.median(ratios)
    return "met" if (middle <= asked if figure.better == "less" else middle >= asked) else "**missed**"


def _share_lines(result: Result, peers: list[str]) -> list[str]:
    """Return the shares of the bandwidth roofline of every row that decodes one stream."""
    return [
        _row(
            f"share of the bandwidth roofline, context {workload.num_prompt_tokens}",
            ["", *(_percent(value) for value in roofline_shares(result, workload, peers))],
            BLANK,
        )
        for workload in WORKLOADS.values()
        if workload.name in result.bandwidth_gb_per_s and workload.name in result.rows
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def roofline_shares(result: Result, workload: Workload, peers: list[str]) -> list[float | None]:
    """Return what each peer's decode speed is of the speed at which memory could deliver a step's fewest bytes."""
    num_bytes = step_bytes(SHAPES[result.shape], mean_context(workload))
    speeds = [median(result.rows[workload.name][workload.figures[0].title].get(peer, [])) for peer in peers]
    bandwidth = statistics.median(result.bandwidth_gb_per_s[workload.name]) * 1e9
    return [None if speed is None else speed * num_bytes / bandwidth for speed in speeds]


def mean_context(workload: Workload) -> int:
    """Return how many tokens are in the cache in the middle of the answer."""
    return workload.num_prompt_tokens + workload.num_tokens // 2


def _bandwidth_line(result: Result) -> str:
    found = [
        f"{statistics.median(values):.0f} GB/s for a step's bytes at context {name.partition('-')[2]}"
        for name, values in result.bandwidth_gb_per_s.items()
    ]
    return f"Reading memory with all threads: {', '.join(found)}." if found else ""


def _notes(result: Result) -> list[str]:
    """Return a line for each peer and each failure."""
    lines = []
    for name, record in result.peers.items():
        versions = ", ".join(f"{package} {number}" for package, number in record.versions.items())
        lines.append(f"- {name}: {versions if record.state == 'measured' else record.state}")
    lines += [f"- {row}: {name} failed: {why}" for row, errors in result.errors.items() for name, why in errors.items()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench/run.py")
    for path in parser.parse_args().results:
        result = read(path)
        path.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
