"""The keys of a ledger: looked up for every request, and changed by `pilotlight keys`, also while a server runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import msgspec

from pilotlight.errors import ConfigError, LedgerUnavailable
from pilotlight.metering.database import (
    FAILURES,
    Connected,
    Connection,
    Location,
    connect_reader,
    connect_writer,
    transaction,
)
from pilotlight.metering.keys import Key, Limits, Secret, matches, new_key_id, new_token, split_token
from pilotlight.metering.record import utc_text

_ACTIVE = """
SELECT key, salt, hash FROM keys JOIN key_secrets USING (key_id)
WHERE key_id = ? AND revoked_at_utc IS NULL AND (expires_at_utc IS NULL OR expires_at_utc > ?)
"""
_NOBODY = Secret(bytes(16), bytes(32))


class ListedKey(msgspec.Struct, frozen=True):
    """A key as `pilotlight keys list` shows it."""

    key: Key
    revoked_at_utc: str | None


class Keyring(Connected):
    """A read-only view of a ledger's keys; every call sees what was changed before it."""

    def __init__(self, location: Location) -> None:
        """Open the keys of the ledger at ``location``.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: there is none, it cannot be opened or it is not a ledger.
        """
        super().__init__(connect_reader(location))

    @property
    def guarded(self) -> bool:
        """Whether there was ever a key. A revoked one counts: revoking the last key must not open the door."""
        return self._one("SELECT EXISTS (SELECT 1 FROM keys)")

    @property
    def usable(self) -> bool:
        """Whether there is a key that is not revoked."""
        return self._one("SELECT EXISTS (SELECT 1 FROM keys WHERE revoked_at_utc IS NULL)")

    def find(self, token: str) -> Key | None:
        """Return the key that a token opens, or None when it opens nothing.

        Raises:
            LedgerUnavailable: the keys cannot be read.
        """
        key_id, secret = split_token(token) or ("", "")
        try:
            rows = self._connection.execute(_ACTIVE, (key_id, utc_text(datetime.now(UTC)))).fetchall()
        except FAILURES as error:
            raise _unreadable(error) from error
        if not rows:
            matches(secret, _NOBODY)  # an unknown key id takes as long as a wrong secret
        for key, salt, kept in rows:
            if matches(secret, Secret(salt, kept)):
                return msgspec.json.decode(key, type=Key)
        return None

    def _one(self, statement: str) -> bool:
        try:
            (found,) = self._connection.execute(statement).fetchone()
        except FAILURES as error:
            raise _unreadable(error) from error
        return bool(found)


class KeyDesk(Connected):
    """Creates, lists, revokes and rotates the keys of a ledger. Each change is one transaction."""

    def __init__(self, location: Location) -> None:
        """Open the ledger at ``location``, or create it.

        Raises:
            StartupError: a newer version of Pilotlight wrote it.
            ConfigError: it cannot be opened.
        """
        super().__init__(connect_writer(location))

    def create(
        self, name: str, tenant: str, functions: tuple[str, ...] | None, limits: Limits, *, admin: bool = False
    ) -> tuple[Key, str]:
        """Keep a new key, and return it with its token, which cannot be had again."""
        key = Key(
            key_id=new_key_id(),
            name=name,
            tenant=tenant,
            created_at_utc=utc_text(datetime.now(UTC)),
            functions=functions,
            admin=admin,
            limits=limits,
        )
        token, secret = new_token(key.key_id)
        with self._transaction() as connection:
            row = (key.key_id, msgspec.json.encode(key).decode())
            connection.execute("INSERT INTO keys (key_id, key) VALUES (?, ?)", row)
            self._keep(key.key_id, secret)
        return key, token

    def listed(self) -> list[ListedKey]:
        """Return all keys, the oldest first."""
        rows = self._connection.execute("SELECT key, revoked_at_utc FROM keys").fetchall()
        found = [ListedKey(msgspec.json.decode(key, type=Key), revoked) for key, revoked in rows]
        return sorted(found, key=lambda listed: listed.key.created_at_utc)

    def revoke(self, key_id: str) -> None:
        """End a key at once and for good; its records stay.

        Raises:
            ConfigError: there is no such key, or it was revoked before.
        """
        with self._transaction() as connection:
            self._check_is_usable(key_id)
            now = utc_text(datetime.now(UTC))
            connection.execute("UPDATE keys SET revoked_at_utc = ? WHERE key_id = ?", (now, key_id))
            connection.execute("DELETE FROM key_secrets WHERE key_id = ?", (key_id,))

    def rotate(self, key_id: str, grace: timedelta = timedelta(0)) -> str:
        """Give a key a new secret and return its token; the old one ends after ``grace``. Limits and use go on.

        Raises:
            ConfigError: there is no such key, or it was revoked.
        """
        token, secret = new_token(key_id)
        with self._transaction() as connection:
            self._check_is_usable(key_id)
            now = datetime.now(UTC)
            connection.execute(
                "UPDATE key_secrets SET expires_at_utc = CASE WHEN expires_at_utc < :end THEN expires_at_utc "
                "ELSE :end END WHERE key_id = :id",
                {"end": utc_text(now + grace), "id": key_id},
            )
            connection.execute("DELETE FROM key_secrets WHERE expires_at_utc <= ?", (utc_text(now),))
            self._keep(key_id, secret)
        return token

    def _keep(self, key_id: str, secret: Secret) -> None:
        row = (key_id, secret.salt, secret.hash)
        self._connection.execute("INSERT INTO key_secrets (key_id, salt, hash) VALUES (?, ?, ?)", row)

    def _check_is_usable(self, key_id: str) -> None:
        row = self._connection.execute("SELECT revoked_at_utc FROM keys WHERE key_id = ?", (key_id,)).fetchone()
        if row is None:
            raise ConfigError(f"there is no key {key_id!r}")
        if row[0] is not None:
            raise ConfigError(f"the key {key_id!r} was revoked at {row[0]}")

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with transaction(self._connection) as connection:
                yield connection
        except FAILURES as error:
            raise LedgerUnavailable(f"the keys cannot be changed ({error})") from error


def _unreadable(error: Exception) -> LedgerUnavailable:
    return LedgerUnavailable(f"the API keys cannot be read ({error})")
