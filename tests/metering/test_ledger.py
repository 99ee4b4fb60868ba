"""The ledger: exactly one record for every admission, whatever happens in between."""

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledgers import KINDS, cache_dir, fresh, writer
from pilotlight.errors import (
    ConfigError,
    LedgerUnavailable,
    PilotlightError,
    RequestIdInUse,
    RequestNotFound,
    StartupError,
)
from pilotlight.metering import schema
from pilotlight.metering.database import Connection, Location, connect_writer
from pilotlight.metering.group_commit import GroupCommit
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.ledger_reader import LedgerReader
from pilotlight.metering.limits import Admitted
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import CRASH_DETAIL, Admission, UsageRecord, final_record, utc_text
from pilotlight.metering.schema import LEDGER_VERSION
from pilotlight.metering.sql_ledger import SqlLedger
from pilotlight.metering.totals import Totals
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason

DOOMED_HOST = Path(__file__).with_name("doomed_host.py")
NUM_WORKERS = 16

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
EURO_A_TOKEN = PriceTable.from_config({"currency": "EUR", "completion_per_million_tokens": "1000000"})
TEN_TOKENS = Usage(prompt_tokens=4, completion_tokens=10, delivered_tokens=10)


def admission(request_id: str, function: str = "demo", at: datetime = NOON, tenant: str | None = None) -> Admission:
    return Admission(
        request_id=request_id,
        function=function,
        artifact_digest="sha256:1",
        precision="fp32",
        provider="cpu",
        replica_id="replica-1",
        started_at_utc=utc_text(at),
        prices=EURO_A_TOKEN,
        tenant=tenant,
    )


def stopped(admitted: Admission, usage: Usage = TEN_TOKENS) -> UsageRecord:
    return final_record(admitted, usage, Timings(total_ms=1.5), FinishReason.STOP)


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest) -> Iterator[Location]:
    with fresh(request.param) as location:
        yield location


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


@pytest.fixture
def ledger(path: Location) -> Iterator[SqlLedger]:
    with writer(path) as ledger:
        yield ledger


async def invoke(ledger: SqlLedger, admitted: Admission) -> UsageRecord:
    record = stopped(admitted)
    await ledger.admit(admitted)
    await ledger.finish(record)
    return record


class TestProtocol:
    def test_a_finished_invocation_has_its_record(self, ledger: SqlLedger) -> None:
        record = asyncio.run(invoke(ledger, admission("a")))
        assert ledger.get("a") == record
        assert record.cost_micros == 10_000_000

    def test_an_open_invocation_has_none(self, ledger: SqlLedger) -> None:
        asyncio.run(ledger.admit(admission("a")))
        assert ledger.get("a") is None

    def test_unicode_comes_back(self, ledger: SqlLedger) -> None:
        record = asyncio.run(invoke(ledger, admission("größe-👩‍🚀'\"", "функция", tenant="名前\n")))
        assert ledger.get("größe-👩‍🚀'\"") == record

    @pytest.mark.parametrize("finished", [False, True], ids=["open", "finished"])
    def test_a_request_id_is_admitted_once(self, ledger: SqlLedger, finished: bool) -> None:
        async def twice() -> None:
            await (invoke(ledger, admission("a")) if finished else ledger.admit(admission("a")))
            await ledger.admit(admission("a", "other"))

        with pytest.raises(RequestIdInUse, match="'a' exists already"):
            asyncio.run(twice())

    def test_of_many_at_once_one_is_admitted(self, ledger: SqlLedger) -> None:
        async def race() -> list[BaseException | Admitted]:
            admits = (ledger.admit(admission("a")) for _ in range(20))
            return [*await asyncio.gather(*admits, return_exceptions=True)]

        outcomes = asyncio.run(race())
        assert outcomes.count(Admitted()) == 1
        assert sum(isinstance(outcome, RequestIdInUse) for outcome in outcomes) == 19

    def test_a_refusal_leaves_its_neighbours_in_the_transaction_alone(self, ledger: SqlLedger, path: Location) -> None:
        async def together() -> None:
            admits = (ledger.admit(admission(request_id)) for request_id in "aabbc")
            await asyncio.gather(*admits, return_exceptions=True)
            await asyncio.gather(*(ledger.finish(stopped(admission(request_id))) for request_id in "abc"))

        asyncio.run(together())
        with LedgerReader(path) as reader:
            assert [record.request_id for record in reader.records()] == ["c", "b", "a"]

    def test_a_second_record_is_refused(self, ledger: SqlLedger) -> None:
        first = asyncio.run(invoke(ledger, admission("a")))
        with pytest.raises(RequestNotFound, match="no open invocation has the request id 'a'"):
            asyncio.run(ledger.finish(stopped(admission("a"))))
        assert ledger.get("a") == first

    def test_the_same_record_again_changes_nothing(self, ledger: SqlLedger, path: Location) -> None:
        record = asyncio.run(invoke(ledger, admission("a")))
        asyncio.run(ledger.finish(record))
        with LedgerReader(path) as reader:
            assert list(reader.records()) == [record]

    def test_what_was_never_admitted_is_neither_checkpointed_nor_finished(self, ledger: SqlLedger) -> None:
        with pytest.raises(RequestNotFound):
            asyncio.run(ledger.checkpoint("a", TEN_TOKENS))
        with pytest.raises(RequestNotFound):
            asyncio.run(ledger.finish(stopped(admission("a"))))

    def test_a_checkpoint_after_the_record_is_refused(self, ledger: SqlLedger) -> None:
        record = asyncio.run(invoke(ledger, admission("a")))
        with pytest.raises(RequestNotFound):
            asyncio.run(ledger.checkpoint("a", TEN_TOKENS))
        assert ledger.get("a") == record

    def test_a_caller_that_is_cancelled_has_still_written(self, ledger: SqlLedger) -> None:
        async def cancelled() -> None:
            await ledger.admit(admission("a"))
            finishing = asyncio.create_task(ledger.finish(stopped(admission("a"))))
            await asyncio.sleep(0)
            finishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finishing
            await ledger.admit(admission("b"))

        asyncio.run(cancelled())
        assert ledger.get("a") is not None

    def test_closing_makes_the_waiting_writes_and_refuses_others(self, path: Location) -> None:
        ledger = writer(path)

        async def close() -> None:
            waiting = [asyncio.create_task(ledger.admit(admission(f"{number}"))) for number in range(50)]
            await asyncio.sleep(0)
            ledger.close()
            await asyncio.gather(*waiting)
            with pytest.raises(LedgerUnavailable, match="closed"):
                await ledger.admit(admission("late"))

        asyncio.run(close())
        ledger.close()
        with writer(path), LedgerReader(path) as reader:
            assert len(list(reader.records())) == 50


