"""Shows which stage an export is in: one live line on a terminal, one plain line a stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Writes to ``stream``; a stage that fails leaves no line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage from its start to its end, with the seconds it took."""
        started_at = time.monotonic()
        self._live(f"  {name} …")
        stage = Stage(name, self._live)
        try:
            yield stage
        except BaseException:
            self._live("")
            raise
        elapsed_s = time.monotonic() - started_at
        outcome = f": {stage.outcome}" if stage.outcome else ""
        self._write(f"{CLEAR_LINE if self._is_terminal else ''}  {name}{outcome} ({elapsed_s:.1f} s)\n")

    def _live(self, line: str) -> None:
        if self._is_terminal:
            self._write(f"{CLEAR_LINE}{line}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Stage:
    """One stage under way; ``outcome`` is shown when it ends."""

    def __init__(self, name: str, show: Callable[[str], None]) -> None:
        self._name = name
        self._show = show
        self.outcome = ""

    def show_count(self, num_done: int, num_all: int) -> None:
        """Update the live line, where there is one."""
        self._show(f"  {self._name} … {num_done} of {num_all}")
