"""How fast the model runs in another process: a test that wants to be in the middle of an answer needs a slow one.

Otherwise a client that waits for its turn on a busy machine finds the answer complete when it wants to break it off.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAUSE_S = 0.25
"""What a slow run takes. An answer of some hundred tokens then lasts for a minute, unless it is hurried up."""


class Pace:
    """Tells processes that were started with ``environment``, by a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "pace"
        self._numbers = itertools.count()

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that listens, and of its children."""
        paths = [str(Path(__file__).parent / "slow"), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TEST_PACE_FILE": str(self._file)}

    @contextmanager
    def slow(self, num_quick_runs: int = 0, pause_s: float = PAUSE_S) -> Iterator[None]:
        """Have the model run slowly within the block, in each process after so many runs that are quick."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{next(self._numbers)} {num_quick_runs} {pause_s}")
        written.replace(self._file)
        try:
            yield
        finally:
            self.hurry()

    def hurry(self) -> None:
        """Have the model run as fast as it can."""
        self._file.unlink(missing_ok=True)
