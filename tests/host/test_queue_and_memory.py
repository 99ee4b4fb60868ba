"""What waits, who leaves when memory is short, what was verified before, and frames in pieces."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.engine.prefix_keys import block_keys
from pilotlight.errors import ArtifactError
from pilotlight.host.backlog import Backlog
from pilotlight.host.journal import Entry
from pilotlight.host.machine import Machine, Room
from pilotlight.host.memory import Idle, evictions
from pilotlight.host.routing import Choice, KnownPrefixes, route
from pilotlight.host.verified import FILE, Verified
from pilotlight.host.wire import Abort, FrameReader, encode, frame, to_replica
from pilotlight.request import Sequence
from support import write_artifact


def entry(name: str, num_tokens: int = 1, tenant: str | None = None) -> Entry:
    return Entry(Sequence(name, (1,) * num_tokens, 1, tenant=tenant), 0.0)


def names(backlog: Backlog) -> list[str]:
    return [backlog.pop().sequence.id for _ in range(len(backlog))]


def test_first_come_first_served_within_a_tenant() -> None:
    backlog = Backlog()
    for name in "abc":
        backlog.push(entry(name))
    backlog.push_front(entry("moved"))
    assert names(backlog) == ["moved", "a", "b", "c"]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 500)), max_size=60))
def test_tenants_that_wait_are_served_alike(pushed: list[tuple[str, int]]) -> None:
    backlog = Backlog()
    largest = max((num_tokens for _, num_tokens in pushed), default=0)
    waiting: dict[str, int] = {}
    for number, (whose, num_tokens) in enumerate(pushed):
        backlog.push(entry(str(number), num_tokens, whose))
        waiting[whose] = waiting.get(whose, 0) + 1
    assert backlog.num_tokens == sum(num_tokens for _, num_tokens in pushed)
    served = dict.fromkeys(waiting, 0)
    while backlog:
        popped = backlog.pop()
        assert popped.sequence.tenant is not None
        tenant = popped.sequence.tenant
        served[tenant] += popped.num_prefill_tokens
        waiting[tenant] -= 1
        still = [served[name] for name, count in waiting.items() if count] + [served[tenant]]
        assert max(still) - min(still) <= 2 * largest
    assert backlog.num_tokens == 0


def test_being_away_saves_nothing_up() -> None:
    backlog = Backlog()
    for number in range(50):
        backlog.push(entry(f"early{number}", 10, "early"))
    for _ in range(40):
        backlog.pop()
    for number in range(20):
        backlog.push(entry(f"late{number}", 10, "late"))
    order = [backlog.pop().sequence.tenant for _ in range(10)]
    assert 4 <= order.count("early") <= 6


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_what_is_removed_is_gone(pushed: list[int], removed: list[int]) -> None:
    backlog = Backlog()
    entries = [entry(str(number), 3, f"tenant {number}") for number in pushed]
    for one in entries:
        backlog.push(one)
    for number in removed:
        if number < len(entries):
            backlog.remove(entries[number])
    left = {id(one) for one in backlog}
    assert left == {id(one) for index, one in enumerate(entries) if index not in removed}
    assert (len(backlog), backlog.num_tokens) == (len(left), 3 * len(left))


def test_the_least_regretted_leaves_first() -> None:
    quick = Idle("quick", 100, restart_ms=50, idle_s=10)
    slow = Idle("slow", 100, restart_ms=5000, idle_s=10)
    forgotten = Idle("forgotten", 100, restart_ms=5000, idle_s=36_000)
    everybody = [slow, quick, forgotten]
    assert evictions(0, everybody) == []
    assert evictions(50, everybody) == [forgotten]
    assert evictions(150, everybody) == [forgotten, quick]
    assert evictions(301, everybody) is None


@given(st.integers(0, 500), st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1e4), st.floats(0, 1e5))))
def test_evictions_free_enough_and_no_more(missing: int, found: list[tuple[int, float, float]]) -> None:
    idle = [Idle(str(number), *one) for number, one in enumerate(found)]
    chosen = evictions(missing, idle)
    if chosen is None:
        assert sum(one.num_bytes for one in idle) < missing
    else:
        assert sum(one.num_bytes for one in chosen) >= missing
        assert sum(one.num_bytes for one in chosen[:-1]) < missing or not chosen


def test_memory_is_never_promised_twice() -> None:
    async def run() -> None:
        machine = Machine(100, free_bytes=lambda: 1000)
        assert machine.take("a", 60) is Room.TAKEN
        assert machine.take("b", 60) is Room.LATER
        assert machine.take("c", 101) is Room.NEVER
        machine.release("a")
        assert machine.take("b", 60) is Room.TAKEN

    asyncio.run(run())


def test_the_machines_own_memory_counts_too() -> None:
    machine = Machine(100, free_bytes=lambda: 30)
    assert machine.take("a", 60) is Room.NEVER
    assert machine.take("b", 20) is Room.TAKEN


class Ticked:
    """A tenant whose tick may fail."""

    def __init__(self, *, fails: bool) -> None:
        self.num_ticks = 0
        self._fails = fails

    def idle(self) -> list[Idle]:
        return []

    def evict(self, name: str) -> None:
        raise AssertionError

    def act(self) -> None:
        raise AssertionError

    def tick(self) -> None:
        self.num_ticks += 1
        if self._fails:
            raise ValueError


def test_a_defect_of_one_function_does_not_stop_the_clock() -> None:
    machine = Machine(100, free_bytes=lambda: 100)
    tenants = [Ticked(fails=True), Ticked(fails=False)]
    for tenant in tenants:
        machine.join(tenant)
    for _ in range(2):
        machine.tick()
    assert [tenant.num_ticks for tenant in tenants] == [2, 2]


def test_routing() -> None:
    assert route([Choice(10, 0), Choice(5, 0)]) == 1
    assert route([Choice(100, 64), Choice(50, 0)]) == 0


def test_what_a_replica_knows_of_a_prompt() -> None:
    def keys(tokens: Iterable[int], tenant: str = "t") -> list[bytes]:
        return block_keys((tenant, None), tuple(tokens), 64)

    known = KnownPrefixes(64)
    known.begin(keys(range(200)))
    known.begin(keys(range(100)))
    assert known.num_tokens(keys(range(130))) == 128
    assert known.num_tokens(keys([7, *range(130)])) == 0
    assert known.num_tokens(keys(range(130), "other")) == 0
    known.end(keys(range(200)))
    assert known.num_tokens(keys(range(130))) == 64
    known.change(dict.fromkeys(keys(range(200)), True))
    known.end(keys(range(100)))
    assert known.num_tokens(keys(range(130))) == 128
    known.change({keys(range(130))[0]: False})
    assert known.num_tokens(keys(range(130))) == 0, "what follows a lost block is of no use"


@given(st.lists(st.text(max_size=300), max_size=20), st.integers(1, 64))
def test_frames_survive_any_cut(ids: list[str], size: int) -> None:
    sent = b"".join(frame(Abort(name)) for name in ids)
    reader = FrameReader()
    pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
    assert [to_replica.decode(payload) for piece in pieces for payload in reader.feed(piece)] == [
        Abort(name) for name in ids
    ]


def test_a_frame_of_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        list(FrameReader().feed(b"\xff\xff\xff\xff"))


def test_messages_without_frames_are_the_same() -> None:
    assert to_replica.decode(encode(Abort("a"))) == Abort("a")


class TestVerified:
    @pytest.fixture
    def artifact(self, tmp_path: Path) -> Artifact:
        return open_artifact(write_artifact(tmp_path / "artifact"))

    def test_files_are_read_once(self, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []
        monkeypatch.setattr(Artifact, "verify_file", lambda self, name: read.append(name))
        Verified(tmp_path).verify(artifact)
        assert sorted(read) == sorted(artifact.manifest.files)
        read.clear()
        Verified(tmp_path).verify(artifact)
        assert read == []
        os.utime(artifact.graph_path, ns=(1, 1))
        Verified(tmp_path).verify(artifact)
        assert read == [artifact.graph_path.name]
        read.clear()
        Verified(None).verify(artifact)
        assert sorted(read) == sorted(artifact.manifest.files)

    def test_what_was_altered_is_refused_also_afterwards(self, artifact: Artifact, tmp_path: Path) -> None:
        Verified(tmp_path).verify(artifact)
        artifact.graph_path.write_bytes(b"x" * artifact.graph_path.stat().st_size)
        for _ in range(2):
            with pytest.raises(ArtifactError, match="was altered"):
                Verified(tmp_path).verify(artifact)

    def test_files_that_are_gone_are_forgotten(self, artifact: Artifact, tmp_path: Path) -> None:
        Verified(tmp_path).verify(artifact)
        shutil.rmtree(artifact.path)
        other = open_artifact(write_artifact(tmp_path / "other"))
        Verified(tmp_path).verify(other)
        remembered = json.loads((tmp_path / FILE).read_bytes())
        assert sorted(remembered) == sorted(str(other.path / name) for name in other.manifest.files)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": [1]}'])
    def test_a_memory_that_cannot_be_read_is_none(self, artifact: Artifact, tmp_path: Path, content: bytes) -> None:
        (tmp_path / FILE).write_bytes(content)
        Verified(tmp_path).verify(artifact)

    def test_a_memory_that_others_could_write_is_none(
        self, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Verified(tmp_path).verify(artifact)
        (tmp_path / FILE).chmod(0o666)
        read: list[str] = []
        monkeypatch.setattr(Artifact, "verify_file", lambda self, name: read.append(name))
        Verified(tmp_path).verify(artifact)
        assert read