class TestGroupCommit:
    def test_whatever_waits_is_one_transaction(self, file: Path) -> None:
        """The first write holds the thread until the others wait."""
        connection = schema.connect_writer(file)
        statements: list[str] = []
        connection.set_trace_callback(statements.append)
        commits = GroupCommit(connection)
        started, may_end = threading.Event(), threading.Event()

        def hold(_: Connection) -> None:
            started.set()
            may_end.wait()

        async def write() -> None:
            first = asyncio.create_task(commits.write(hold))
            await asyncio.to_thread(started.wait)
            others = [asyncio.create_task(commits.write(lambda _: None)) for _ in range(99)]
            await asyncio.sleep(0)
            may_end.set()
            await asyncio.gather(first, *others)

        asyncio.run(write())
        commits.close()
        assert statements.count("COMMIT") == 2

    def test_a_bug_in_one_write_does_not_end_the_thread(self, path: Location) -> None:
        commits = GroupCommit(connect_writer(path))

        def fail(_: Connection) -> None:
            raise KeyError("a bug")

        with pytest.raises(LedgerUnavailable, match="a bug"):
            asyncio.run(commits.write(fail))
        asyncio.run(commits.write(lambda _: None))
        commits.close()

    def test_a_loop_that_is_gone_does_not_end_the_thread(self, path: Location) -> None:
        commits = GroupCommit(connect_writer(path))
        started, may_end = threading.Event(), threading.Event()

        def hold(_: Connection) -> None:
            started.set()
            may_end.wait()

        async def leave() -> None:
            writing = asyncio.create_task(commits.write(hold))
            await asyncio.to_thread(started.wait)
            writing.cancel()

        asyncio.run(leave())
        may_end.set()
        asyncio.run(commits.write(lambda _: None))
        commits.close()


