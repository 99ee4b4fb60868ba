"""How measured figures are written down."""

from __future__ import annotations

from typing import Any

import numpy as np

Figures = dict[str, str | int | float | bool]


def rounded(value: float | np.floating[Any]) -> float:
    """Keep the four digits that mean something, so that manifests can be compared."""
    return float(f"{value:.4g}")
