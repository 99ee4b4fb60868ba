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

from confidential.served import Change, Middle, flipped, frames_of, served
from pilotlight.api.encrypted_bodies import EncryptedBodies
from pilotlight.artifact import Artifact
from pilotlight.confidential.ehbp import ENCAPSULATED_KEY, ServerKey
from support import PATIENCE_S

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
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
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


LENGTH, TEXT, TAG = 3, 10, -1
"""Places in a frame: the last byte of its length, a byte of its text, and the last one of its tag."""


@pytest.mark.parametrize("at", [LENGTH, TEXT, TAG], ids=["length", "text", "tag"])
@pytest.mark.parametrize("number", [0, -1], ids=["first", "last"])
def test_a_flipped_bit_of_the_request_is_a_clients_error(
    run: Run, toy_artifact: Artifact, tmp_path: Path, number: int, at: int
) -> None:
    with served(toy_artifact, tmp_path, [encrypted], Middle(change_request=flipped(number, at)).around) as url:
        assert "error" in run(url)


def middle_frame(at: int) -> Change:
    return lambda frames: flipped(len(frames) // 2, at)(frames)


RESPONSE_CHANGES: dict[str, Change] = {
    "the first frame": flipped(0, TEXT),
    "the first frame's tag": flipped(0, TAG),
    "a frame in the middle": middle_frame(TEXT),
    "the last frame of the answer": flipped(-2, TEXT),
    "the end mark": flipped(-1, TEXT),
    "frames in another order": lambda frames: [frames[1], frames[0], *frames[2:]],
    "a frame left out": lambda frames: [frames[0], *frames[2:]],
}


@pytest.mark.parametrize("name", RESPONSE_CHANGES)
def test_an_altered_response_is_a_clients_error(run: Run, toy_artifact: Artifact, tmp_path: Path, name: str) -> None:
    """The last frame is our end mark: a client that does not know it refuses it all the same when it is altered."""
    change = RESPONSE_CHANGES[name]
    with served(toy_artifact, tmp_path, [encrypted], Middle(change_response=change).around) as url:
        assert "error" in run(url)


CUT: dict[str, Change] = {
    "the first frame's length": flipped(0, LENGTH),
    "the first frame's length, far beyond the end": flipped(0, 0),
    "the length of what says why it ends": flipped(-3, 0),
    "a frame that is cut": lambda frames: [*frames[:3], frames[3][:-1]],
}


@pytest.mark.parametrize("name", CUT)
def test_an_answer_that_is_cut_is_an_error_or_has_no_end(
    run: Run, toy_artifact: Artifact, tmp_path: Path, name: str
) -> None:
    """npm's client drops a frame that never becomes complete, and says nothing: what is missing then is the end."""
    with served(toy_artifact, tmp_path, [encrypted], Middle(change_response=CUT[name]).around) as url:
        found = run(url)
    assert "error" in found or not found["finish_reason"]


@pytest.mark.soak
def test_a_flipped_bit_in_any_frame_of_a_response_is_noticed(run: Run, toy_artifact: Artifact, tmp_path: Path) -> None:
    middle = Middle()
    with served(toy_artifact, tmp_path, [encrypted], middle.around) as url:
        whole = run(url)
        num_frames = len(frames_of(middle.responses[0]))
        assert num_frames > 8
        for number in range(num_frames):
            for at in (LENGTH, TEXT, TAG):
                middle.change_response = flipped(number, at)
                found = run(url)
                cut = at == LENGTH and not found.get("finish_reason")
                is_whole = number >= num_frames - 2 and found.get("num_parts") == whole["num_parts"]
                assert "error" in found or cut or (at == LENGTH and is_whole), (number, at)


@pytest.mark.parametrize("header", ["ehbp-encapsulated-key", "ehbp-response-nonce"])
def test_a_flipped_bit_of_a_header_is_a_clients_error(
    run: Run, toy_artifact: Artifact, tmp_path: Path, header: str
) -> None:
    with served(toy_artifact, tmp_path, [encrypted], Middle(flipped_header=header).around) as url:
        assert "error" in run(url)


def test_a_repeated_request_is_refused(run: Run, toy_artifact: Artifact, tmp_path: Path) -> None:
    middle = Middle()
    with served(toy_artifact, tmp_path, [encrypted], middle.around) as url:
        assert "text" in run(url)
        ((headers, body),) = middle.requests
        again = httpx.post(
            f"{url}/v1/chat/completions",
            content=body,
            headers={ENCAPSULATED_KEY: headers[ENCAPSULATED_KEY]},
            timeout=PATIENCE_S,
        )
    assert again.status_code == 409
    assert again.json()["error"]["code"] == "request_replayed"
