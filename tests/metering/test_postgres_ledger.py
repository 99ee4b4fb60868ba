"""What only a ledger on PostgreSQL has: leases, hosts that disappear, and a server that does."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psycopg
import pytest
from click.testing import CliRunner

from admissions import MAX_NEW, PROMPT, admission, ended
from ledgers import fresh, server, writer
from pilotlight.cli import main
from pilotlight.errors import ConfigError, LedgerUnavailable, RequestNotFound, StartupError
from pilotlight.metering.database import FAILURES, connect_writer, shown
from pilotlight.metering.keyring import KeyDesk
from pilotlight.metering.keys import Limits
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.marks import Mark
from pilotlight.metering.postgres_ledger import PostgresLedger
from pilotlight.metering.record import UsageRecord, final_record
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from postgres_server import NOBODY, PostgresServer, programs

LEASE_S = 3600.0
"""So long that no ledger renews its lease by itself during a test, however long that takes."""


@pytest.fixture
def url() -> Iterator[str]:
    with fresh("postgres") as location:
        yield str(location)


@pytest.fixture
def here(url: str, tmp_path: Path) -> Iterator[PostgresLedger]:
    with PostgresLedger(url, folder(tmp_path / "here"), lease_s=LEASE_S) as ledger:
        yield ledger


@pytest.fixture
def there(url: str, tmp_path: Path) -> Iterator[PostgresLedger]:
    """A writer on another machine: it doesn't see the marks of ``here``."""
    with PostgresLedger(url, folder(tmp_path / "there"), lease_s=LEASE_S) as ledger:
        yield ledger


def folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def expire(url: str, ledger: PostgresLedger) -> None:
    """Let the lease of a writer run out, as if it had been silent for so long."""
    statement = "UPDATE writers SET lease_until = clock_timestamp() - interval '1 ms' WHERE writer_id = %s"
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute(statement, (ledger._marks.owner,)).rowcount == 1


async def admit_and_use(ledger: PostgresLedger, request_id: str, num_tokens: int) -> None:
    await ledger.admit(admission(request_id, None))
    await ledger.checkpoint(request_id, Usage(PROMPT, completion_tokens=num_tokens))
    ledger.note({request_id: Mark(PROMPT, 0, num_tokens + 1, 0)})


def end_of(ledger: PostgresLedger, request_id: str) -> tuple[FinishReason, int] | None:
    record = ledger.get(request_id)
    return None if record is None else (record.finish_reason, record.completion_tokens)


class TestLease:
    def test_what_a_machine_left_open_is_closed_by_another_one_after_its_lease(
        self, url: str, here: PostgresLedger, there: PostgresLedger
    ) -> None:
        asyncio.run(admit_and_use(here, "a", 3))
        there.beat()
        assert there.get("a") is None
        expire(url, here)
        there.beat()
        assert end_of(there, "a") == (FinishReason.CRASHED, 3), "its marks went with it"

    def test_a_writer_that_was_given_up_delivers_and_records_nothing_of_it(
        self, url: str, here: PostgresLedger, there: PostgresLedger
    ) -> None:
        asyncio.run(admit_and_use(here, "a", 3))
        expire(url, here)
        there.beat()
        here.beat()
        with pytest.raises(LedgerUnavailable, match="closed by another host"):
            here.note({"a": Mark(PROMPT, 0, 5, 0)})
        for late in (here.checkpoint("a", Usage()), here.finish(ended(admission("a", None), 5))):
            with pytest.raises(RequestNotFound):
                asyncio.run(late)
        asyncio.run(admit_and_use(here, "b", 1))
        asyncio.run(here.finish(ended(admission("b", None), 2)))
        assert [end_of(here, "a"), end_of(here, "b")] == [(FinishReason.CRASHED, 3), (FinishReason.STOP, 2)]

    def test_a_lease_that_ran_out_unnoticed_is_renewed_without_a_loss(self, url: str, here: PostgresLedger) -> None:
        asyncio.run(admit_and_use(here, "a", 3))
        expire(url, here)
        here.beat()
        here.note({"a": Mark(PROMPT, 0, 5, 0)})
        asyncio.run(here.finish(ended(admission("a", None), 5)))
        assert end_of(here, "a") == (FinishReason.STOP, 5)

    def test_what_was_reserved_by_a_machine_that_is_gone_is_free_again(
        self, url: str, here: PostgresLedger, there: PostgresLedger
    ) -> None:
        with KeyDesk(url) as desk:
            key_id = desk.create("app", "acme", None, Limits(max_concurrent=1))[0].key_id
        asyncio.run(here.admit(admission("a", key_id)))
        expire(url, here)
        there.beat()
        asyncio.run(there.admit(admission("b", key_id)))

    def test_an_admission_whose_answer_was_lost_is_closed_free_of_tokens(self, here: PostgresLedger) -> None:
        asyncio.run(here.admit(admission("a", None)))
        here._marks.close("a")  # what is done when the commit seems to have failed
        here.beat()
        assert end_of(here, "a") == (FinishReason.CRASHED, 0)

    def test_a_clean_end_leaves_no_writer_and_no_marks(self, url: str, tmp_path: Path) -> None:
        PostgresLedger(url, folder(tmp_path / "one")).close()
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM writers").fetchone() == (0,)
        assert [*(tmp_path / "one").iterdir()] == []

    def test_a_writer_that_starts_where_one_was_killed_closes_its_work_to_the_last_token(
        self, url: str, here: PostgresLedger, tmp_path: Path
    ) -> None:
        """As the marks of a killed process are found: without a lock on them."""
        asyncio.run(admit_and_use(here, "a", 3))
        shutil.copytree(tmp_path / "here", tmp_path / "again")
        with PostgresLedger(url, tmp_path / "again") as again:
            assert end_of(again, "a") == (FinishReason.CRASHED, 4)
        assert [*(tmp_path / "again").iterdir()] == []


