"""Python imports this at its start where its folder is on the path: the model runs as slowly as a test says.

Only the processes that run a model are concerned, and only those of tests that ask for it (``pace.py``).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

RUNNERS = ("pilotlight.host.zygote", "bootstrap.py")


class _Pace:
    """Counts the runs since a test has spoken, and makes those pause that come after the quick ones."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._asked = ""
        self._num_runs = 0

    def keep(self) -> None:
        try:
            asked = self._file.read_text()
        except FileNotFoundError:
            return
        if asked != self._asked:
            self._asked, self._num_runs = asked, 0
        _, num_quick_runs, pause_s = asked.split()
        self._num_runs += 1
        if self._num_runs > int(num_quick_runs):
            time.sleep(float(pause_s))


def _slow_down(file: Path) -> None:
    from pilotlight.engine.session import _Graph

    pace, run = _Pace(file), _Graph._run

    def slow_run(self: _Graph, binding: object) -> None:
        run(self, binding)
        pace.keep()

    _Graph._run = slow_run  # type: ignore[method-assign]


if "TEST_PACE_FILE" in os.environ and any(argument.endswith(RUNNERS) for argument in sys.orig_argv):
    try:
        _slow_down(Path(os.environ["TEST_PACE_FILE"]))
    except BaseException:  # noqa: BLE001 - Python would go on, and the model would be as fast as ever
        traceback.print_exc()
        os._exit(70)
