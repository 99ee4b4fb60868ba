"""A result as a Markdown table: medians with their spread, paired ratios to the best peers, and what is asked."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from models import SHAPES
from results import Result, Values, best_peer, known, median, paired_ratios, read
from rows import WORKLOADS, Figure, Workload, step_bytes
from servers import OUR_ENGINE, OURS

BLANK = [""] * 6


def table(result: Result) -> str:
    """Return the whole report of a shape."""
    peers = [name for name, record in result.peers.items() if record.state == "measured"]
    lines = [
        f"## {result.shape} shape, Pilotlight {result.recipe}",
        "",
        f"{result.machine['processor']}, {result.machine['threads_of_each_peer']} threads"
        f" ({', '.join(result.machine['instructions'])}). {_bandwidth_line(result)}",
        "",
        "Median (lowest–highest) of the rounds. Ratios are paired by round: our server's to the best four-bit server's,"
        " and our engine's to the best four-bit library's, which don't pass HTTP. What is asked is asked of both;"
        " with several streams, of the server.",
        "",
        "| Row | rounds | " + " | ".join(peers) + " | best server | ratio | best library | ratio | asked | |",
        "|---" * (len(peers) + 8) + "|",
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
    server, to_server = _compared(result, OURS, figure, by_peer)
    library, to_library = _compared(result, OUR_ENGINE, figure, by_peer)
    asked = dict(figure.asked).get(result.shape)
    judged = (to_server,) if figure.over_http else (to_server, to_library)
    verdict = _verdict([ratios for ratios in judged if ratios], asked, figure)
    rest = [server, _spread([*to_server], 2), library, _spread([*to_library], 2), _asked(asked, figure), verdict]
    return _row(figure.title, cells, rest)


def _compared(result: Result, ours: str, figure: Figure, by_peer: dict[str, Values]) -> tuple[str, list[float]]:
    """Return the best four-bit peer that is asked as we are, and our paired ratios to it; "" and none without one."""
    measured = {name: record for name, record in result.peers.items() if record.state == "measured"}
    if ours not in measured or ours not in by_peer:
        return "", []
    is_server = measured[ours].is_server
    rivals = [
        name
        for name, record in measured.items()
        if name not in (OURS, OUR_ENGINE) and record.is_four_bit and record.is_server == is_server
    ]
    best = best_peer(by_peer, rivals, figure.better)
    return (best, paired_ratios(by_peer[ours], by_peer[best])) if best else ("", [])


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


def _verdict(ratios: list[list[float]], asked: float | None, figure: Figure) -> str:
    """Return whether what is asked holds, beside servers and beside libraries."""
    if asked is None or not ratios:
        return ""
    middles = [statistics.median(each) for each in ratios]
    return "met" if (max(middles) <= asked if figure.better == "less" else min(middles) >= asked) else "**missed**"


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
