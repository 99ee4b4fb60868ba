"""Weights from S3, with boto3 against moto's server, and against one that fails, truncates and alters."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

import s3_artifact
from fake_runtime_api import fake_runtime_api
from lambda_support import moto_server
from pilotlight.artifact import MANIFEST, WEIGHTS, Artifact, FileEntry, open_artifact
from pilotlight.errors import ArtifactError, ConfigError
from s3_artifact import Place, fetch, parts_of
from test_bootstrap import bootstrap, logged


@pytest.fixture(autouse=True)
def _account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    for item in client.list_objects_v2(Bucket="models").get("Contents", []):
        client.delete_object(Bucket="models", Key=item["Key"])
    client.delete_bucket(Bucket="models")
    client.close()


def put(client: Any, artifact: Artifact) -> None:
    for path in artifact.path.iterdir():
        client.put_object(Bucket="models", Key=f"toys/{artifact.path.name}/{path.name}", Body=path.read_bytes())


def at(artifact: Artifact, digest: str | None = None) -> Place:
    return Place("models", f"toys/{artifact.path.name}", digest)


@given(st.lists(st.integers(0, 50), max_size=5), st.integers(1, 20))
def test_the_parts_cover_every_byte_once(sizes: list[int], part_bytes: int) -> None:
    files = {str(number): FileEntry("", size) for number, size in enumerate(sizes)}
    covered = [
        (part.file_name, byte)
        for part in parts_of(files, part_bytes)
        for byte in range(part.start, part.start + part.num_bytes)
    ]
    assert sorted(covered) == sorted((name, byte) for name, entry in files.items() for byte in range(entry.size_bytes))


@pytest.mark.parametrize(
    "uri", ["s3://models", "s3://models/", "s3://MODELS/a", "s3://models/a#sha256:1", "https://a/b"]
)
def test_a_malformed_place_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected s3://BUCKET/PREFIX"):
        Place.parse(uri)


def test_a_place_has_a_name_and_perhaps_a_digest() -> None:
    assert Place.parse("s3://models/a/demo-int4/") == Place("models", "a/demo-int4", None)
    digest = "sha256:" + "0a" * 32
    assert Place.parse(f"s3://models/demo#{digest}") == Place("models", "demo", digest)
    assert Place.parse("s3://models/a/demo-int4").name == "demo-int4"


def test_what_is_fetched_is_the_artifact(
    bucket: Any, toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_artifact, "PART_BYTES", 100)
    put(bucket, toy_artifact)
    found = open_artifact(fetch(at(toy_artifact, toy_artifact.digest), tmp_path))
    found.verify()
    assert found.digest == toy_artifact.digest
    assert [path.name for path in tmp_path.iterdir()] == [found.path.name]


def test_it_is_fetched_once_in_a_sandbox(bucket: Any, toy_artifact: Artifact, tmp_path: Path) -> None:
    put(bucket, toy_artifact)
    first = fetch(at(toy_artifact), tmp_path)
    for name in toy_artifact.manifest.files:
        bucket.delete_object(Bucket="models", Key=f"toys/{toy_artifact.path.name}/{name}")
    assert fetch(at(toy_artifact), tmp_path) == first


def test_another_artifact_than_the_one_that_was_asked_for_is_refused(
    bucket: Any, toy_artifact: Artifact, tmp_path: Path
) -> None:
    put(bucket, toy_artifact)
    with pytest.raises(ArtifactError, match=r"has the digest sha256:.*; expected sha256:0000"):
        fetch(at(toy_artifact, f"sha256:{'0' * 64}"), tmp_path)


def test_what_is_missing_or_altered_is_named_and_leaves_nothing(
    bucket: Any, toy_artifact: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"models/toys/toy/manifest.json: cannot be fetched from S3 .*NoSuchKey"):
        fetch(at(toy_artifact), tmp_path)
    put(bucket, toy_artifact)
    weights = f"toys/{toy_artifact.path.name}/{WEIGHTS}"
    content = bytearray((toy_artifact.path / WEIGHTS).read_bytes())
    content[3] ^= 1
    bucket.put_object(Bucket="models", Key=weights, Body=bytes(content))
    with pytest.raises(ArtifactError, match=r"model.onnx.data: was altered"):
        fetch(at(toy_artifact), tmp_path)
    bucket.put_object(Bucket="models", Key=weights, Body=bytes(content[:4]))
    with pytest.raises(ArtifactError, match=r"model.onnx.data: cannot be fetched from S3 \(4 bytes"):
        fetch(at(toy_artifact), tmp_path)
    bucket.delete_object(Bucket="models", Key=weights)
    with pytest.raises(ArtifactError, match=r"model.onnx.data: cannot be fetched from S3 .*NoSuchKey"):
        fetch(at(toy_artifact), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_before_it_is_fetched(
    bucket: Any, toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, toy_artifact)
    monkeypatch.setattr(s3_artifact, "MIN_SPARE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="give the function more ephemeral storage"):
        fetch(at(toy_artifact), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Flaky(ThreadingHTTPServer):
    """Serves an artifact's files, and treats every range ``num_bad`` times in a bad way first."""

    daemon_threads = True

    def __init__(self, artifact: Artifact, way: str, num_bad: int) -> None:
        super().__init__(("127.0.0.1", 0), _FlakyAnswer)
        self.artifact, self.way, self.num_bad = artifact, way, num_bad
        self.asked: dict[tuple[str, str | None], int] = {}
        self.lock = threading.Lock()

    def is_bad(self, path: str, wanted: str | None) -> bool:
        with self.lock:
            before = self.asked.get((path, wanted), 0)
            self.asked[path, wanted] = before + 1
        return before < self.num_bad


