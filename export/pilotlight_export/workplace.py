"""Where an artifact is built: a private directory beside its target, which no export leaves behind for good."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pilotlight.artifact import MANIFEST
from pilotlight.scratch import abandoned, scratch
from pilotlight_export.errors import TargetError

ARTIFACT = "artifact"
REPLACED = "replaced"


def check_target(target: Path) -> None:
    """Refuse to replace anything but an artifact, and a place where nothing can be written.

    Raises:
        TargetError: the target exists and is not an artifact, or nobody may write beside it.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: exists and is not a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise TargetError(f"{target}: is a directory with other files in it, not an artifact; it will not be replaced")
    beside = next(parent for parent in target.absolute().parents if parent.exists())
    if beside.is_dir() and not os.access(beside, os.W_OK | os.X_OK):
        raise TargetError(f"{target}: cannot be written, because {beside} is read-only")


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        TargetError: the disk has less space than that.
    """
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise TargetError(
            f"{directory.parent}: has {free_bytes / 1e6:,.0f} MB free; "
            f"the export needs {needed_bytes / 1e6:,.0f} MB there while it works"
        )


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Make a temporary directory beside the target, on the same disk, and remove it however the export ends.

    What a killed export to the same target left there is removed first.

    Raises:
        TargetError: the target's parent cannot be written, or its disk is full.
    """
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for directory in abandoned(_prefix(target), target.parent):
            _put_back(directory, target)
        with scratch(_prefix(target), target.parent) as directory:
            yield directory
    except OSError as error:
        raise TargetError(f"{error.filename or target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # not empty, as after every export that went well
            for parent in made:
                parent.rmdir()


def move_into_place(directory: Path, target: Path) -> None:
    """Rename the finished artifact to the target; one that was there steps aside, and back if that fails.

    Raises:
        TargetError: another program put something there in the meantime.
    """
    check_target(target)
    if target.exists():
        target.rename(directory / REPLACED)
    try:
        (directory / ARTIFACT).rename(target)
    except BaseException:
        _put_back(directory, target)
        raise


def _prefix(target: Path) -> str:
    return f".{target.name}.export-"


def _put_back(directory: Path, target: Path) -> None:
    """Undo the half of a replacement: the old artifact is better than none."""
    if (directory / REPLACED).exists() and not target.exists():
        (directory / REPLACED).rename(target)
