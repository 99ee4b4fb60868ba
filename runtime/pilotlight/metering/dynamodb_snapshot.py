"""The records of a DynamoDB table as they are now, in memory, for all that reads a ledger with SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

import msgspec

from pilotlight.errors import ConfigError
from pilotlight.metering import schema
from pilotlight.metering.aws_client import new_client, table_of

INSERT = "INSERT INTO invocations (request_id, admission, usage, record) VALUES (?, ?, ?, ?)"


def connect_snapshot(url: str) -> sqlite3.Connection:
    """Read a whole table and return a ledger with what it holds, the earliest admission first.

    Raises:
        ConfigError: boto3 is not installed, or the table cannot be read.
    """
    table = table_of(url)
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for statements in schema.MIGRATIONS:
        for statement in statements:
            connection.execute(statement)
    rows = sorted(_rows(new_client("dynamodb"), table), key=lambda row: row[0])
    with connection:
        connection.executemany(INSERT, (row[1:] for row in rows))
    return connection


def _rows(client: Any, table: str) -> Iterator[tuple[str, str, str, str | None, str | None]]:
    scan = client.get_paginator("scan").paginate(TableName=table, ConsistentRead=True)
    try:
        for page in scan:
            for item in page["Items"]:
                if "admission" in item:  # beside them lie the keys
                    admission = item["admission"]["S"]
                    started_at_utc = msgspec.json.decode(admission)["started_at_utc"]
                    usage, record = (item.get(name, {}).get("S") for name in ("usage", "record"))
                    yield started_at_utc, item["request_id"]["S"], admission, usage, record
    except Exception as error:  # botocore's errors have no base class in common
        raise ConfigError(f"table {table}: cannot be read as a usage ledger ({error})") from error
