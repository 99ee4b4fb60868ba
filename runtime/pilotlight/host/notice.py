"""Notices that this machine will be taken away: where they come from, and what they say.

Each source is asked every few seconds and answers at once. A source that cannot be reached says nothing: a machine that
is not of that cloud has no such address, and a hiccup of the metadata service is no reason to leave.

Source: AWS, "Spot Instance interruption notices" and "EC2 instance rebalance recommendations" (IMDSv2); Google Cloud,
"Spot VMs", "Detecting preemption"; Modal, "Preemption".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

from pilotlight.errors import ConfigError

logger = logging.getLogger("pilotlight.host")

AWS_METADATA = "http://169.254.169.254"
AWS_TOKEN_TTL_S = 6 * 3600
AWS_NOTICE_S = 120.0
GOOGLE_METADATA = "http://metadata.google.internal"
GOOGLE_NOTICE_S = 30.0
METADATA_TIMEOUT_S = 1.0
MAX_METADATA_BYTES = 64 * 1024


class Kind(StrEnum):
    """``REBALANCE`` is a hint: the machine may be taken soon. After an ``INTERRUPTION`` it will be, at a known time."""

    REBALANCE = "rebalance"
    INTERRUPTION = "interruption"


@dataclass(frozen=True, slots=True)
class Notice:
    """What a source said. ``seconds_left`` counts from the moment when it was asked; infinite for a mere hint."""

    kind: Kind
    source: str
    seconds_left: float = math.inf


class NoticeSource(Protocol):
    """Something that knows when this machine goes."""

    name: str

    @property
    def interval_s(self) -> float | None:
        """How often to ask; None for one that says by itself when it is worth it."""

    def ask(self) -> Notice | None:
        """Return what there is to say now, if anything. May block for a second or two.

        Raises:
            OSError: it cannot be reached.
            ValueError: its answer makes no sense.
        """


class AwsNotices:
    """The instance metadata of EC2, version 2: an interruption, else a rebalance recommendation."""

    name = "aws"
    interval_s = 5.0

    def __init__(self, base_url: str = AWS_METADATA, utc_now: Callable[[], datetime] | None = None) -> None:
        self._base_url = base_url
        self._utc_now = utc_now or (lambda: datetime.now(UTC))
        self._token: str | None = None

    def ask(self) -> Notice | None:
        if (action := self._get("/latest/meta-data/spot/instance-action")) is not None:
            return aws_interruption(action, self._utc_now())
        if self._get("/latest/meta-data/events/recommendations/rebalance") is not None:
            return Notice(Kind.REBALANCE, self.name)
        return None

    def _get(self, path: str) -> bytes | None:
        """Read an item, with a fresh token where the old one has expired; None where there is no such item."""
        for is_last in (False, True):
            self._token = self._token or self._new_token()
            try:
                return _read(self._base_url + path, {"X-aws-ec2-metadata-token": self._token})
            except OSError as error:
                status = getattr(error, "code", None)
                if status == 404:
                    return None
                if status != 401 or is_last:
                    raise
                self._token = None
        raise AssertionError

    def _new_token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
        return _read(f"{self._base_url}/latest/api/token", headers, "PUT").decode("ascii")


class GoogleNotices:
    """The metadata server of Compute Engine: whether this machine was preempted, some 30 s before it is stopped."""

    name = "google"
    interval_s = 1.0

    def __init__(self, base_url: str = GOOGLE_METADATA) -> None:
        self._base_url = base_url

    def ask(self) -> Notice | None:
        url = f"{self._base_url}/computeMetadata/v1/instance/preempted"
        return google_preemption(_read(url, {"Metadata-Flavor": "Google"}).decode("ascii"))


class FileNotices:
    """A file that an operator writes, or a test: empty, or ``{"kind": "interruption", "seconds_left": 30}``."""

    name = "file"
    interval_s = 0.25

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self) -> Notice | None:
        try:
            written = self._path.read_bytes()
            age_s = time.time() - self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        return written_notice(written, age_s)


class ToldNotices:
    """What somebody else in this process was told: a signal's handler, or a platform's exit hook (Modal's)."""

    name = "told"
    interval_s = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_at: float | None = None
        self._wake: Callable[[], object] | None = None

    @property
    def told(self) -> bool:
        return self._ends_at is not None

    def tell(self, seconds_left: float) -> None:
        """Say that this machine goes in so many seconds. May be called from a signal handler, and from any thread."""
        self._ends_at = self._clock() + seconds_left
        if self._wake is not None:
            with contextlib.suppress(RuntimeError):  # nobody listens any more
                self._wake()

    def when_told(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, on whatever thread, when there is something to say."""
        self._wake = wake

    def ask(self) -> Notice | None:
        if self._ends_at is None:
            return None
        return Notice(Kind.INTERRUPTION, self.name, max(0.0, self._ends_at - self._clock()))


def aws_interruption(action: bytes, utc_now: datetime) -> Notice | None:
    """Read ``spot/instance-action``; a machine that is only to hibernate goes as well.

    Raises:
        ValueError: it makes no sense.
    """
    found = msgspec.json.decode(action, type=_InstanceAction)
    if found.action not in ("stop", "terminate", "hibernate"):
        return None
    return Notice(Kind.INTERRUPTION, AwsNotices.name, max(0.0, (found.time - utc_now).total_seconds()))


def google_preemption(answer: str) -> Notice | None:
    """Read ``instance/preempted``.

    Raises:
        ValueError: it makes no sense.
    """
    if answer.strip() not in ("TRUE", "FALSE"):
        raise ValueError(f"{answer[:40]!r} is neither TRUE nor FALSE")
    return Notice(Kind.INTERRUPTION, GoogleNotices.name, GOOGLE_NOTICE_S) if answer.strip() == "TRUE" else None


def written_notice(written: bytes, age_s: float) -> Notice:
    """Read the file of ``FileNotices``, which is ``age_s`` old.

    Raises:
        ValueError: it makes no sense.
    """
    found = msgspec.json.decode(written, type=_Written) if written.strip() else _Written()
    if found.kind is Kind.REBALANCE:
        return Notice(Kind.REBALANCE, FileNotices.name)
    return Notice(Kind.INTERRUPTION, FileNotices.name, max(0.0, found.seconds_left - age_s))


def open_source(name: str) -> NoticeSource | None:
    """Return the source of a setting: ``aws``, ``google``, ``file:PATH`` with variables, or nothing for none.

    Raises:
        ConfigError: there is no such source.
    """
    if not name:
        return None
    if name == "aws":
        return AwsNotices()
    if name == "google":
        return GoogleNotices()
    if name.startswith("file:") and name != "file:":
        return FileNotices(Path(os.path.expandvars(name.removeprefix("file:"))))
    raise ConfigError(f"notices is {name!r}; expected aws, google or file:PATH")


async def watch(sources: Sequence[NoticeSource], on_notice: Callable[[Notice], None]) -> None:
    """Ask the sources for ever, each in its own time, and pass on what is new: a hint once, an interruption once."""
    told: set[Kind] = set()

    def tell(notice: Notice) -> None:
        if notice.kind not in told:
            told.add(notice.kind)
            level = logging.INFO if notice.source == ToldNotices.name else logging.WARNING  # who told it, knows it
            logger.log(level, "%s notice from %s: %.0f s left", notice.kind, notice.source, notice.seconds_left)
            on_notice(notice)

    async with asyncio.TaskGroup() as tasks:
        for source in sources:
            tasks.create_task(_watch(source, tell), name=f"notices of {source.name}")


async def _watch(source: NoticeSource, tell: Callable[[Notice], None]) -> None:
    silent = False
    told = asyncio.Event()
    if isinstance(source, ToldNotices):
        source.when_told(partial(asyncio.get_running_loop().call_soon_threadsafe, told.set))
    while True:
        told.clear()
        try:
            notice = await asyncio.to_thread(source.ask)
            silent = False
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            notice = None
            if not silent:
                logger.warning("no notices from %s (%s)", source.name, error)
            silent = True
        if notice is not None:
            tell(notice)
        await (told.wait() if source.interval_s is None else asyncio.sleep(source.interval_s))


class _InstanceAction(msgspec.Struct, frozen=True):
    action: str
    time: Annotated[datetime, msgspec.Meta(tz=True)]


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Kind = Kind.INTERRUPTION
    seconds_left: float = AWS_NOTICE_S


def _read(url: str, headers: dict[str, str], method: str = "GET") -> bytes:
    import urllib.request  # here, because it takes a while, and most hosts ask no such server
    from http.client import HTTPException
    from urllib.error import HTTPError

    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310 - http, and not a client's URL
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=METADATA_TIMEOUT_S) as response:
            found: bytes = response.read(MAX_METADATA_BYTES)
            return found
    except HTTPError as error:
        error.close()
        raise
    except HTTPException as error:  # whoever has this address here does not speak HTTP
        raise OSError(f"{type(error).__name__}: {error}") from error
