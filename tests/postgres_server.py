"""A PostgreSQL server for tests: in a folder of its own, on a Unix socket, as a user that is not root."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUPERUSER = "pilotlight"
NOBODY = "postgres"
"""Who runs the server where root runs the tests: PostgreSQL refuses to be root."""
PATIENTLY = ("-w", "-t", "600")
"""To wait until it is done, for ten minutes instead of one."""


class NoPostgres(Exception):
    """There is no PostgreSQL on this machine."""


class PostgresServer:
    """A running server. Every ledger of a test gets a schema of its own in it."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self._programs = programs

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off -c max_connections=300"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", *PATIENTLY, "-D", str(self._folder / "data"), "-l", log, "-o", options)

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", *PATIENTLY, "-m", mode, "-D", str(self._folder / "data"))

    def create(self) -> None:
        trusting = ("-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self._run("initdb", "-D", str(self._folder / "data"), *trusting)

    @property
    def url(self) -> str:
        return f"postgresql://{SUPERUSER}@/postgres?host={self._folder}"

    def fresh_url(self) -> str:
        """Return the URL of a schema that nothing is in yet."""
        import psycopg

        schema = f"s{secrets.token_hex(6)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"{self.url}&options=-csearch_path%3D{schema}"

    def _run(self, program: str, *arguments: str) -> None:
        as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            text=True,
            **as_user,  # type: ignore[call-overload]
        )
        if done.returncode != 0:
            log = self._folder / "log"
            raise RuntimeError(f"{program}: {done.stderr} {log.read_text() if log.exists() else ''}")


def programs() -> Path:
    """Return where the server's programs are.

    Raises:
        NoPostgres: they are nowhere.
    """
    found = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr/pgsql").glob("*/bin")]
    if (on_path := shutil.which("pg_ctl")) is not None:
        found.append(Path(on_path).resolve().parent)
    if not found:
        raise NoPostgres("no PostgreSQL server is installed here (Debian: apt-get install postgresql)")
    return max(found, key=lambda path: (path.parent.name.isdigit() and int(path.parent.name), str(path)))


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server, and stop it.

    Raises:
        NoPostgres: there is none, or no driver for it.
    """
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise NoPostgres("psycopg is not installed: pip install 'pilotlight[postgres]'") from error
    where = programs()
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, NOBODY, NOBODY)
        server = PostgresServer(folder, where)
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        for _ in range(50):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)
