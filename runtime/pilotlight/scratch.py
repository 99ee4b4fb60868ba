"""Directories to work in, which are gone afterwards: at once where the work ends, and otherwise with the next one.

A directory has a lock as long as its process lives, so what a killed process left is told from what is in use.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"


@contextmanager
def scratch(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a directory in ``parent``, the system's own one for such by default, and remove it however the block ends.

    What killed processes left there under the same prefix is removed first.

    Raises:
        OSError: ``parent`` cannot be written.
    """
    parent = parent or Path(tempfile.gettempdir())
    for directory in abandoned(prefix, parent):
        shutil.rmtree(directory, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name,
        (Path(name) / LOCK).open("wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def abandoned(prefix: str, parent: Path) -> Iterator[Path]:
    """Yield the directories of this user whose process was killed; nobody else takes one while it is looked at."""
    for directory in parent.glob(f"{glob.escape(prefix)}*"):
        if not re.fullmatch(r"[a-z0-9_]{8}", directory.name.removeprefix(prefix)):
            continue
        with suppress(OSError):  # held by its process, or gone meanwhile
            status = directory.lstat()
            if status.st_uid == os.getuid() and not directory.is_symlink():
                with (directory / LOCK).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield directory