class TestReading:
    @pytest.fixture
    def reader(self, ledger: SqlLedger, path: Location) -> Iterator[LedgerReader]:
        async def fill() -> None:
            for number in range(6):
                at = NOON + timedelta(hours=number)
                await invoke(ledger, admission(f"{number}", "even" if number % 2 == 0 else "odd", at))
            await ledger.admit(admission("open"))

        asyncio.run(fill())
        with LedgerReader(path) as reader:
            yield reader

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({}, "543210"),
            ({"limit": 2}, "54"),
            ({"limit": 0}, ""),
            ({"function": "odd"}, "531"),
            ({"function": "none"}, ""),
            ({"since": NOON + timedelta(hours=4)}, "54"),
            ({"function": "even", "since": NOON + timedelta(hours=1), "limit": 1}, "4"),
        ],
    )
    def test_records_are_filtered(self, reader: LedgerReader, filters: dict[str, object], expected: str) -> None:
        records = reader.records(**filters)  # type: ignore[arg-type]
        assert "".join(record.request_id for record in records) == expected

    def test_totals_are_the_sums_of_the_records(self, reader: LedgerReader) -> None:
        assert reader.totals() == [
            Totals({"function": "even"}, "EUR", 3, 12, 0, 30, 30_000_000, 0),
            Totals({"function": "odd"}, "EUR", 3, 12, 0, 30, 30_000_000, 0),
        ]
        since = NOON + timedelta(hours=4)
        assert [totals.num_invocations for totals in reader.totals(since=since)] == [1, 1]

    def test_a_reader_sees_what_is_written_after_it_opened(self, ledger: SqlLedger, reader: LedgerReader) -> None:
        record = asyncio.run(invoke(ledger, admission("later")))
        assert reader.get("later") == record

    def test_a_reader_cannot_write(self, reader: LedgerReader) -> None:
        with pytest.raises(LedgerUnavailable, match=r"read-?only"):
            list(reader._rows("DELETE FROM invocations", ()))

    def test_a_ledger_without_a_writer_can_be_read(self, path: Location) -> None:
        with writer(path) as ledger:
            record = asyncio.run(invoke(ledger, admission("a")))
        with LedgerReader(path) as reader:
            assert reader.get("a") == record

    def test_no_ledger_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="there is no usage ledger here"):
            LedgerReader(tmp_path / "none.db")
        assert list(tmp_path.iterdir()) == []


