"""Keys: what is kept of them, whom they let in, and how they are changed beside a running server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from ledgers import KINDS, fresh
from pilotlight.errors import ConfigError
from pilotlight.metering.database import Location
from pilotlight.metering.keyring import KeyDesk, Keyring
from pilotlight.metering.keys import Key, Limits, matches, new_token, split_token


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest) -> Iterator[Location]:
    with fresh(request.param) as location:
        yield location


@pytest.fixture
def desk(path: Location) -> Iterator[KeyDesk]:
    with KeyDesk(path) as desk:
        yield desk


@pytest.fixture
def ring(desk: KeyDesk, path: Location) -> Iterator[Keyring]:
    with Keyring(path) as ring:
        yield ring


def create(desk: KeyDesk, name: str = "app") -> tuple[Key, str]:
    return desk.create(name, "acme", ("toy",), Limits(tokens_per_day=10))


def test_a_token_opens_its_key(desk: KeyDesk, ring: Keyring) -> None:
    key, token = create(desk)
    other, _ = create(desk, "other")
    assert ring.find(token) == key
    assert (key.name, key.tenant, key.functions, key.limits) == ("app", "acme", ("toy",), Limits(tokens_per_day=10))
    assert key.key_id != other.key_id


def test_only_a_salted_hash_is_kept(tmp_path: Path) -> None:
    with KeyDesk(tmp_path / "usage.db") as desk:
        _, token = create(desk)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert token.rpartition("_")[2].encode() not in kept
    (_, first), (_, second) = new_token("0" * 16), new_token("0" * 16)
    assert first.salt != second.salt


@pytest.mark.parametrize("change", ["", "x", "pl_", "pl_0123456789abcdef_", "Bearer", "pl_\N{DIGIT ONE}"])
def test_what_is_no_token_opens_nothing(desk: KeyDesk, ring: Keyring, change: str) -> None:
    create(desk)
    assert ring.find(change) is None


def test_a_wrong_secret_and_a_wrong_key_id_open_nothing(desk: KeyDesk, ring: Keyring) -> None:
    _, token = create(desk)
    head, secret = token[:20], token[20:]
    assert ring.find(head + secret[::-1]) is None
    assert ring.find("pl_" + "0" * 16 + "_" + secret) is None
    assert ring.find(token + "A") is None


def test_a_secret_with_dashes_and_underscores_is_split_at_the_right_place() -> None:
    assert split_token("pl_0123456789abcdef_" + "_-" * 21 + "_") == ("0123456789abcdef", "_-" * 21 + "_")
    token, kept = new_token("0123456789abcdef")
    found = split_token(token)
    assert found is not None
    assert matches(found[1], kept)


def test_a_revoked_key_opens_nothing_and_keeps_the_door_closed(desk: KeyDesk, ring: Keyring) -> None:
    assert (ring.guarded, ring.usable) == (False, False)
    key, token = create(desk)
    assert (ring.guarded, ring.usable) == (True, True)
    desk.revoke(key.key_id)
    assert ring.find(token) is None
    assert (ring.guarded, ring.usable) == (True, False)
    (listed,) = desk.listed()
    assert listed.key == key
    assert listed.revoked_at_utc is not None


def test_a_rotated_key_has_a_new_token_and_the_same_id(desk: KeyDesk, ring: Keyring) -> None:
    key, old = create(desk)
    new = desk.rotate(key.key_id)
    assert ring.find(old) is None
    assert ring.find(new) == key


def test_with_grace_the_old_token_lives_on_and_an_older_one_not_longer(desk: KeyDesk, ring: Keyring) -> None:
    key, first = create(desk)
    second = desk.rotate(key.key_id, timedelta(hours=1))
    third = desk.rotate(key.key_id, timedelta(days=1))
    assert [ring.find(token) for token in (first, second, third)] == [key, key, key]
    fourth = desk.rotate(key.key_id)
    assert [ring.find(token) for token in (first, second, third, fourth)] == [None, None, None, key]


@pytest.mark.parametrize("change", ["revoke", "rotate"])
def test_what_cannot_be_changed_says_why(desk: KeyDesk, change: str) -> None:
    key, _ = create(desk)
    with pytest.raises(ConfigError, match="there is no key 'none'"):
        getattr(desk, change)("none")
    desk.revoke(key.key_id)
    with pytest.raises(ConfigError, match=re.escape(f"the key {key.key_id!r} was revoked at ")):
        getattr(desk, change)(key.key_id)
