"""A server as one would bill from: keys, prices, machine costs, signed records and events, with the official client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pilotlight.artifact import Artifact
from receiver import receiver
from support import PATIENCE_S, config_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

CONFIG = """
[host]
signing_key = "{folder}/signing.pem"
capacity = "spot"

[events]
url = "{url}"
first_retry_s = 0.01

[functions.demo]
artifact = "{artifact}"
replica_cost_per_hour = "3600"

[functions.demo.prices]
prompt_per_million_tokens = "1"
completion_per_million_tokens = "2"
"""


def pilotlight(*arguments: object) -> str:
    command = [sys.executable, "-m", "pilotlight", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def client(url: str, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.with_raw_response.create(
        model="demo", messages=[{"role": "user", "content": "Hello!"}], max_tokens=8, **options
    )


def ask_often(client: openai.OpenAI) -> None:
    for _ in range(5):
        ask(client)


def test_a_server_one_can_bill_from(demo_int4: Artifact, tmp_path: Path) -> None:
    ledger, config = tmp_path / "usage.db", tmp_path / "pilotlight.toml"
    pilotlight("keys", "signing", tmp_path / "signing.pem")
    made = [
        json.loads(pilotlight("keys", "create", name, "--ledger", ledger, "--json", *limits))
        for name, limits in (("rich", []), ("poor", ["--requests-per-minute", 1000, "--tokens-per-month", 60]))
    ]
    rich, poor = (key["token"] for key in made)
    with receiver(["none", "refuse"]) as told:
        config.write_text(CONFIG.format(folder=tmp_path, url=told.url, artifact=demo_int4.path))
        with config_process(config, ledger) as server:
            with client(server.url, "pl_wrong") as stranger, pytest.raises(openai.AuthenticationError):
                ask(stranger)
            with client(server.url, rich) as mine:
                first, again = (ask(mine, extra_headers={"Idempotency-Key": "one"}) for _ in range(2))
                assert first.parse() == again.parse()
                ask(mine, extra_headers={"x-request-id": "two"})
            with client(server.url, poor) as other:
                assert ask(other).headers["x-ratelimit-remaining-requests"] == "999"
                with pytest.raises(openai.RateLimitError) as refused:
                    ask_often(other)
                assert refused.value.code == "insufficient_quota"
            headers = {"authorization": f"Bearer {rich}"}
            with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
                record = http.get("/v1/usage/two", headers=headers).json()
                receipt = http.get("/v1/usage/two", headers={**headers, "accept": "application/jose"}).text
                others = http.get("/v1/usage/two", headers={"authorization": f"Bearer {poor}"})
                while len({event["id"] for event in told.events}) < _num_records(ledger):
                    assert http.get("/livez").status_code == 200
    assert (record["capacity"], record["tenant"], record["key_id"]) == ("spot", "rich", made[0]["key_id"])
    assert others.status_code == 404
    (tmp_path / "receipt.jws").write_text(receipt)
    verified = pilotlight("usage", "verify", tmp_path / "receipt.jws", "--public-key", tmp_path / "signing.pem.pub")
    assert verified == "1 receipts are genuine\n"
    by_tenant = [
        json.loads(line) for line in pilotlight("usage", "--by", "tenant", "--ledger", ledger, "--json").splitlines()
    ]
    assert {row["tenant"]: row["num_invocations"] for row in by_tenant}["rich"] == 2
    margin = json.loads(pilotlight("usage", "--margin", "--ledger", ledger, "--json"))
    assert margin["cost_micros"] == sum(row["cost_micros"] for row in by_tenant)
    assert margin["busy_micros"] + margin["warm_micros"] > 0
    assert {event["data"]["request_id"] for event in told.events} >= {"two", first.parse().id}


def _num_records(ledger: Path) -> int:
    return len(pilotlight("usage", "--records", "--ledger", ledger, "--json").splitlines())