class TestOpening:
    def test_two_writers_share_a_ledger(self, ledger: SqlLedger, path: Location) -> None:
        with writer(path) as other:
            asyncio.run(invoke(ledger, admission("a")))
            asyncio.run(invoke(other, admission("b")))
            with pytest.raises(RequestIdInUse):
                asyncio.run(other.admit(admission("a")))
        with LedgerReader(path) as reader:
            assert {record.request_id for record in reader.records()} == {"a", "b"}

    def test_a_second_writer_does_not_close_what_the_first_has_open(self, ledger: SqlLedger, path: Location) -> None:
        asyncio.run(ledger.admit(admission("a")))
        writer(path).close()
        assert ledger.get("a") is None
        asyncio.run(ledger.finish(stopped(admission("a"))))

    def test_what_a_killed_writer_left_open_is_closed_once_it_is_alone(self, file: Path) -> None:
        with Ledger(file) as ledger:
            run_doomed(file, "checkpoint")
            Ledger(file).close()
            assert ledger.get("late") is None
        with Ledger(file) as alone:
            record = alone.get("late")
        assert record is not None
        assert (record.finish_reason, record.completion_tokens) == (FinishReason.CRASHED, 2)

    def test_a_closed_ledger_is_one_file(self, file: Path, tmp_path: Path) -> None:
        with Ledger(file) as ledger:
            asyncio.run(invoke(ledger, admission("a")))
        copy = tmp_path / "copy.db"
        copy.write_bytes(file.read_bytes())
        with LedgerReader(copy) as reader:
            assert reader.get("a") is not None

    def test_a_closed_ledger_can_be_opened_again(self, path: Location) -> None:
        for number in range(3):
            with writer(path) as ledger:
                asyncio.run(invoke(ledger, admission(f"{number}")))

    def test_a_commit_waits_for_the_disk(self, file: Path) -> None:
        connection = schema.connect_writer(file)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "2 is FULL"
        connection.close()

    def test_missing_folders_are_made(self, tmp_path: Path) -> None:
        Ledger(tmp_path / "a" / "b" / "usage.db").close()
        assert (tmp_path / "a" / "b" / "usage.db").exists()

    def test_a_newer_ledger_is_refused_by_both(self, file: Path) -> None:
        Ledger(file).close()
        set_version(file, LEDGER_VERSION + 1)
        for opener in (Ledger, LedgerReader):
            with pytest.raises(
                StartupError,
                match=rf"has ledger version {LEDGER_VERSION + 1}; this version of Pilotlight reads {LEDGER_VERSION}$",
            ):
                opener(file)

    def test_what_is_not_a_database_is_refused_by_both(self, file: Path) -> None:
        file.write_text("not a database, but long enough to be looked at as one" * 100)
        for opener in (Ledger, LedgerReader):
            with pytest.raises(ConfigError, match=r"cannot be used as a usage ledger \(file is not a database\)"):
                opener(file)

    def test_another_database_is_no_ledger(self, file: Path) -> None:
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE other (id)")
        connection.close()
        with pytest.raises(ConfigError, match="is not a usage ledger"):
            LedgerReader(file)

    def test_a_refused_opening_lets_go_of_the_lock(self, file: Path) -> None:
        Ledger(file).close()
        set_version(file, LEDGER_VERSION + 1)
        with pytest.raises(StartupError):
            Ledger(file)
        set_version(file, LEDGER_VERSION)
        Ledger(file).close()

    def test_a_folder_that_is_a_file_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError) as caught:
            Ledger(tmp_path / "file" / "usage.db")
        assert "cannot be opened (" in caught.value.message
        assert "\n" not in caught.value.message

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
    def test_a_read_only_folder_is_one_line(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(ConfigError, match="cannot be opened"):
            Ledger(tmp_path / "usage.db")

    def test_a_ledger_that_is_a_folder_is_one_line(self, file: Path) -> None:
        file.mkdir()
        with pytest.raises(ConfigError, match="cannot be used as a usage ledger"):
            Ledger(file)

    def test_nobody_else_can_read_what_is_created(self, file: Path) -> None:
        with Ledger(file) as ledger:
            asyncio.run(ledger.admit(admission("a")))
            modes = {found.name: found.stat().st_mode & 0o777 for found in file.parent.iterdir()}
        assert {f"{file.name}{end}" for end in ("", "-wal", "-shm", ".lock")} <= modes.keys()
        assert set(modes.values()) == {0o600}, modes

    def test_the_mode_of_a_ledger_that_exists_is_its_owners_affair(self, file: Path) -> None:
        Ledger(file).close()
        file.chmod(0o640)
        with Ledger(file):
            assert file.stat().st_mode & 0o777 == 0o640


class TestCrash:
    def test_what_was_open_is_closed_at_its_last_checkpoint(self, path: Location) -> None:
        assert run_doomed(path, "checkpoint").returncode == -signal.SIGKILL
        with writer(path) as ledger:
            early, late = ledger.get("early"), ledger.get("late")
        assert early is not None
        assert late is not None
        assert [early.finish_reason, late.finish_reason] == [FinishReason.CRASHED, FinishReason.CRASHED]
        assert [early.completion_tokens, late.completion_tokens] == [0, 2]
        assert [early.cost_micros, late.cost_micros] == [0, 2_000_000]
        assert late.stop_detail == CRASH_DETAIL
        assert late.ttft_ms is None
        with writer(path) as ledger:
            assert [ledger.get("early"), ledger.get("late")] == [early, late]

    def test_a_crashed_invocation_cannot_be_finished_any_more(self, path: Location) -> None:
        with writer(path) as ledger:
            asyncio.run(ledger.admit(admission("a")))
        with writer(path) as ledger, pytest.raises(RequestNotFound):
            asyncio.run(ledger.finish(stopped(admission("a"))))

    def test_no_acknowledged_write_is_lost_and_none_doubled(self, path: Location) -> None:
        """The process says what was acknowledged, and is killed in the middle of it."""
        with doomed(path, "work") as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(300)]
            process.kill()
            lines += process.stdout.readlines()
        acknowledged = [line.split() for line in lines if line.endswith("\n")]
        with writer(path), LedgerReader(path) as reader:
            records = list(reader.records())
        reasons = {record.request_id: record.finish_reason for record in records}
        assert len(reasons) == len(records)
        assert {request_id for _, request_id in acknowledged} <= reasons.keys()
        assert {reasons[request_id] for step, request_id in acknowledged if step == "finished"} == {FinishReason.STOP}
        assert len(records) <= sum(step == "admitted" for step, _ in acknowledged) + NUM_WORKERS

    @pytest.mark.parametrize("kind", KINDS)
    @settings(deadline=None, max_examples=25)
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["admit", "checkpoint", "finish", "crash"]), st.sampled_from("abc")),
            max_size=15,
        )
    )
    def test_any_order_of_steps_and_crashes_leaves_one_record_for_each_admission(
        self, kind: str, steps: list[tuple[str, str]]
    ) -> None:
        """A ledger that is closed leaves the same rows open as a process that is killed."""
        with fresh(kind) as path:
            model = Model()
            ledger = writer(path)
            for step, request_id in steps:
                if step == "crash":
                    ledger.close()
                    ledger = writer(path)
                    model.crash()
                else:
                    assert asyncio.run(take(ledger, step, request_id)) == model.take(step, request_id)
            ledger.close()
            model.crash()
            with writer(path), LedgerReader(path) as reader:
                found = {record.request_id: _end(record) for record in reader.records()}
            assert found == model.records


