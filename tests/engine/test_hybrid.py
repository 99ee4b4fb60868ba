"""A hybrid's session: prompts on one graph and a float cache, steps on two others and an int8 cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pilotlight.artifact import BATCH_GRAPH, KV_SCALES, Artifact, open_artifact
from pilotlight.engine.pace import DEFAULT_MIN_BATCH_ROWS, DecodeGraph
from pilotlight.engine.session import OnnxSession, quickest_graphs
from pilotlight.errors import ArtifactError
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs

pytestmark = pytest.mark.model

CONTEXT = 96
PROMPTS = [list(range(first, first + length)) for first, length in ((40, 12), (200, 50), (90, 7), (300, 64), (20, 33))]


@pytest.fixture
def session(demo_hybrid: Artifact) -> OnnxSession:
    return OnnxSession(demo_hybrid, num_slots=len(PROMPTS), max_context_tokens=CONTEXT, num_threads=1)


def steps(session: OnnxSession, num_rows: int, num_steps: int) -> list[NDArray[np.float32]]:
    """Read so many prompts into slots, then step greedily; return the logits of each step, the prompts' own first."""
    logits = [session.prefill(slot, np.array(PROMPTS[slot]), 0)[0].copy() for slot in range(num_rows)]
    found = [np.stack(logits)]
    lengths = np.array([len(prompt) for prompt in PROMPTS[:num_rows]])
    graph = DecodeGraph.BATCH if num_rows >= DEFAULT_MIN_BATCH_ROWS else DecodeGraph.MAIN
    for step in range(num_steps):
        found.append(session.decode(found[-1].argmax(axis=-1), lengths + step, graph).copy())
    return found


@pytest.mark.parametrize("num_rows", [1, DEFAULT_MIN_BATCH_ROWS - 1, DEFAULT_MIN_BATCH_ROWS, len(PROMPTS)])
def test_steps_are_those_of_the_verified_graphs(session: OnnxSession, demo_hybrid: Artifact, num_rows: int) -> None:
    """The export's own runner, which verified the artifact, quantizes and chooses graphs by itself."""
    graphs = Graphs(demo_hybrid.path, demo_hybrid.manifest.shapes, {"session.intra_op.num_threads": "1"})
    runner = GraphRunner(graphs, num_rows, CONTEXT)
    rows = PROMPTS[:num_rows]
    expected = [runner.prefill(rows, [[len(row) - 1] for row in rows])]
    for found in steps(session, num_rows, 8):
        np.testing.assert_allclose(found, expected[-1], rtol=0, atol=2e-5)
        expected.append(runner.decode(found.argmax(axis=-1)))


def test_a_chunked_prompt_goes_on_where_its_last_chunk_ended(session: OnnxSession) -> None:
    whole = steps(session, 1, 5)
    prompt = np.array(PROMPTS[0])
    for first in range(0, len(prompt), 4):
        logits = session.prefill(0, prompt[first : first + 4], first)
    np.testing.assert_allclose(logits, whole[0], atol=1e-4)
    np.testing.assert_allclose(session.decode(whole[0].argmax(axis=-1), np.array([len(prompt)])), whole[1], atol=0.05)


def test_a_prompt_does_not_touch_other_slots(session: OnnxSession) -> None:
    expected = steps(session, 2, 3)
    steps(session, 2, 0)
    session.prefill(3, np.array(PROMPTS[3]), 0)
    found = session.decode(expected[0].argmax(axis=-1), np.array([len(prompt) for prompt in PROMPTS[:2]]))
    assert np.array_equal(found, expected[1])


def lean_beside(session: OnnxSession, artifact: Artifact, *, prepacks: bool = True) -> OnnxSession:
    graphs = quickest_graphs(artifact.manifest)
    assert graphs == (BATCH_GRAPH,)
    return OnnxSession(artifact, len(PROMPTS), CONTEXT, 1, graphs=graphs, prepacks=prepacks, beside=session)


def test_a_prompt_goes_on_in_the_whole_session(session: OnnxSession, demo_hybrid: Artifact) -> None:
    """A replica begins on its graph for batches alone, and moves over between two chunks."""
    expected = steps(session, 1, 2)
    prompt = np.array(PROMPTS[0])
    session.prefill(1, np.array(PROMPTS[3]), 0)  # another prompt was read between
    lean_beside(session, demo_hybrid).prefill(0, prompt[:6], 0)
    logits = session.prefill(0, prompt[6:], 6)
    assert np.corrcoef(logits[0], expected[0][0])[0, 1] > 0.97
    assert session.save_prefix(0, 0, 8) is None, "other graphs round otherwise, and a hit must not change a bit"
    session.prefill(0, prompt, 0)
    assert session.save_prefix(0, 0, 8) is not None


@pytest.mark.parametrize("prepacks", [True, False])
def test_a_lean_session_steps_as_the_whole_one(session: OnnxSession, demo_hybrid: Artifact, prepacks: bool) -> None:
    """Its sums are of integers, so it does not matter how the weights are laid out."""
    expected = steps(session, len(PROMPTS), 3)
    steps(session, len(PROMPTS), 0)
    lean = lean_beside(session, demo_hybrid, prepacks=prepacks)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for index in range(3):
        logits = lean.decode(expected[index].argmax(axis=-1), lengths + index)
        assert np.array_equal(logits, expected[index + 1])


def test_a_prompt_is_read_alike_with_and_without_prepacked_weights(session: OnnxSession, demo_hybrid: Artifact) -> None:
    prompt = np.array(PROMPTS[1])
    packed, unpacked = (lean_beside(session, demo_hybrid, prepacks=prepacks) for prepacks in (True, False))
    assert np.array_equal(packed.prefill(0, prompt, 0), unpacked.prefill(1, prompt, 0))


def test_a_kept_graph_opens_without_its_prepacked_weights(demo_hybrid: Artifact, tmp_path: Path) -> None:
    prompt = np.array(PROMPTS[1])
    graphs = quickest_graphs(demo_hybrid.manifest)
    options = (demo_hybrid, len(PROMPTS), CONTEXT, 1, tmp_path)
    kept = OnnxSession(*options, graphs=graphs).prefill(0, prompt, 0)
    assert np.array_equal(OnnxSession(*options, graphs=graphs, prepacks=False).prefill(0, prompt, 0), kept)


def test_the_cache_takes_a_byte_a_value(session: OnnxSession, demo_hybrid: Artifact) -> None:
    shapes = demo_hybrid.manifest.shapes
    assert session.kv_bytes_per_token == 2 * shapes.num_layers * shapes.num_kv_heads * shapes.head_size


@pytest.mark.parametrize("content", [None, b"not an array", np.zeros((1, 2, 3, 4), np.float32)])
def test_scales_that_do_not_fit_are_refused(
    demo_hybrid: Artifact, tmp_path: Path, content: bytes | NDArray[np.float32] | None
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(demo_hybrid.path, path)
    artifact = open_artifact(path)
    (path / KV_SCALES).unlink()
    if isinstance(content, bytes):
        (path / KV_SCALES).write_bytes(content)
    elif content is not None:
        np.save(path / KV_SCALES, content)
    with pytest.raises(ArtifactError, match=r"kv_scales\.npy: has (no )?scales"):
        OnnxSession(artifact, num_slots=1, max_context_tokens=CONTEXT, num_threads=1)
