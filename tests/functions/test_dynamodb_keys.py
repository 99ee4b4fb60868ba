"""API keys and usage in the DynamoDB table, with boto3 against moto's server: for the function and the commands."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fake_runtime_api import fake_runtime_api, url_event
from pilotlight.artifact import Artifact
from pilotlight.cli import main
from pilotlight.errors import ConfigError, LedgerUnavailable
from pilotlight.metering.dynamodb_keys import REMEMBERED_S, DynamoDbKeyDesk, DynamoDbKeyring
from pilotlight.metering.dynamodb_ledger import DynamoDbLedger
from pilotlight.metering.keys import Limits, split_token
from pilotlight.metering.record import final_record
from pilotlight.metering.usage import Timings, Usage
from pilotlight.request import FinishReason
from test_bootstrap import bootstrap
from test_dynamodb_ledger import admission, client, endpoint  # noqa: F401

URL = "dynamodb://usage"
pytestmark = pytest.mark.usefixtures("client")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_key(name: str = "app") -> tuple[str, str]:
    with DynamoDbKeyDesk(URL) as desk:
        key, token = desk.create(name, "acme", ("demo",), Limits())
    return key.key_id, token


def test_a_key_opens_until_it_is_revoked() -> None:
    key_id, token = make_key()
    clock = Clock()
    keyring = DynamoDbKeyring("usage", clock)
    found = keyring.find(token)
    assert found is not None
    assert (found.key_id, found.tenant, found.functions) == (key_id, "acme", ("demo",))
    with DynamoDbKeyDesk(URL) as desk:
        desk.revoke(key_id)
        with pytest.raises(ConfigError, match="was revoked at"):
            desk.rotate(key_id)
    assert keyring.find(token) is not None, "what was found a moment ago is remembered"
    clock.now += REMEMBERED_S + 1
    assert keyring.find(token) is None


@pytest.mark.parametrize("token", ["", "pl_x", f"pl_{'0' * 16}_{'a' * 43}"])
def test_anything_else_opens_nothing(token: str) -> None:
    make_key()
    assert DynamoDbKeyring("usage").find(token) is None


def test_a_rotated_key_has_two_tokens_for_a_while() -> None:
    key_id, old = make_key()
    with DynamoDbKeyDesk(URL) as desk:
        new = desk.rotate(key_id, timedelta(hours=1))
    keyring = DynamoDbKeyring("usage")
    assert all(keyring.find(token) is not None for token in (old, new))
    with DynamoDbKeyDesk(URL) as desk:
        newest = desk.rotate(key_id)
    keyring.reconnect()
    assert [keyring.find(token) is not None for token in (old, new, newest)] == [False, False, True]


def test_a_secret_is_not_in_the_table(client: Any) -> None:  # noqa: F811
    _, token = make_key()
    _, secret = split_token(token) or ("", "")
    kept = str(client.scan(TableName="usage")["Items"])
    assert len(secret) == 43
    assert secret not in kept
    assert "hash" in kept


def test_limits_that_nobody_keeps_are_refused() -> None:
    with DynamoDbKeyDesk(URL) as desk, pytest.raises(ConfigError, match="have no limits"):
        desk.create("app", "acme", None, Limits(tokens_per_day=5))


def test_a_table_that_is_gone_lets_nobody_in(client: Any) -> None:  # noqa: F811
    _, token = make_key()
    with pytest.raises(LedgerUnavailable):
        DynamoDbKeyring("elsewhere").find(token)


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(main, [*arguments, "--ledger", URL])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_make_list_and_end_keys() -> None:
    made = json.loads(invoke("keys", "create", "web", "--json").splitlines()[0])
    listed = json.loads(invoke("keys", "list", "--json"))
    assert listed["key_id"] == made["key_id"]
    invoke("keys", "revoke", made["key_id"])
    assert json.loads(invoke("keys", "list", "--json"))["revoked_at_utc"] is not None
    assert DynamoDbKeyring("usage").find(made["token"]) is None


def test_usage_reads_the_table() -> None:
    async def scenario() -> None:
        ledger = DynamoDbLedger("usage", "demo", "sandbox-1")
        for number, tokens in enumerate((3, 4, 5)):
            opened = admission(f"r{number}")
            await ledger.admit(opened)
            usage = Usage(2, completion_tokens=tokens)
            if number:
                await ledger.finish(final_record(opened, usage, Timings(), FinishReason.STOP))

    asyncio.run(scenario())
    make_key()
    (total,) = [json.loads(line) for line in invoke("usage", "--json").splitlines()]
    assert (total["function"], total["num_invocations"], total["prompt_tokens"]) == ("demo", 2, 4)
    assert (total["completion_tokens"], total["cost_micros"]) == (9, 9_000_000)
    records = [json.loads(line) for line in invoke("usage", "--records", "--json").splitlines()]
    assert {record["request_id"] for record in records} == {"r1", "r2"}
    assert "r2" in invoke("usage", "export", "--format", "csv")


def test_nothing_else_writes_such_a_ledger(tmp_path: Path, toy_artifact: Artifact) -> None:
    done = CliRunner().invoke(main, ["invoke", str(toy_artifact.path), "hi", "--ledger", URL])
    assert done.exit_code != 0


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.parametrize("is_iam", [False, True])
def test_a_function_that_requires_keys_asks_for_one(demo_int4: Artifact, tmp_path: Path, is_iam: bool) -> None:
    """Under AWS_IAM the ``authorization`` header is AWS's, and the key is in ``x-api-key``; else it is in either."""
    with DynamoDbKeyDesk(URL) as desk:
        key, token = desk.create("app", "acme", None, Limits())
    variables = {"PILOTLIGHT_LEDGER_TABLE": "usage", "PILOTLIGHT_REQUIRE_KEYS": "true"}
    body = {"model": demo_int4.path.name, "prompt": "Once", "max_tokens": 4, "ignore_eos": True}

    def event(headers: dict[str, str], path: str = "/v1/completions", asked: object = body) -> dict[str, Any]:
        found = url_event("POST" if asked else "GET", path, asked, headers)
        if is_iam:
            found["requestContext"]["authorizer"] = {"iam": {"accountId": "123456789012"}}
            found["headers"]["authorization"] = "AWS4-HMAC-SHA256 Credential=1"
        return found

    with fake_runtime_api() as platform, bootstrap(platform, demo_int4.path, tmp_path / "usage.db", **variables):
        with_key = {"x-api-key": token} if is_iam else {"authorization": f"Bearer {token}"}
        refused, _ = platform.invoke(event({})).http()
        assert refused["statusCode"] == 401
        taken, payload = platform.invoke(event(with_key)).http()
        assert taken["statusCode"] == 200
        request_id = json.loads(payload)["id"]
        _, payload = platform.invoke(event(with_key, f"/v1/usage/{request_id}", None)).http()
    record = json.loads(payload)
    assert (record["key_id"], record["tenant"], record["completion_tokens"]) == (key.key_id, "acme", 4)
