"""The usage ledger on DynamoDB: the same promises as the SQLite one, for processes that share no disk.

One item is one invocation. Its partition key is the request id, and every write has a condition, so a second admission
and a second record are impossible, whoever tries. While it is open, ``open_in`` (the function) and ``lease_until`` put
it into the index of open invocations; the record takes both away.

Source: the DynamoDB developer guide, "Condition expressions" and "Take advantage of sparse indexes".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from pilotlight.errors import ConfigError, LedgerUnavailable, PilotlightError, RequestIdInUse, RequestNotFound
from pilotlight.metering.aws_client import new_client
from pilotlight.metering.idempotency import Claim
from pilotlight.metering.limits import Admitted
from pilotlight.metering.marks import Mark
from pilotlight.metering.record import Admission, UsageRecord, crashed_record
from pilotlight.metering.usage import Usage

OPEN_INDEX = "open_invocations"
LEASE_S = 15 * 60 + 60
"""Longer than any invocation may run on Lambda: one that is still open after it was cut off for certain."""

_IS_NEW = "attribute_not_exists(request_id)"
_IS_OPEN = "attribute_exists(request_id) AND attribute_not_exists(#record)"
_CHECKPOINT = "SET #usage = :usage"
_FINISH = "SET #record = :record REMOVE open_in, lease_until"

Item = dict[str, dict[str, str]]


class DynamoDbLedger:
    """A writer and reader of a table, for asyncio callers. Each call is made on a thread and has reached the table."""

    checkpoint_tokens = 32

    def __init__(self, table: str, function: str, environment: str | None, lease_s: float = LEASE_S) -> None:
        """Open the table, and close as crashed what is certain to have been cut off.

        That is what this ``environment`` (a sandbox, under a name that its successor after a crash has, too) left open,
        and what is older than ``lease_s``. The client's settings are boto3's usual ones.

        Raises:
            ConfigError: boto3 is not installed, or the table cannot be used.
        """
        self._table = table
        self._function = function
        self._environment = environment
        self._lease_s = lease_s
        self._client = new_client("dynamodb")
        self._close_crashed()

    def reconnect(self) -> None:
        """Go on in a copy of the process that was restored from a snapshot, where no connection is alive.

        Raises:
            ConfigError: the table cannot be used.
        """
        self._client = new_client("dynamodb")
        self._close_crashed()

    async def admit(self, admission: Admission, claim: Claim | None = None) -> Admitted:
        """Open an invocation. Keys have no limits here, and there are no claims.

        Raises:
            RequestIdInUse: the table holds the request id already.
            LedgerUnavailable: nothing was written.
        """
        item = {
            "request_id": {"S": admission.request_id},
            "admission": {"S": _json(admission)},
            "open_in": {"S": self._function},
            "lease_until": {"N": str(int(time.time() + self._lease_s))},
        }
        if self._environment is not None:
            item["environment"] = {"S": self._environment}
        held = await self._write(self._client.put_item, Item=item, ConditionExpression=_IS_NEW)
        if held is not None and held.get("admission") != item["admission"]:
            raise RequestIdInUse(admission.request_id)
        return Admitted()

    def note(self, marks: Mapping[str, Mark]) -> None:
        """Do nothing: no file outlives a sandbox. What a crash can leave unbilled is up to the checkpoints."""

    async def checkpoint(self, request_id: str, usage: Usage) -> None:
        """Record what an open invocation has used so far, for the case of a crash.

        Raises:
            RequestNotFound: no open invocation has that id.
            LedgerUnavailable: nothing was written.
        """
        held = await self._update(request_id, _CHECKPOINT, {"#usage": "usage"}, {":usage": {"S": _json(usage)}})
        if held is not None:
            raise _not_open(request_id)

    async def finish(self, record: UsageRecord) -> None:
        """End an open invocation by its one record. Writing the same record again changes nothing.

        Raises:
            RequestNotFound: no open invocation has that id, or it ended by another record.
            LedgerUnavailable: the record may not have been written; try again.
        """
        written = {"S": _json(record)}
        held = await self._update(record.request_id, _FINISH, {}, {":record": written})
        if held is not None and held.get("record") != written:
            raise _not_open(record.request_id)

    def get(self, request_id: str) -> UsageRecord | None:
        """Return the record of a finished invocation; blocks until the table has answered.

        Raises:
            LedgerUnavailable: the table cannot be read.
        """
        item = self._item(request_id)
        return msgspec.json.decode(item["record"]["S"], type=UsageRecord) if "record" in item else None

    def receipt(self, request_id: str) -> str | None:
        """Return None: records on DynamoDB are not signed."""
        return None

    async def _update(self, request_id: str, change: str, names: dict[str, str], values: Item) -> Item | None:
        return await self._write(self._client.update_item, **_update(request_id, change, names, values))

    async def _write(self, call: Callable[..., Any], **arguments: Any) -> Item | None:
        """Make a conditional write; where the condition did not hold, return the item that is there (or an empty one).

        boto3 repeats a write whose answer was lost, so an item that is there may well be the one that was written.
        """
        return await asyncio.to_thread(self._write_now, call, **arguments)

    def _write_now(self, call: Callable[..., Any], **arguments: Any) -> Item | None:
        try:
            call(TableName=self._table, ReturnValuesOnConditionCheckFailure="ALL_OLD", **arguments)
        except self._client.exceptions.ConditionalCheckFailedException as error:
            return dict(error.response.get("Item", {}))
        except Exception as error:  # botocore's errors have no base class in common
            raise LedgerUnavailable(f"the usage ledger cannot be written ({error})") from error
        return None

    def _item(self, request_id: str) -> Item:
        key = {"request_id": {"S": request_id}}
        try:
            return dict(self._client.get_item(TableName=self._table, Key=key, ConsistentRead=True).get("Item", {}))
        except Exception as error:  # as above
            raise LedgerUnavailable(f"the usage ledger cannot be read ({error})") from error

    def _close_crashed(self) -> None:
        try:
            for request_id in self._crashed_ids():
                item = self._item(request_id)
                record = crashed_record(
                    msgspec.json.decode(item["admission"]["S"], type=Admission),
                    msgspec.json.decode(item["usage"]["S"], type=Usage) if "usage" in item else Usage(),
                )
                change = _update(request_id, _FINISH, {}, {":record": {"S": _json(record)}})
                self._write_now(self._client.update_item, **change)  # or another process has just closed it
        except (LedgerUnavailable, msgspec.DecodeError) as error:
            raise ConfigError(f"table {self._table}: what a crash left open cannot be closed ({error})") from error

    def _crashed_ids(self) -> Iterator[str]:
        """Yield the open invocations that nobody can be working on."""
        for item in self._open_items():
            is_ours = self._environment is not None and item.get("environment") == {"S": self._environment}
            if is_ours or int(item["lease_until"]["N"]) < time.time():
                yield item["request_id"]["S"]

    def _open_items(self) -> Iterator[Item]:
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            IndexName=OPEN_INDEX,
            KeyConditionExpression="open_in = :function",
            ExpressionAttributeValues={":function": {"S": self._function}},
        )
        try:
            for page in pages:
                yield from page["Items"]
        except Exception as error:  # as above
            raise ConfigError(f"table {self._table}: cannot be used as a usage ledger ({error})") from error


def _update(request_id: str, change: str, names: dict[str, str], values: Item) -> dict[str, Any]:
    """Return the arguments of a change to an open invocation."""
    return {
        "Key": {"request_id": {"S": request_id}},
        "UpdateExpression": change,
        "ConditionExpression": _IS_OPEN,
        "ExpressionAttributeNames": {"#record": "record", **names},
        "ExpressionAttributeValues": values,
    }


def _not_open(request_id: str) -> PilotlightError:
    return RequestNotFound(f"no open invocation has the request id {request_id!r}")


def _json(struct: Admission | Usage | UsageRecord) -> str:
    return msgspec.json.encode(struct).decode()
