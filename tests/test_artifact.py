"""The artifact: what is refused, and with which line; the digest; the manifest's way to disk and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.artifact import (
    CHAT_TEMPLATE,
    GRAPH,
    LICENSE,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    decode_manifest,
    open_artifact,
    sha256_of,
)
from pilotlight.errors import ArtifactError
from support import CHATML, toy_manifest, write_artifact

MANIFEST_JSON = json.loads(toy_manifest({name: FileEntry("0", 0) for name in (GRAPH, WEIGHTS, TOKENIZER)}).encode())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sound artifact to spoil."""
    return write_artifact(tmp_path / "toy")


def refusal(path: Path) -> str:
    """Open and verify, and return the line that refuses the artifact."""
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path).verify()
    assert "\n" not in caught.value.message
    return caught.value.message


def refusal_of_manifest(raw: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        decode_manifest(raw, Path("toy/manifest.json"))
    assert "\n" not in caught.value.message
    return caught.value.message


def changed(**changes: Any) -> bytes:
    return json.dumps({**MANIFEST_JSON, **changes}).encode()


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in MANIFEST_JSON.items() if key != name}).encode()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"!")


def alter(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def test_what_is_no_path_is_no_artifact() -> None:
    with pytest.raises(ArtifactError, match="is no path"):
        open_artifact(Path("a\0b"))


def test_a_sound_artifact_opens_and_verifies(directory: Path) -> None:
    artifact = open_artifact(directory)
    artifact.verify()
    assert artifact.path == directory
    assert artifact.graph_path.read_bytes() == b"no graph"
    assert artifact.tokenizer_path == directory / TOKENIZER
    assert artifact.optional_text(CHAT_TEMPLATE) == CHATML
    assert artifact.optional_text(LICENSE) is None


def test_nothing_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path}/none: does not exist"


def test_a_file_instead_of_a_directory(directory: Path) -> None:
    assert refusal(directory / GRAPH) == f"{directory}/model.onnx: is not a directory"


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    assert refusal(path) == f"{path}/manifest.json: cannot be read (File name too long)"


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}/manifest.json: is missing, so this is not an artifact"


def test_a_manifest_that_cannot_be_read(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    (directory / MANIFEST).mkdir()
    assert refusal(directory) == f"{directory}/manifest.json: cannot be read (Is a directory)"


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, TOKENIZER, CHAT_TEMPLATE])
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (Path.unlink, "is missing"),
        (truncate, "is truncated: {less:,} bytes instead of {size:,}"),
        (lengthen, "is too long: {more:,} bytes instead of {size:,}"),
        (alter, "was altered: its sha256 is not the one in the manifest"),
        (replace_by_loop, "cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_a_damaged_file(directory: Path, name: str, spoil: Callable[[Path], None], problem: str) -> None:
    size = (directory / name).stat().st_size
    spoil(directory / name)
    expected = problem.format(size=size, less=size - 1, more=size + 1)
    assert refusal(directory) == f"{directory / name}: {expected}"


def test_a_file_that_vanishes_after_opening(directory: Path) -> None:
    artifact = open_artifact(directory)
    artifact.graph_path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx: cannot be read \(No such file or directory\)$"):
        artifact.verify()


def test_opening_leaves_checksums_to_verify(directory: Path) -> None:
    alter(directory / WEIGHTS)
    artifact = open_artifact(directory)
    artifact.verify_file(GRAPH)
    with pytest.raises(ArtifactError):
        artifact.verify_file(WEIGHTS)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "is not a manifest (Input data was truncated)"),
        (b"\xff\xfe", "is not a manifest (JSON is malformed: invalid character (byte 0))"),
        (b"[]", "is not a manifest (Expected `object`, got `array`)"),
        (b'{"format_version":' + b"[" * 100_000, "is not a manifest (maximum recursion depth exceeded while "
         "deserializing an object)"),
        (b"{}", "is not a manifest (Object missing required field `format_version`)"),
        (changed(format_version="1"), "is not a manifest (Expected `int`, got `str`)"),
        (changed(format_version=0), "is not a manifest (Expected `int` >= 1 - at `$.format_version`)"),
        (changed(format_version=3), "has format version 3; this version of Pilotlight reads 2"),
        (b'{"format_version": 7, "future": true}', "has format version 7; this version of Pilotlight reads 2"),
        (without("source"), "is not a manifest (Object missing required field `source`)"),
        (changed(colour="red"), "is not a manifest (Object contains unknown field `colour`)"),
        (changed(family=3), "is not a manifest (Expected `str`, got `int` - at `$.family`)"),
        (changed(kv={"dtype": "int3"}), "is not a manifest (Invalid enum value 'int3' - at `$.kv.dtype`)"),
        (changed(shapes={**MANIFEST_JSON["shapes"], "num_layers": 0}),
         "is not a manifest (Expected `int` >= 1 - at `$.shapes.num_layers`)"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(raw: bytes, problem: str) -> None:
    assert refusal_of_manifest(raw) == f"toy/manifest.json: {problem}"


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, TOKENIZER])
def test_a_required_file_that_is_not_listed(name: str) -> None:
    files = {key: value for key, value in MANIFEST_JSON["files"].items() if key != name}
    assert refusal_of_manifest(changed(files=files)) == f"toy/manifest.json: does not list {name}"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/file", "..", ".", "", "a\0b", "back\\slash", "line\nbreak", MANIFEST]
)
def test_a_file_name_that_could_leave_the_directory(name: str) -> None:
    files = {**MANIFEST_JSON["files"], name: {"sha256": "0", "size_bytes": 0}}
    expected = f"toy/manifest.json: lists {name!r}, which is not a plain file name"
    assert refusal_of_manifest(changed(files=files)) == expected


def test_the_digest_is_the_manifests_own(directory: Path, tmp_path: Path) -> None:
    raw = (directory / MANIFEST).read_bytes()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert open_artifact(directory).digest == digest
    assert open_artifact(write_artifact(tmp_path / "again")).digest == digest
    assert open_artifact(write_artifact(tmp_path / "other", precision="int4")).digest != digest


def test_a_manifest_survives_the_way_to_disk_and_back() -> None:
    manifest = toy_manifest(
        {name: FileEntry("ab" * 32, 7) for name in (WEIGHTS, TOKENIZER, GRAPH)},
        recipe={"block_size": 32, "symmetric": True, "scales": "by least squares"},
        verification={"mean_kl": 0.042},
    )
    raw = manifest.encode()
    assert decode_manifest(raw, Path(MANIFEST)) == manifest
    assert decode_manifest(raw, Path(MANIFEST)).encode() == raw
    assert raw.endswith(b"}\n")
    assert [*json.loads(raw)] == sorted(Manifest.__struct_fields__)


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == hashlib.sha256(b"").hexdigest()
