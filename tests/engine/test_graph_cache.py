"""Kept graphs: used when they are ours and fit, made again when they are stale, never trusted when they are foreign."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from pilotlight.artifact import GRAPH, WEIGHTS, Artifact, Manifest, open_artifact
from pilotlight.engine.graph_cache import LEFT_FREE_BYTES, STAMP, UNUSED_S, GraphCache
from pilotlight.engine.session import OnnxSession
from support import write_artifact

PROMPT = np.arange(10, 90, dtype=np.int64)


def keep(cache: GraphCache, artifact: Artifact) -> Path:
    with cache.making(artifact, GRAPH) as target:
        target.write_bytes(b"graph")
        (target.parent / WEIGHTS).write_bytes(b"weights")
    kept = cache.find(artifact, GRAPH)
    assert kept is not None
    return kept


def test_a_graph_is_found_after_it_was_made(toy_artifact: Artifact, tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", "runtime 1")
    assert cache.find(toy_artifact, GRAPH) is None
    kept = keep(cache, toy_artifact)
    assert kept.read_bytes() == b"graph"
    assert GraphCache(tmp_path / "cache", "runtime 1").find(toy_artifact, GRAPH) == kept
    cache.discard(toy_artifact, GRAPH)
    assert cache.find(toy_artifact, GRAPH) is None


def test_a_graph_of_another_runtime_is_stale_and_is_replaced(toy_artifact: Artifact, tmp_path: Path) -> None:
    keep(GraphCache(tmp_path, "runtime 1"), toy_artifact)
    newer = GraphCache(tmp_path, "runtime 2")
    assert newer.find(toy_artifact, GRAPH) is None
    keep(newer, toy_artifact)
    assert len(list(tmp_path.rglob(STAMP))) == 1


def test_a_graph_of_another_processor_is_stale(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(GraphCache(tmp_path, "runtime 1"), toy_artifact)
    monkeypatch.setattr("pilotlight.engine.graph_cache._processor", lambda: "another")
    assert GraphCache(tmp_path, "runtime 1").find(toy_artifact, GRAPH) is None


def test_a_graph_that_was_moved_to_another_artifact_is_foreign(toy_artifact: Artifact, tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", "runtime 1")
    other = open_artifact(write_artifact(tmp_path / "other", family="other"))
    entry = keep(cache, toy_artifact).parent
    place = keep(cache, other).parent
    cache.discard(other, GRAPH)
    entry.rename(place)
    assert cache.find(other, GRAPH) is None


def _truncate(entry: Path) -> None:
    (entry / WEIGHTS).write_bytes(b"w")


def _touch(entry: Path) -> None:
    os.utime(entry / WEIGHTS, ns=(1, 1))


def _alter_graph(entry: Path) -> None:
    (entry / GRAPH).write_bytes(b"grapH")


def _open_to_others(entry: Path) -> None:
    entry.chmod(0o777)


def _garble_stamp(entry: Path) -> None:
    (entry / STAMP).write_bytes(b"{")


@pytest.mark.parametrize("damage", [_truncate, _touch, _alter_graph, _open_to_others, _garble_stamp])
def test_a_changed_graph_is_not_trusted(toy_artifact: Artifact, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = GraphCache(tmp_path, "runtime 1")
    damage(keep(cache, toy_artifact).parent)
    assert cache.find(toy_artifact, GRAPH) is None
    keep(cache, toy_artifact)


def test_a_failed_making_leaves_nothing(toy_artifact: Artifact, tmp_path: Path) -> None:
    cache = GraphCache(tmp_path, "runtime 1")
    with pytest.raises(FileNotFoundError), cache.making(toy_artifact, GRAPH) as target:
        target.write_bytes(b"a graph without weights")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_killed_process_had_begun_is_cleared_away(toy_artifact: Artifact, tmp_path: Path) -> None:
    """A process that is killed while it makes a graph leaves up to a gigabyte behind."""

    def make_and_die() -> None:
        with GraphCache(tmp_path, "runtime 1").making(toy_artifact, GRAPH) as target:
            target.write_bytes(b"half a graph")
            os.kill(os.getpid(), signal.SIGKILL)

    maker = multiprocessing.get_context("fork").Process(target=make_and_die)
    maker.start()
    maker.join()
    assert len(list(tmp_path.glob(".making-*"))) == 1
    keep(GraphCache(tmp_path, "runtime 1"), toy_artifact)
    assert not list(tmp_path.glob(".making-*"))


def test_what_is_being_made_is_left_alone(toy_artifact: Artifact, tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", "runtime 1")
    with cache.making(toy_artifact, GRAPH) as target:
        target.write_bytes(b"graph")
        (target.parent / WEIGHTS).write_bytes(b"weights")
        keep(cache, open_artifact(write_artifact(tmp_path / "other", family="other")))
    assert cache.find(toy_artifact, GRAPH) is not None


def test_graphs_that_nobody_opened_for_long_are_cleared_away(toy_artifact: Artifact, tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", "runtime 1")
    others = [open_artifact(write_artifact(tmp_path / name, family=name)) for name in ("used", "unused")]
    long_ago = time.time() - UNUSED_S - 60
    for kept in [keep(cache, artifact) for artifact in others]:
        os.utime(kept.with_name(STAMP), (long_ago, long_ago))
    assert cache.find(others[0], GRAPH) is not None, "which counts as a use"
    keep(cache, toy_artifact)
    assert [cache.find(artifact, GRAPH) is not None for artifact in others] == [True, False]
    assert len(list((tmp_path / "cache").iterdir())) == 2, "and no empty folder of its artifact remains"


def test_a_nearly_full_disk_gets_no_graphs(
    toy_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=LEFT_FREE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match="No space left"):
        keep(GraphCache(tmp_path, "runtime 1"), toy_artifact)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _logits(artifact: Artifact, cache_dir: Path | None) -> NDArray[np.float32]:
    session = OnnxSession(artifact, 2, 128, num_threads=1, cache_dir=cache_dir)
    first = session.prefill(0, PROMPT, 0).copy()
    return np.concatenate([first, session.decode(np.array([5]), np.array([len(PROMPT)]))])


@pytest.mark.model
def test_a_kept_graph_computes_the_same_bits(demo_int4: Artifact, tmp_path: Path) -> None:
    plain = _logits(demo_int4, None)
    making = _logits(demo_int4, tmp_path)
    weights = next(tmp_path.rglob(STAMP)).with_name(WEIGHTS)
    made_at_ns = weights.stat().st_mtime_ns
    kept = _logits(demo_int4, tmp_path)
    assert weights.stat().st_mtime_ns == made_at_ns, "the kept graph was used, not made again"
    assert np.array_equal(plain, making)
    assert np.array_equal(plain, kept)


@pytest.mark.model
def test_a_graph_that_was_kept_wrongly_is_not_used(
    demo_int4: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(session: InferenceSession, manifest: Manifest) -> NDArray[np.float32]:
        """Make each session look different from the one before."""
        probed.append(session)
        return np.full(1, len(probed), np.float32)

    probed: list[InferenceSession] = []
    monkeypatch.setattr("pilotlight.engine.session._probe", probe)
    assert np.array_equal(_logits(demo_int4, tmp_path), _logits(demo_int4, None))
    assert len(probed) == 4, "prepacked, then without"
    assert not list(tmp_path.rglob(STAMP))


@pytest.mark.model
def test_a_kept_graph_that_does_not_load_is_dropped(demo_int4: Artifact, tmp_path: Path) -> None:
    plain = _logits(demo_int4, tmp_path)
    stamp_path = next(tmp_path.rglob(STAMP))
    (stamp_path.parent / GRAPH).write_bytes(b"no graph at all")
    cache = GraphCache(tmp_path, msgspec.json.decode(stamp_path.read_bytes())["runtime"])
    stamp_path.write_bytes(msgspec.json.encode(cache._stamp(demo_int4, GRAPH, stamp_path.parent)))
    assert np.array_equal(_logits(demo_int4, tmp_path), plain)
    assert cache.find(demo_int4, GRAPH) is None


@pytest.mark.model
def test_a_cache_that_cannot_be_written_is_no_error(demo_int4: Artifact, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert np.array_equal(_logits(demo_int4, blocked / "cache"), _logits(demo_int4, None))


@pytest.mark.model
def test_packed_weights_are_kept_where_the_kernels_read_them(demo_int4: Artifact, tmp_path: Path) -> None:
    """ONNX Runtime's own places shift at the first odd size, and what the kernels then read is noise."""
    _logits(demo_int4, tmp_path)
    graph = onnx.load(str(next(tmp_path.rglob(GRAPH))), load_external_data=False).graph
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    blobs = [blob for entry in entries if entry.key.startswith("prepacked_") for blob in entry.value.split("|")[1:]]
    places = [int(entry.value) for entry in entries if entry.key == "offset"]
    places += [int(blob.split(";")[0]) for blob in blobs]
    assert len(blobs) >= 4 * demo_int4.manifest.shapes.num_layers, "qkv, o, gate and up, down"
    assert [place for place in places if place % 64] == []
