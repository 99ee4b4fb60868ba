"""How much of its processors' time a virtual machine did not get, because its hardware worked for others.

Source: the ``steal`` column of ``/proc/stat``, which Linux fills where the hypervisor says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

STOLEN_COLUMN = 8
NOTABLE_SHARE = 0.01
"""Of all cores' time. Beyond it, what was measured says as much of the neighbours as of what was measured."""


class StolenTime:
    """What was taken since this was made."""

    def __init__(self, stat: Path = Path("/proc/stat"), clock: Callable[[], float] = time.monotonic) -> None:
        self._stat, self._clock = stat, clock
        self._began_at, self._before_s = clock(), self._stolen_s()

    def share(self) -> float:
        """Return the part of all cores' time; 0 where the system does not say."""
        passed_s = self._clock() - self._began_at
        return max(0.0, self._stolen_s() - self._before_s) / (passed_s * (os.cpu_count() or 1))

    def _stolen_s(self) -> float:
        try:
            return int(self._stat.read_text().split("\n", 1)[0].split()[STOLEN_COLUMN]) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0
