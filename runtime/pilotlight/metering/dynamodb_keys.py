"""API keys in the table of a DynamoDB ledger: looked up by the Lambda function, and changed by `pilotlight keys`.

A key is an item whose partition key no request can have, since request ids have no slash. Limits would take a
transaction over several items for each admission, so keys here have none: the function's concurrency bounds the use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import msgspec

from pilotlight.errors import ConfigError, LedgerUnavailable
from pilotlight.metering.aws_client import new_client, table_of
from pilotlight.metering.keyring import ListedKey
from pilotlight.metering.keys import Key, Limits, Secret, matches, new_key_id, new_token, split_token
from pilotlight.metering.record import utc_text

PREFIX = "key/"
REMEMBERED_S = 30.0
"""How long a sandbox takes a key as it was; so long, a revoked one may still be good."""
_NOBODY = Secret(bytes(16), bytes(32))


class KeptSecret(msgspec.Struct, frozen=True):
    """A secret as it lies in the table."""

    salt: bytes
    hash: bytes
    expires_at_utc: str | None = None

    def is_valid(self, now_utc: str) -> bool:
        return self.expires_at_utc is None or self.expires_at_utc > now_utc


class KeptKey(msgspec.Struct, frozen=True):
    """A key as it lies in the table, in one piece, so that every change is one conditional write."""

    key: Key
    secrets: list[KeptSecret]
    revoked_at_utc: str | None = None


class DynamoDbKeyring:
    """Finds keys. Whoever has one of these wants every request to have a key."""

    guarded = True

    def __init__(self, table: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Look keys up in ``table``.

        Raises:
            ConfigError: boto3 is not installed.
        """
        self._table = table
        self._clock = clock
        self._client = new_client("dynamodb")
        self._remembered: dict[str, tuple[float, KeptKey | None]] = {}

    def reconnect(self) -> None:
        """Go on in a copy of the process that was restored from a snapshot, where no connection is alive."""
        self._client = new_client("dynamodb")
        self._remembered.clear()

    def find(self, token: str) -> Key | None:
        """Return the key that a token opens, or None when it opens nothing.

        Raises:
            LedgerUnavailable: the table cannot be read.
        """
        key_id, secret = split_token(token) or ("", "")
        kept = self._kept(key_id) if key_id else None
        now_utc = utc_text(datetime.now(UTC))
        if kept is None or kept.revoked_at_utc is not None:
            matches(secret, _NOBODY)  # an unknown key id takes as long as a wrong secret
            return None
        valid = [Secret(one.salt, one.hash) for one in kept.secrets if one.is_valid(now_utc)]
        return kept.key if any(matches(secret, one) for one in valid) else None

    def _kept(self, key_id: str) -> KeptKey | None:
        now = self._clock()
        known = self._remembered.get(key_id)
        if known is not None and known[0] > now:
            return known[1]
        kept = _read(self._client, self._table, key_id)
        self._remembered = {other: entry for other, entry in self._remembered.items() if entry[0] > now}
        if kept is not None:  # what strangers make up is not remembered
            self._remembered[key_id] = (now + REMEMBERED_S, kept)
        return kept


