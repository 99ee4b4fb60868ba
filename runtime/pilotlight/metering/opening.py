"""One way to open a ledger to write, wherever it is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pilotlight.errors import ConfigError
from pilotlight.metering.database import DYNAMODB_SCHEME, Location
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.signing import Signer
from pilotlight.metering.sql_ledger import SqlLedger


def open_ledger(location: Location, signer: Signer | None = None, cache_dir: str = "") -> SqlLedger:
    """Open the ledger at ``location`` to write, and create it where there is none.

    Marks that don't lie beside a file are kept in ``cache_dir``; without one, where the system keeps what is temporary.

    Raises:
        StartupError: a newer version of Pilotlight wrote it.
        ConfigError: it cannot be opened.
    """
    if isinstance(location, Path):
        return Ledger(location, signer)
    if location.startswith(DYNAMODB_SCHEME):
        raise ConfigError(f"{location}: only the Lambda function writes a ledger on DynamoDB")
    from pilotlight.metering.postgres_ledger import PostgresLedger

    return PostgresLedger(location, _marks_dir(cache_dir), signer)


def _marks_dir(cache_dir: str) -> Path:
    temporary = Path(tempfile.gettempdir()) / f"pilotlight-{os.getuid()}"
    folder = (Path(cache_dir).expanduser() if cache_dir else temporary) / "marks"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not cache_dir and folder.stat().st_uid != os.getuid():
            raise ConfigError(f"{folder}: belongs to somebody else")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created ({error.strerror})") from error
    return folder
