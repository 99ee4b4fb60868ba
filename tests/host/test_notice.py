"""Notices: what each source says, what it does not say, and who is told of it once."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import threading
import urllib.error
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from metadata_server import MetadataServer, metadata_server
from pilotlight.errors import ConfigError
from pilotlight.host import notice
from pilotlight.host.notice import (
    AwsNotices,
    FileNotices,
    GoogleNotices,
    Kind,
    Notice,
    NoticeSource,
    ToldNotices,
    aws_interruption,
    google_preemption,
    open_source,
    watch,
    written_notice,
)
from support import PATIENCE_S

ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    monkeypatch.setattr(notice, "METADATA_TIMEOUT_S", PATIENCE_S)
    with metadata_server() as server:
        yield server


class TestAws:
    @pytest.fixture
    def aws(self, server: MetadataServer) -> AwsNotices:
        return AwsNotices(server.url, lambda: NOON)

    def test_nothing_is_said_while_there_is_nothing(self, aws: AwsNotices, server: MetadataServer) -> None:
        assert [aws.ask(), aws.ask()] == [None, None]
        assert server.num_tokens == 1

    def test_an_interruption_says_when(self, aws: AwsNotices, server: MetadataServer) -> None:
        server.items[ACTION] = '{"action": "terminate", "time": "2026-11-22T12:02:00Z"}'
        server.items[REBALANCE] = '{"noticeTime": "2026-11-22T11:59:00Z"}'
        assert aws.ask() == Notice(Kind.INTERRUPTION, "aws", 120.0)

    def test_a_recommendation_comes_before_it(self, aws: AwsNotices, server: MetadataServer) -> None:
        server.items[REBALANCE] = '{"noticeTime": "2026-11-22T11:59:00Z"}'
        assert aws.ask() == Notice(Kind.REBALANCE, "aws", math.inf)

    def test_a_token_that_has_expired_is_renewed(self, aws: AwsNotices, server: MetadataServer) -> None:
        aws.ask()
        server.tokens.clear()
        server.items[ACTION] = '{"action": "stop", "time": "2026-11-22T12:00:30Z"}'
        assert aws.ask() == Notice(Kind.INTERRUPTION, "aws", 30.0)

    def test_a_broken_service_is_an_error_and_no_notice(self, aws: AwsNotices, server: MetadataServer) -> None:
        server.broken = True
        with pytest.raises(urllib.error.HTTPError) as caught:
            aws.ask()
        caught.value.close()

    @pytest.mark.parametrize(
        ("action", "expected"),
        [
            (b'{"action": "hibernate", "time": "2026-11-22T12:00:10Z"}', Notice(Kind.INTERRUPTION, "aws", 10.0)),
            (b'{"action": "terminate", "time": "2026-11-22T11:00:00Z"}', Notice(Kind.INTERRUPTION, "aws", 0.0)),
            (b'{"action": "none", "time": "2026-11-22T12:00:10Z"}', None),
        ],
    )
    def test_actions(self, action: bytes, expected: Notice | None) -> None:
        assert aws_interruption(action, NOON) == expected


def test_google_says_it_half_a_minute_before(server: MetadataServer) -> None:
    google = GoogleNotices(server.url)
    server.items[PREEMPTED] = "FALSE"
    assert google.ask() is None
    server.items[PREEMPTED] = "TRUE\n"
    assert google.ask() == Notice(Kind.INTERRUPTION, "google", 30.0)
    with pytest.raises(ValueError, match="neither TRUE nor FALSE"):
        google_preemption("<html>")


def test_a_file_says_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    source = FileNotices(path)
    assert source.ask() is None
    path.write_text('{"kind": "rebalance"}')
    assert source.ask() == Notice(Kind.REBALANCE, "file", math.inf)
    assert written_notice(b'{"seconds_left": 30}', 10.0) == Notice(Kind.INTERRUPTION, "file", 20.0)
    assert written_notice(b"", 0.0) == Notice(Kind.INTERRUPTION, "file", 120.0)


def test_a_signal_and_a_hook_are_told() -> None:
    now = [100.0]
    told = ToldNotices(lambda: now[0])
    assert told.ask() is None
    former = signal.signal(signal.SIGTERM, lambda *_: told.tell(25.0))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    now[0] += 5
    assert told.ask() == Notice(Kind.INTERRUPTION, "told", 20.0)


def test_sources_by_name(tmp_path: Path) -> None:
    assert open_source("") is None
    assert isinstance(open_source("aws"), AwsNotices)
    assert isinstance(open_source("google"), GoogleNotices)
    assert isinstance(open_source(f"file:{tmp_path}/n"), FileNotices)
    for name in ("azure", "file:"):
        with pytest.raises(ConfigError, match="expected aws, google or file:PATH"):
            open_source(name)


class Scripted:
    """Says one thing after another, and the last one for ever."""

    name = "scripted"
    interval_s = 0.0

    def __init__(self, *said: Notice | Exception | None) -> None:
        self.said = list(said)
        self.num_asked = 0

    def ask(self) -> Notice | None:
        self.num_asked += 1
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return said


def test_each_kind_is_told_once_and_trouble_is_survived() -> None:
    hint, end = Notice(Kind.REBALANCE, "scripted"), Notice(Kind.INTERRUPTION, "scripted", 9.0)
    source = Scripted(OSError("away"), None, hint, hint, ValueError("nonsense"), end, end)
    told: list[Notice] = []

    async def scenario() -> None:
        sources: list[NoticeSource] = [source, Scripted(None)]
        watching = asyncio.create_task(watch(sources, told.append))
        while source.num_asked < 12:
            await asyncio.sleep(0)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching

    asyncio.run(scenario())
    assert told == [hint, end]


def test_a_time_without_a_zone_makes_no_sense() -> None:
    action = b'{"action": "terminate", "time": "2026-01-01T00:00:00"}'
    with pytest.raises(ValueError, match="timezone"):
        aws_interruption(action, datetime(2026, 1, 1, tzinfo=UTC))


def test_whoever_does_not_speak_http_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example ready\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(OSError, match="BadStatusLine"):
            GoogleNotices(f"http://127.0.0.1:{server.getsockname()[1]}").ask()
        answering.join()
