"""What is kept of responses: whose, for how long, how much, and over a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.api.response_store import IN_MEMORY, ResponseStore, StoredResponse
from pilotlight.errors import ConfigError, ResponseStoreUnavailable

OVERHEAD = len(b"[]")
"""An empty conversation, as JSON."""


def stored(num_bytes: int = 100) -> StoredResponse:
    return StoredResponse(b"r" * (num_bytes - OVERHEAD), b"", [])


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_response_is_its_owners_until_it_expires() -> None:
    clock = Clock()

    async def scenario() -> None:
        with ResponseStore(IN_MEMORY, 60, 1000, clock) as store:
            conversation = [{"role": "user", "content": "hi"}]
            kept = StoredResponse(b"{}", b"[]", conversation)
            assert await store.put("acme", "r1", kept)
            assert await store.get("acme", "r1") == kept
            assert await store.get("other", "r1") is None
            assert not await store.delete("other", "r1")
            clock.now += 60
            assert await store.get("acme", "r1") is None
            assert not await store.delete("acme", "r1")

    asyncio.run(scenario())


def test_a_deleted_response_is_gone_and_its_place_is_free() -> None:
    async def scenario() -> None:
        with ResponseStore(IN_MEMORY, 60, 200) as store:
            assert await store.put("acme", "r1", stored(150))
            assert await store.delete("acme", "r1")
            assert await store.get("acme", "r1") is None
            assert await store.put("acme", "r2", stored(50))
            assert await store.put("acme", "r3", stored(150))
            assert await store.get("acme", "r2") is not None

    asyncio.run(scenario())


def test_whoever_has_most_loses_the_oldest_first() -> None:
    async def scenario() -> None:
        with ResponseStore(IN_MEMORY, 60, 500) as store:
            await store.put("small", "s1", stored(100))
            for number in range(10):
                await store.put("large", f"l{number}", stored(100))
            assert await store.get("small", "s1") is not None
            left = [number for number in range(10) if await store.get("large", f"l{number}") is not None]
            assert left == [6, 7, 8, 9]

    asyncio.run(scenario())


def test_what_is_too_large_is_not_kept_and_costs_nobody_else_anything() -> None:
    async def scenario() -> None:
        with ResponseStore(IN_MEMORY, 60, 500) as store:
            await store.put("small", "s1", stored(100))
            assert not await store.put("large", "l1", stored(501))
            assert await store.get("small", "s1") is not None
        with ResponseStore(IN_MEMORY, 0, 500) as store:
            assert not await store.put("acme", "r1", stored())
            assert await store.get("acme", "r1") is None

    asyncio.run(scenario())


def test_a_file_is_kept_over_a_restart_with_its_bounds(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")

    async def scenario() -> None:
        with ResponseStore(path, 60, 300) as store:
            await store.put("acme", "r1", stored(200))
        with ResponseStore(path, 60, 300) as store:
            assert await store.get("acme", "r1") == stored(200)
            await store.put("acme", "r2", stored(200))
            assert await store.get("acme", "r1") is None
            assert await store.get("acme", "r2") is not None

    asyncio.run(scenario())


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "delete", "wait"]),
            st.sampled_from(["a", "b", "c"]),
            st.integers(0, 5),
            st.integers(OVERHEAD, 400),
        ),
        max_size=30,
    )
)
def test_whatever_happens_the_bounds_hold(steps: list[tuple[str, str, int, int]]) -> None:
    clock = Clock()

    async def scenario() -> None:
        with ResponseStore(IN_MEMORY, 10, 1000, clock) as store:
            newest: dict[tuple[str, str], tuple[float, int]] = {}
            for kind, owner, number, num_bytes in steps:
                place = (owner, f"r{number}")
                if kind == "put":
                    assert await store.put(*place, stored(num_bytes))
                    newest[place] = (clock.now + 10, num_bytes)
                elif kind == "delete":
                    await store.delete(*place)
                    newest.pop(place, None)
                else:
                    clock.now += number
                found = {place: await store.get(*place) for place in newest}
                held = {place: kept for place, kept in found.items() if kept is not None}
                assert sum(len(kept.response) + OVERHEAD for kept in held.values()) <= 1000
                for place, kept in held.items():
                    expires_at, size = newest[place]
                    assert clock.now < expires_at
                    assert len(kept.response) + OVERHEAD == size

    asyncio.run(scenario())


def test_nobody_else_can_read_the_file(tmp_path: Path) -> None:
    with ResponseStore(str(tmp_path / "responses.db"), 60, 300) as store:
        assert asyncio.run(store.put("acme", "r1", stored()))
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"responses.db": 0o600, "responses.db-wal": 0o600, "responses.db-shm": 0o600}


def test_a_database_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"responses\.db: cannot be used to keep responses"):
        ResponseStore(str(path), 60, 300)


def test_a_database_that_breaks_later_costs_no_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        with ResponseStore(str(tmp_path / "responses.db"), 60, 300) as store:
            store._database.execute("DROP TABLE responses")
            assert not await store.put("acme", "r1", stored())
            with pytest.raises(ResponseStoreUnavailable):
                await store.get("acme", "r1")

    asyncio.run(scenario())
