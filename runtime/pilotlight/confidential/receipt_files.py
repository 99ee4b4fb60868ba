"""Receipts in a directory, one file each, so that they outlive the process. Only its owner may read them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from pilotlight.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What names a request, here and in ``x-request-id``: no name is a path."""


class ReceiptFiles:
    """A directory of receipts. Nothing is ever deleted: how long they are kept is for the operator to say."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError where nothing can be written there."""
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise ConfigError(f"{directory}: receipts cannot be kept there ({error.strerror})") from error

    def write(self, request_id: str, receipt: bytes) -> None:
        """Write a receipt, whole or not at all. Raises OSError where that fails."""
        descriptor, name = tempfile.mkstemp(prefix=".", dir=self._directory)
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(receipt)
            path.replace(self._path(request_id))
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def read(self, request_id: str) -> bytes | None:
        """Return a receipt; None where there is none, or none that can be read."""
        if not NAME.fullmatch(request_id):
            return None
        try:
            return self._path(request_id).read_bytes()
        except OSError:
            return None

    def _path(self, request_id: str) -> Path:
        return self._directory / f"{request_id}.json"
