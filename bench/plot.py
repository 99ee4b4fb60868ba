"""A result as a picture: a panel for each row, a bar for each peer, whiskers from the lowest to the highest round."""

from __future__ import annotations

from pathlib import Path

from results import Result, known, median
from rows import WORKLOADS, Figure
from servers import OURS

COLUMNS = 3


def plot(result: Result, path: Path) -> None:
    """Write an SVG, the same bytes for the same result."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = result.shape
    from matplotlib import pyplot

    peers = [name for name, record in result.peers.items() if record.state == "measured"]
    panels = [
        (figure, result.rows[workload.name][figure.title])
        for workload in WORKLOADS.values()
        for figure in workload.figures
        if workload.name in result.rows and figure.better != "neither"
    ]
    if not panels:
        return
    num_rows = -(-len(panels) // COLUMNS)
    size = (4.6 * COLUMNS, 0.7 + num_rows * (0.6 + 0.24 * len(peers)))
    picture, grid = pyplot.subplots(num_rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (figure, by_peer) in zip(grid.flat, panels, strict=False):
        shown = [peer for peer in reversed(peers) if known(by_peer.get(peer, []))]
        middles = [median(by_peer[peer]) or 0.0 for peer in shown]
        below = [middle - min(known(by_peer[peer])) for peer, middle in zip(shown, middles, strict=True)]
        above = [max(known(by_peer[peer])) - middle for peer, middle in zip(shown, middles, strict=True)]
        colours = ["#c2410c" if peer.startswith(OURS) else "#94a3b8" for peer in shown]
        axes.barh(shown, middles, xerr=[below, above], color=colours, error_kw={"elinewidth": 0.8})
        axes.set_title(_title(figure), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle(f"{result.shape} shape, {result.machine['threads_of_each_peer']} threads", fontsize=10)
    picture.savefig(path, metadata={"Date": None})
    pyplot.close(picture)


def _title(figure: Figure) -> str:
    return f"{figure.title}{' (less is better)' if figure.better == 'less' else ''}"
