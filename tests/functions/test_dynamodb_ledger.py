"""The ledger on DynamoDB, with boto3 against moto's server: exactly one record for every admission."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from cfnlint.decode import cfn_yaml

from fake_runtime_api import fake_runtime_api
from lambda_support import moto_server
from pace import Pace
from pilotlight.artifact import Artifact
from pilotlight.errors import ConfigError, LedgerUnavailable, RequestIdInUse, RequestNotFound
from pilotlight.metering.dynamodb_ledger import DynamoDbLedger
from pilotlight.metering.limits import Admitted
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.record import CRASH_DETAIL, Admission, UsageRecord, final_record
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from test_bootstrap import bootstrap, logged

TEMPLATE = Path(__file__).parents[2] / "infra" / "lambda" / "template.yaml"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("dynamodb")
    create_table(client)
    yield client
    client.delete_table(TableName="usage")
    client.close()


def create_table(client: Any) -> None:
    """Create the table just as the SAM template does."""
    template = cfn_yaml.load(str(TEMPLATE))
    properties = template["Resources"]["UsageTable"]["Properties"]
    wanted = ("BillingMode", "AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes")
    client.create_table(TableName="usage", **json.loads(json.dumps({name: properties[name] for name in wanted})))


def open_ledger(environment: str | None = "sandbox-1", lease_s: float = 900) -> DynamoDbLedger:
    return DynamoDbLedger("usage", "demo", environment, lease_s)


def admission(request_id: str, replica_id: str = "replica-1") -> Admission:
    return Admission(
        request_id=request_id,
        function="demo",
        artifact_digest="sha256:1",
        precision="fp32",
        provider="cpu",
        replica_id=replica_id,
        started_at_utc="2026-11-22T12:00:00.000000Z",
        prices=PriceTable.from_config({"completion_per_million_tokens": "1000000"}),
    )


def stopped(request_id: str) -> UsageRecord:
    return final_record(admission(request_id), Usage(4, completion_tokens=10), Timings(), FinishReason.STOP)


def num_open(client: Any) -> int:
    count: int = client.scan(TableName="usage", IndexName="open_invocations")["Count"]
    return count


def test_an_invocation_goes_from_admission_to_record(client: Any) -> None:
    async def scenario() -> None:
        ledger, record = open_ledger(), stopped("a")
        await ledger.admit(admission("a"))
        assert (ledger.get("a"), num_open(client)) == (None, 1)
        await ledger.checkpoint("a", Usage(4, completion_tokens=1))
        await ledger.finish(record)
        assert (ledger.get("a"), num_open(client)) == (record, 0)
        assert ledger.get("b") is None

    asyncio.run(scenario())


def test_an_id_is_admitted_once_whoever_asks(client: Any) -> None:
    async def scenario() -> None:
        ledgers = [open_ledger(f"sandbox-{number}") for number in range(8)]
        admissions = [ledger.admit(admission("a", f"replica-{n}")) for n, ledger in enumerate(ledgers)]
        outcomes: list[object] = [*await asyncio.gather(*admissions, return_exceptions=True)]
        assert outcomes.count(Admitted()) == 1
        assert sum(isinstance(outcome, RequestIdInUse) for outcome in outcomes) == 7

    asyncio.run(scenario())


def test_a_repeated_write_is_the_same_write(client: Any) -> None:
    async def scenario() -> None:
        ledger, record = open_ledger(), stopped("a")
        await ledger.admit(admission("a"))
        await ledger.admit(admission("a"))
        await ledger.finish(record)
        await ledger.finish(record)
        with pytest.raises(RequestNotFound):
            await ledger.finish(stopped("a"))
        assert ledger.get("a") == record

    asyncio.run(scenario())


def test_what_is_not_open_takes_no_checkpoint_and_no_record(client: Any) -> None:
    async def scenario() -> None:
        ledger = open_ledger()
        with pytest.raises(RequestNotFound):
            await ledger.checkpoint("a", Usage())
        with pytest.raises(RequestNotFound):
            await ledger.finish(stopped("a"))
        assert client.scan(TableName="usage")["Count"] == 0

    asyncio.run(scenario())


def test_the_next_process_of_a_sandbox_closes_what_the_last_one_left(client: Any) -> None:
    async def scenario() -> None:
        ledger = open_ledger()
        await ledger.admit(admission("early"))
        await ledger.admit(admission("late"))
        await ledger.checkpoint("late", Usage(4, completion_tokens=2))
        await open_ledger("sandbox-2").admit(admission("elsewhere"))
        successor = open_ledger()
        early, late = successor.get("early"), successor.get("late")
        assert early is not None
        assert late is not None
        assert (early.finish_reason, early.stop_detail) == (FinishReason.CRASHED, CRASH_DETAIL)
        assert (early.completion_tokens, late.completion_tokens) == (0, 2)
        assert successor.get("elsewhere") is None, "it may still be running"
        with pytest.raises(RequestNotFound):
            await ledger.finish(stopped("late"))

    asyncio.run(scenario())


@pytest.mark.parametrize("environment", [None, "sandbox-2"])
def test_what_outlived_its_lease_is_closed_by_anybody(client: Any, environment: str | None) -> None:
    async def scenario() -> None:
        await open_ledger(lease_s=-1).admit(admission("a"))
        record = open_ledger(environment).get("a")
        assert record is not None
        assert record.finish_reason is FinishReason.CRASHED

    asyncio.run(scenario())


def test_a_table_that_is_not_there_is_refused(client: Any) -> None:
    with pytest.raises(ConfigError, match="table other: cannot be used as a usage ledger"):
        DynamoDbLedger("other", "demo", None)


def test_a_table_that_goes_away_is_unavailable(client: Any) -> None:
    async def scenario() -> None:
        ledger = open_ledger()
        client.delete_table(TableName="usage")
        with pytest.raises(LedgerUnavailable):
            await ledger.admit(admission("a"))
        with pytest.raises(LedgerUnavailable):
            ledger.get("a")
        create_table(client)

    asyncio.run(scenario())


@pytest.mark.e2e
@pytest.mark.model
def test_a_killed_function_is_closed_by_the_next_one(client: Any, demo_int4: Artifact, tmp_path: Path) -> None:
    request = {"model": demo_int4.path.name, "prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    table = {"PILOTLIGHT_LEDGER_TABLE": "usage", "AWS_LAMBDA_LOG_STREAM_NAME": "sandbox-1"}
    pace = Pace(tmp_path)
    with fake_runtime_api() as platform:
        slow = bootstrap(platform, demo_int4.path, tmp_path / "unused.db", **pace.environment, **table)
        with slow as process, pace.slow(50):
            killed = platform.invoke(request)
            for _ in range(40):
                assert killed.chunk() is not None
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        with bootstrap(platform, demo_int4.path, tmp_path / "unused.db", **table) as process:
            logged(process, "started")
            _, usage = platform.invoke_http("GET", f"/v1/usage/{killed.request_id}").http()
    record = json.loads(usage)
    assert (record["finish_reason"], record["prompt_tokens"]) == ("crashed", 4)
    assert record["completion_tokens"] >= 1
    assert client.scan(TableName="usage")["Count"] == 1