class TestServer:
    @pytest.fixture
    def other_server(self, tmp_path: Path) -> Iterator[PostgresServer]:
        """A server that a test may stop."""
        server()  # skips without one
        at = Path(f"{server()._folder}-b")
        at.mkdir(mode=0o700)
        if os.geteuid() == 0:
            shutil.chown(at, NOBODY, NOBODY)
        found = PostgresServer(at, programs())
        found.create()
        found.start()
        try:
            yield found
        finally:
            found.stop("immediate")
            shutil.rmtree(at)

    def test_while_the_server_is_away_nothing_is_admitted_and_afterwards_all_goes_on(
        self, other_server: PostgresServer, tmp_path: Path
    ) -> None:
        url = other_server.fresh_url()
        with PostgresLedger(url, tmp_path, lease_s=600) as ledger, LedgerReader(url) as reader:
            asyncio.run(admit_and_use(ledger, "before", 1))
            other_server.stop("immediate")
            with pytest.raises(LedgerUnavailable) as caught:
                asyncio.run(ledger.admit(admission("meanwhile", None)))
            assert "\n" not in caught.value.message
            with pytest.raises(LedgerUnavailable):
                reader.get("before")
            with pytest.raises(FAILURES):
                ledger.beat()
            ledger.note({"before": Mark(PROMPT, 0, 2, 0)})  # within the lease, what runs goes on
            other_server.start()
            ledger.beat()
            asyncio.run(ledger.finish(ended(admission("before", None), 2)))
            asyncio.run(ledger.admit(admission("after", None)))
            assert [record.request_id for record in reader.records()] == ["before"]

    def test_without_a_lease_nothing_is_admitted_and_nothing_delivered(self, here: PostgresLedger) -> None:
        asyncio.run(admit_and_use(here, "a", 1))
        here._lease_until = 0.0
        with pytest.raises(LedgerUnavailable, match="lease"):
            asyncio.run(here.admit(admission("b", None)))
        with pytest.raises(LedgerUnavailable, match="lease"):
            here.note({"a": Mark(PROMPT, 0, 2, 0)})

    def test_no_server_is_one_line_without_the_password(self, tmp_path: Path) -> None:
        url = f"postgresql://me:secret@/db?host={tmp_path}"
        with pytest.raises(ConfigError, match="cannot be used as a usage ledger") as caught:
            writer(url)
        assert "secret" not in caught.value.message
        assert "\n" not in caught.value.message

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("postgresql://me:s3@h:1/db", "postgresql://me@h:1/db"),
            ("postgres://me@h/db?a=b", "postgres://me@h/db?a=b"),
            ("a:b@c.db", "a:b@c.db"),
        ],
    )
    def test_a_password_is_never_shown(self, url: str, expected: str) -> None:
        assert shown(url) == expected

    def test_a_database_in_another_encoding_is_refused(self, url: str) -> None:
        with psycopg.connect(server().url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        with pytest.raises(ConfigError, match="the database's encoding is LATIN1; a ledger needs UTF8"):
            writer(server().url.replace("/postgres?", "/latin?"))

    def test_a_reader_of_nothing_and_a_newer_ledger_are_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match="there is no usage ledger here"):
            LedgerReader(url)
        connection = connect_writer(url)
        connection.execute("UPDATE ledger_version SET version = 99")
        connection.close()
        for opener in (writer, LedgerReader):
            with pytest.raises(StartupError, match="has ledger version 99"):
                opener(url)


@pytest.mark.parametrize("detail", ["\0", "\0\0 \\u0000 \\\0", "\\\\u0000\0"])
def test_a_record_with_a_nul_is_kept_as_it_is(here: PostgresLedger, detail: str) -> None:
    """PostgreSQL's texts have no NUL; a stop string may be one."""
    record = final_record(admission("a", None), Usage(), Timings(), FinishReason.STOP, detail)
    asyncio.run(here.admit(admission("a", None)))
    asyncio.run(here.finish(record))
    assert here.get("a") == record


def test_the_commands_read_it(url: str) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments, "--ledger", url])
        assert done.exit_code == 0, done.output
        return done.stdout

    token = run("keys", "create", "app", "--requests-per-minute", "5")
    assert token.startswith("pl_")
    with writer(url) as ledger:
        asyncio.run(ledger.subscribe("http://127.0.0.1:1/"))
        asyncio.run(ledger.admit(admission("a", None)))
        asyncio.run(ledger.finish(ended(admission("a", None), MAX_NEW)))
    assert msgspec.json.decode(run("usage", "--json"))["completion_tokens"] == MAX_NEW
    assert msgspec.json.decode(run("usage", "--records", "--json"), type=UsageRecord).request_id == "a"
    assert msgspec.json.decode(run("usage", "--by", "day", "--json"))["day"] == "2026-11-22"
    assert msgspec.json.decode(run("usage", "outbox", "--json"))["num_waiting"] == 1
    assert msgspec.json.decode(run("usage", "export"), type=UsageRecord).request_id == "a"
    assert "margin" in run("usage", "--margin")