class _FlakyAnswer(BaseHTTPRequestHandler):
    server: Flaky

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        content = (self.server.artifact.path / name).read_bytes()
        wanted, size = self.headers.get("Range"), len(content)
        if wanted is not None:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            content = content[int(start) : int(end) + 1]
        way = self.server.way if self.server.is_bad(name, wanted) else "good"
        if way == "fails":
            self.send_error(500)
            return
        if way == "alters" and name != MANIFEST:
            content = bytes(byte ^ 255 for byte in content)
        if way == "ignores the range" and wanted is not None:
            content = (self.server.artifact.path / name).read_bytes() + b"more"
        self.send_response(200 if wanted is None else 206)
        self.send_header("Content-Length", str(len(content)))
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {wanted.removeprefix('bytes=')}/{size}")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if way == "truncates" else content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def flaky(toy_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    servers: list[tuple[Flaky, threading.Thread]] = []

    def serve(way: str, num_bad: int) -> Flaky:
        server = Flaky(toy_artifact, way, num_bad)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        return server

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("way", ["fails", "truncates", "ignores the range", "alters"])
def test_a_server_that_recovers_is_asked_again(flaky: Any, toy_artifact: Artifact, tmp_path: Path, way: str) -> None:
    flaky(way, 1)
    found = open_artifact(fetch(at(toy_artifact), tmp_path))
    found.verify()
    assert found.digest == toy_artifact.digest


@pytest.mark.parametrize(
    ("way", "why"), [("fails", "cannot be fetched"), ("truncates", "cannot be fetched"), ("alters", "was altered")]
)
def test_a_server_that_does_not_ends_the_start(
    flaky: Any, toy_artifact: Artifact, tmp_path: Path, way: str, why: str
) -> None:
    server = flaky(way, 1000)
    with pytest.raises(ArtifactError, match=why):
        fetch(at(toy_artifact), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert max(server.asked.values()) < 20, "a start has to end some time"


@pytest.mark.model
def test_the_function_serves_what_it_fetched(bucket: Any, moto: str, demo_int4: Artifact, tmp_path: Path) -> None:
    put(bucket, demo_int4)
    variables = {
        "PILOTLIGHT_ARTIFACT": f"s3://models/toys/{demo_int4.path.name}#{demo_int4.digest}",
        "AWS_ENDPOINT_URL_S3": moto,
        "TMPDIR": str(tmp_path),
    }
    with (
        fake_runtime_api() as platform,
        bootstrap(platform, demo_int4.path, tmp_path / "usage.db", **variables) as process,
    ):
        started = logged(process, "started")
        answer = json.loads(platform.invoke({"model": demo_int4.path.name, "prompt": "Once"}).body())
    assert answer["usage"]["completion_tokens"] >= 1
    assert started["fetch_ms"] > 0
