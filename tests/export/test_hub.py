"""Models from the hub, with the real huggingface_hub against a hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pilotlight.artifact import open_artifact

MODEL = "someone/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT}
OPEN_SOURCE = """
import sys
from pathlib import Path
from pilotlight.errors import PilotlightError
from pilotlight_export.source import open_source
model, revision, scratch = sys.argv[1:]
try:
    source = open_source(model, revision or None, Path(scratch) if scratch else None)
    print(source.entry.revision, *sorted(path.name for path in source.directory.iterdir()))
except PilotlightError as error:
    sys.exit(error.message)
"""


class Hub(ThreadingHTTPServer):
    """Serves one model as the hub does: the files of a revision, and each file by its commit.

    The first ``num_drops`` answers with weights break off in the middle.
    """

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.directory = directory
        self.num_drops = 0
        self.downloads: list[str] = []
        self.num_requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.num_requests += 1
        parts = self.path.partition("?")[0].strip("/").split("/")
        match parts:
            case ["api", "models", owner, name, "revision", revision] if f"{owner}/{name}" == MODEL:
                self._list(revision)
            case [owner, name, "resolve", _, file] if f"{owner}/{name}" == MODEL:
                self._send(self.server.directory / file)
            case _:
                self._refuse("RepoNotFound")

    def _list(self, revision: str) -> None:
        if revision not in REVISIONS:
            return self._refuse("RevisionNotFound")
        names = sorted(path.name for path in self.server.directory.iterdir())
        body = {"id": MODEL, "sha": REVISIONS[revision], "siblings": [{"rfilename": name} for name in names]}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, path: Path) -> None:
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD":
            return self._answer(200, content, headers)
        self.server.downloads.append(path.name)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if path.suffix == ".safetensors" and self.server.num_drops > 0:
            self.server.num_drops -= 1
            self._answer(206 if start else 200, content[start:], headers, sent_bytes=1000)
            self.close_connection = True
        else:
            self._answer(206 if start else 200, content[start:], headers)

    def _refuse(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], sent_bytes: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent_bytes])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub whose model also has what an export has no use for."""
    directory = tmp_path / "hub"
    directory.mkdir()
    for path in tiny_llama.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling.py"):
        (directory / name).write_bytes(b"not wanted")
    with Hub(directory) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **ours, **more}


def open_from(
    hub: Hub, home: Path, model: str = MODEL, revision: str = "", scratch: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", OPEN_SOURCE, model, revision, scratch]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(hub, home, **more), timeout=300
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_a_branch_is_pinned_to_its_commit_and_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path) -> None:
    done = open_from(hub, tmp_path / "home", revision="v1")
    commit, *files = done.stdout.split()
    assert commit == COMMIT
    assert "model.safetensors" in files
    assert not {"consolidated.safetensors", "pytorch_model.bin", "modeling.py"} & set(hub.downloads)
    assert len(hub.downloads) == len(set(hub.downloads))


def test_shards_are_fetched_by_the_index(hub: Hub, tmp_path: Path) -> None:
    (hub.directory / "model.safetensors").rename(hub.directory / "part-one.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part-one.safetensors"}}
    (hub.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    done = open_from(hub, tmp_path / "home")
    assert "part-one.safetensors" in done.stdout.split(), done.stderr


def test_a_missing_revision_is_one_line(hub: Hub, tmp_path: Path) -> None:
    line = refusal(open_from(hub, tmp_path / "home", revision="v9"))
    assert line == "someone/tiny-llama: the hub has no revision 'v9' of it"


def test_a_missing_model_is_one_line(hub: Hub, tmp_path: Path) -> None:
    line = refusal(open_from(hub, tmp_path / "home", model="someone/else"))
    assert line == "someone/else: no such directory, and no such model on the hub"


def test_a_hub_that_cannot_be_reached_is_one_line(hub: Hub, tmp_path: Path) -> None:
    line = refusal(open_from(hub, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9"))
    assert line == "someone/tiny-llama: no such directory, and the hub cannot be reached"


def test_a_dropped_connection_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    hub.num_drops = 1
    done = open_from(hub, tmp_path / "home")
    assert done.stdout.split()[0] == COMMIT, done.stderr
    assert hub.downloads.count("model.safetensors") == 2


def test_a_connection_that_stays_broken_is_one_line_and_the_next_try_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.num_drops = 100
    line = refusal(open_from(hub, tmp_path / "home"))
    assert line.startswith("someone/tiny-llama: the connection to the hub broke off")
    hub.num_drops = 0
    assert open_from(hub, tmp_path / "home").stdout.split()[0] == COMMIT


def test_what_was_downloaded_works_without_network(hub: Hub, tmp_path: Path) -> None:
    open_from(hub, tmp_path / "home")
    before = hub.num_requests
    done = open_from(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.stdout.split()[0] == COMMIT, done.stderr
    assert hub.num_requests == before


def test_pickles_are_fetched_only_where_the_user_insists_and_nothing_else_is_there(hub: Hub, tmp_path: Path) -> None:
    (hub.directory / "model.safetensors").unlink()
    assert "found no weights" in refusal(open_from(hub, tmp_path / "home"))
    assert "pytorch_model.bin" not in hub.downloads
    (tmp_path / "scratch").mkdir()
    line = refusal(open_from(hub, tmp_path / "home", scratch=str(tmp_path / "scratch")))
    assert "holds more than tensors, or is damaged" in line
    assert "pytorch_model.bin" in hub.downloads


def test_a_directory_works_offline(hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    done = open_from(hub, tmp_path / "home", model=str(tiny_llama), HF_HUB_OFFLINE="1")
    assert done.stdout.split()[0] == "None", done.stderr
    assert hub.num_requests == 0


@pytest.mark.model
def test_a_whole_export_names_its_commit_and_a_directory_needs_no_network(
    hub: Hub, tiny_llama: Path, tmp_path: Path
) -> None:
    for model in (MODEL, str(tiny_llama)):
        before = hub.num_requests
        command = [sys.executable, "-m", "pilotlight_export", "export", model, "--out", str(tmp_path / "out")]
        env = environment(hub, tmp_path / "home")
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        revision = open_artifact(tmp_path / "out").manifest.source.revision
        assert (revision, hub.num_requests > before) == ((COMMIT, True) if model == MODEL else (None, False))