class DynamoDbKeyDesk:
    """Creates, lists, revokes and rotates keys, each change in one conditional write."""

    def __init__(self, url: str) -> None:
        """Change the keys of the table in ``dynamodb://TABLE``.

        Raises:
            ConfigError: boto3 is not installed.
        """
        self._table = table_of(url)
        self._client = new_client("dynamodb")

    def create(
        self, name: str, tenant: str, functions: tuple[str, ...] | None, limits: Limits, *, admin: bool = False
    ) -> tuple[Key, str]:
        """Keep a new key, and return it with its token, which cannot be had again.

        Raises:
            ConfigError: it is to have limits.
        """
        if msgspec.structs.replace(limits, currency="USD") != Limits():
            raise ConfigError("keys on DynamoDB have no limits; bound the function's concurrency and max_answer_tokens")
        key = Key(
            key_id=new_key_id(),
            name=name,
            tenant=tenant,
            created_at_utc=utc_text(datetime.now(UTC)),
            functions=functions,
            admin=admin,
        )
        token, secret = new_token(key.key_id)
        self._write(KeptKey(key, [KeptSecret(*secret)]), None)
        return key, token

    def listed(self) -> list[ListedKey]:
        """Return all keys, the oldest first."""
        found = [ListedKey(kept.key, kept.revoked_at_utc) for kept in self._all()]
        return sorted(found, key=lambda listed: listed.key.created_at_utc)

    def revoke(self, key_id: str) -> None:
        """End a key for good; its records stay.

        Raises:
            ConfigError: there is no such key, or it was revoked before.
        """
        kept = self._usable(key_id)
        now_utc = utc_text(datetime.now(UTC))
        self._write(msgspec.structs.replace(kept, secrets=[], revoked_at_utc=now_utc), kept)

    def rotate(self, key_id: str, grace: timedelta = timedelta(0)) -> str:
        """Give a key a new secret and return its token; the old one ends after ``grace``.

        Raises:
            ConfigError: there is no such key, or it was revoked.
        """
        kept = self._usable(key_id)
        token, secret = new_token(key_id)
        now = datetime.now(UTC)
        end = utc_text(now + grace)
        older = [
            msgspec.structs.replace(one, expires_at_utc=min(one.expires_at_utc or end, end)) for one in kept.secrets
        ]
        still = [one for one in older if one.is_valid(utc_text(now))]
        self._write(msgspec.structs.replace(kept, secrets=[*still, KeptSecret(*secret)]), kept)
        return token

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _usable(self, key_id: str) -> KeptKey:
        kept = _read(self._client, self._table, key_id)
        if kept is None:
            raise ConfigError(f"there is no key {key_id!r}")
        if kept.revoked_at_utc is not None:
            raise ConfigError(f"the key {key_id!r} was revoked at {kept.revoked_at_utc}")
        return kept

    def _write(self, kept: KeptKey, before: KeptKey | None) -> None:
        """Put a key in the place of what it was ``before``."""
        item = {**_place(kept.key.key_id), "api_key": {"S": _json(kept)}}
        condition: dict[str, Any] = {"ConditionExpression": "attribute_not_exists(request_id)"}
        if before is not None:
            values = {":before": {"S": _json(before)}}
            condition = {"ConditionExpression": "api_key = :before", "ExpressionAttributeValues": values}
        try:
            self._client.put_item(TableName=self._table, Item=item, **condition)
        except self._client.exceptions.ConditionalCheckFailedException as error:
            raise ConfigError(f"the key {kept.key.key_id!r} is being changed by somebody else; try again") from error
        except Exception as error:  # botocore's errors have no base class in common
            raise LedgerUnavailable(f"the keys cannot be changed ({error})") from error

    def _all(self) -> Iterator[KeptKey]:
        scan = self._client.get_paginator("scan").paginate(
            TableName=self._table, ConsistentRead=True, FilterExpression="attribute_exists(api_key)"
        )
        try:
            for page in scan:
                for item in page["Items"]:
                    yield msgspec.json.decode(item["api_key"]["S"], type=KeptKey)
        except Exception as error:  # as above
            raise LedgerUnavailable(f"the API keys cannot be read ({error})") from error


def _read(client: Any, table: str, key_id: str) -> KeptKey | None:
    try:
        item = client.get_item(TableName=table, Key=_place(key_id), ConsistentRead=True).get("Item")
    except Exception as error:  # as above
        raise LedgerUnavailable(f"the API keys cannot be read ({error})") from error
    return None if item is None else msgspec.json.decode(item["api_key"]["S"], type=KeptKey)


def _place(key_id: str) -> dict[str, dict[str, str]]:
    return {"request_id": {"S": f"{PREFIX}{key_id}"}}


def _json(kept: KeptKey) -> str:
    return msgspec.json.encode(kept).decode()
