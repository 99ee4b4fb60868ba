"""Schemathesis against the real server: requests made from our own document, right and wrong ones, by the thousand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from pilotlight.metering.ledger_reader import LedgerReader
from processes import wait_for
from support import PATIENCE_S, ServerProcess

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed"),
]

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance"
)
GENERATING = ("ChatBody", "TextBody", "MessagesBody", "CountTokensBody", "ResponsesBody")
ONCE_ONLY = ("x-request-id", "idempotency-key", "last-event-id")
"""Headers that make all but the first request under a value a conflict; other operations are still asked with them."""


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the one function that is served, so that requests get through.

    Nothing else may be narrowed that a request could break: the server knows the document as it is.
    """
    for name in GENERATING:
        body = document["components"]["schemas"][name]
        body["properties"]["model"] = {"type": "string", "enum": ["demo"]}
    for methods in document["paths"].values():
        if "requestBody" in (operation := methods.get("post", {})):
            kept = [parameter for parameter in operation["parameters"] if parameter["name"] not in ONCE_ONLY]
            operation["parameters"] = kept
    return document


def run(server: ServerProcess, directory: Path, max_examples: int) -> str:
    """Run schemathesis and return what it says; it must find nothing."""
    path = directory / "openapi.json"
    path.write_text(json.dumps(narrowed(httpx.get(f"{server.url}/openapi.json", timeout=PATIENCE_S).json())))
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", str(path)]
    options = ["--url", server.url, "--checks", CHECKS, "--max-examples", str(max_examples), "--seed", "1"]
    options += ["--request-timeout", str(PATIENCE_S)]
    phases = ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--warnings", "off"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [*command, *options, *phases], capture_output=True, text=True, cwd=directory, env=environment, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    return done.stdout


def test_no_answer_is_an_error_of_ours_or_undocumented(server: ServerProcess, ledger: Path, tmp_path: Path) -> None:
    run(server, tmp_path, max_examples=8)
    with LedgerReader(ledger) as reader:
        records = list(reader.records())
    assert len(records) > 5, "too few requests reached the model for this to mean anything"
    assert len({record.request_id for record in records}) == len(records)
    idle = 'pilotlight_num_requests_running{function="demo"} 0.0'
    wait_for(lambda: idle in httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text)


@pytest.mark.soak
def test_the_same_for_longer(server: ServerProcess, tmp_path: Path) -> None:
    run(server, tmp_path, max_examples=300)
