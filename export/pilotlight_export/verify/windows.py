"""How far the attentions of a graph look back, so that comparisons can go further."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from pilotlight.artifact import GRAPH


def longest_window_tokens(directory: Path) -> int:
    """Return the longest sliding window of an artifact's attentions, or 0 where there is none."""
    windows = [node.attributes.get("local_window_size") for node in ir.load(directory / GRAPH).graph]
    return max((window.as_int() for window in windows if window is not None), default=0)