class Model:
    """What the ledger should hold: how many tokens an open invocation has used, and how a finished one ended."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.records: dict[str, tuple[FinishReason, int]] = {}

    def crash(self) -> None:
        self.records |= {request_id: (FinishReason.CRASHED, tokens) for request_id, tokens in self.open.items()}
        self.open.clear()

    def take(self, step: str, request_id: str) -> bool:
        """Take a step, and return whether it is allowed."""
        if step == "admit":
            allowed = request_id not in self.open and request_id not in self.records
        else:
            allowed = request_id in self.open
        if allowed and step == "finish":
            del self.open[request_id]
            self.records[request_id] = (FinishReason.STOP, 10)
        elif allowed:
            self.open[request_id] = 0 if step == "admit" else 3
        return allowed


def _end(record: UsageRecord) -> tuple[FinishReason, int]:
    return record.finish_reason, record.completion_tokens


async def take(ledger: SqlLedger, step: str, request_id: str) -> bool:
    try:
        if step == "admit":
            await ledger.admit(admission(request_id))
        elif step == "checkpoint":
            await ledger.checkpoint(request_id, Usage(completion_tokens=3))
        elif step == "finish":
            await ledger.finish(stopped(admission(request_id)))
    except (RequestIdInUse, RequestNotFound):
        return False
    return True


class TestFullDisk:
    @pytest.fixture
    def ledger(self, file: Path) -> Iterator[Ledger]:
        with Ledger(file) as ledger:
            yield ledger

    def test_a_full_database_refuses_and_then_works_again(self, ledger: SqlLedger) -> None:
        asyncio.run(limit_pages(ledger, 20))
        asyncio.run(ledger.admit(admission("before")))
        with pytest.raises(LedgerUnavailable, match="full"):
            asyncio.run(admit_many(ledger))
        asyncio.run(limit_pages(ledger, 10_000))
        asyncio.run(invoke(ledger, admission("after")))
        asyncio.run(ledger.finish(stopped(admission("before"))))

    def test_a_failing_file_system_refuses_and_then_works_again(self, ledger: SqlLedger, file: Path) -> None:
        asyncio.run(ledger.admit(admission("a")))
        record = stopped(admission("a"))
        with files_that_cannot_grow(file.with_name("usage.db-wal").stat().st_size):
            for write in (ledger.admit(admission("b")), ledger.finish(record)):
                with pytest.raises(LedgerUnavailable) as caught:
                    asyncio.run(write)
                assert caught.value.retryable
                assert "\n" not in caught.value.message
        assert ledger.get("a") is None
        asyncio.run(ledger.finish(record))
        asyncio.run(invoke(ledger, admission("b")))
        assert ledger.get("a") == record


async def admit_many(ledger: SqlLedger) -> None:
    for number in range(1_000):
        await ledger.admit(admission(f"{number}"))


async def limit_pages(ledger: SqlLedger, max_pages: int) -> None:
    def apply(connection: Connection) -> PilotlightError | None:
        connection.execute(f"PRAGMA max_page_count = {max_pages}")
        return None

    await ledger._commits.write(apply)


@contextmanager
def files_that_cannot_grow(max_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def set_version(path: Path, version: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()


@contextmanager
def doomed(path: Location, mode: str) -> Iterator[subprocess.Popen[str]]:
    cache_dir()
    command = [sys.executable, str(DOOMED_HOST), str(path), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run_doomed(path: Location, mode: str) -> subprocess.CompletedProcess[str]:
    with doomed(path, mode) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_what_comes_shortly_after_a_transaction_waits_for_others_and_is_written_together() -> None:
    sizes: list[int] = []

    class Counting(sqlite3.Connection):
        num_writes = 0

        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            if arguments[0] == "BEGIN IMMEDIATE":
                self.num_writes = 0
            elif arguments[0] == "COMMIT":
                sizes.append(self.num_writes)
            else:
                self.num_writes += 1
            return super().execute(*arguments)

    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=Counting)
    others_have_come = threading.Event()

    def pause_s() -> float:
        assert others_have_come.wait(60)
        return 0.001

    def apply(connection: Connection) -> None:
        connection.execute("SELECT 1")

    async def scenario() -> None:
        commits = GroupCommit(connection, pause_s)
        others_have_come.set()
        await commits.write(apply)
        others_have_come.clear()
        writes = [asyncio.create_task(commits.write(apply)) for _ in range(10)]
        await asyncio.sleep(0)
        others_have_come.set()
        await asyncio.gather(*writes)
        commits.close()

    asyncio.run(scenario())
    assert sizes == [1, 10]
