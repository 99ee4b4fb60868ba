"""Ledgers for tests, in every database that there is one for."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pilotlight.metering.database import Location
from pilotlight.metering.opening import open_ledger
from pilotlight.metering.signing import Signer
from pilotlight.metering.sql_ledger import SqlLedger
from postgres_server import NoPostgres, PostgresServer, postgres_server

KINDS = ("sqlite", "postgres")

_running: list[PostgresServer] = []


def writer(location: Location, signer: Signer | None = None) -> SqlLedger:
    """Open a ledger to write. All of a test run share one folder for marks."""
    return open_ledger(location, signer, cache_dir=cache_dir())


def cache_dir() -> str:
    if "TEST_CACHE_DIR" not in os.environ:
        folder = os.environ["TEST_CACHE_DIR"] = tempfile.mkdtemp(prefix="cache-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.environ["TEST_CACHE_DIR"]


@contextmanager
def fresh(kind: str) -> Iterator[Location]:
    """Make a place for a ledger, in one of ``KINDS``."""
    if kind == "postgres":
        yield server().fresh_url()
        return
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder / "usage.db"
    finally:
        shutil.rmtree(folder)


def server() -> PostgresServer:
    """Return the server of this test run, which is started when it is first needed; without one, skip."""
    if not _running:
        context = postgres_server()
        try:
            _running.append(context.__enter__())
        except NoPostgres as error:
            pytest.skip(str(error))
        atexit.register(context.__exit__, None, None, None)
    return _running[0]
