"""The published clients of EHBP, npm's ``ehbp`` and PyPI's ``tinfoil-ehbp``, under the official openai clients."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from confidential.served import Middle, flipped, served
from pilotlight.api.encrypted_bodies import EncryptedBodies
from pilotlight.artifact import Artifact
from pilotlight.confidential.ehbp import ENCAPSULATED_KEY, ServerKey

ROOT = Path(__file__).parents[2]
CLIENTS = Path(__file__).parent / "ehbp"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NODE_MODULES = ROOT / ".venv-clients" / "node"

pytestmark = pytest.mark.e2e

Run = Callable[[str], dict[str, str]]


def _python(url: str) -> dict[str, str]:
    return _outcome([str(PYTHON), str(CLIENTS / "client.py"), url])


def _node(url: str) -> dict[str, str]:
    return _outcome(["node", str(CLIENTS / "client.mjs"), url, str(NODE_MODULES)])


def _outcome(command: list[str]) -> dict[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _has_python() -> bool:
    code = "import ehbp, openai"
    return PYTHON.exists() and subprocess.run([str(PYTHON), "-c", code], capture_output=True).returncode == 0


def _has_node() -> bool:
    return shutil.which("node") is not None and (NODE_MODULES / "node_modules" / "ehbp").is_dir()


@pytest.fixture(params=["tinfoil-ehbp", "npm ehbp"])
def run(request: pytest.FixtureRequest) -> Run:
    there, found = (_has_python, _python) if request.param == "tinfoil-ehbp" else (_has_node, _node)
    if not there():
        pytest.skip(f"{request.param} is not installed; `make clients` does that")
    return found


def encrypted(app: ASGIApp) -> ASGIApp:
    return EncryptedBodies(app, ServerKey(), 100_000, required=True)


def test_it_streams(run: Run, toy_artifact: Artifact, tmp_path: Path) -> None:
    middle = Middle()
    with served(toy_artifact, tmp_path, [encrypted], middle.around) as url:
        found = run(url)
    assert int(found["num_parts"]) > 3, found
    ((_, request),) = middle.requests
    assert b"47 plus 38" not in request
    assert found["text"].encode() not in middle.responses[0]


@pytest.mark.parametrize("number", [0, -1])
def test_a_flipped_bit_of_the_request_is_a_clients_error(
    run: Run, toy_artifact: Artifact, tmp_path: Path, number: int
) -> None:
    with served(toy_artifact, tmp_path, [encrypted], Middle(change_request=flipped(number)).around) as url:
        assert "error" in run(url)


@pytest.mark.parametrize("number", [0, 1, 3, -1])
def test_a_flipped_bit_of_the_response_is_a_clients_error(
    run: Run, toy_artifact: Artifact, tmp_path: Path, number: int
) -> None:
    """The last frame is our end mark: a client that does not know it refuses it all the same when it is altered."""
    with served(toy_artifact, tmp_path, [encrypted], Middle(change_response=flipped(number)).around) as url:
        assert "error" in run(url)


def test_a_repeated_request_is_refused(run: Run, toy_artifact: Artifact, tmp_path: Path) -> None:
    middle = Middle()
    with served(toy_artifact, tmp_path, [encrypted], middle.around) as url:
        assert "text" in run(url)
        ((headers, body),) = middle.requests
        again = httpx.post(
            f"{url}/v1/chat/completions", content=body, headers={ENCAPSULATED_KEY: headers[ENCAPSULATED_KEY]}
        )
    assert again.status_code == 409
    assert again.json()["error"]["code"] == "request_replayed"
