"""What the fuzzers try: the same in each run of the suite, and something new for as long as the longer forms look.

That is ten minutes a file, or ``SOAK_MINUTES``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

MINUTES_A_FILE = 10.0


def seconds_each(num_tests: int) -> float:
    """Return the time of each test of a file."""
    return float(os.environ.get("SOAK_MINUTES", MINUTES_A_FILE)) * 60 / num_tests


def rounds_for(seconds: float, one_round: Callable[[], object]) -> int:
    """Do something again and again until the time is up, once at least; return how often it was."""
    ends_at = time.monotonic() + seconds
    num_rounds = 0
    while num_rounds == 0 or time.monotonic() < ends_at:
        one_round()
        num_rounds += 1
    return num_rounds
