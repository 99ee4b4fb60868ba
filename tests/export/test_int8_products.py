"""The int8 product by itself: close to the exact one, row by row, for whatever rows there are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from pilotlight.artifact import GRAPH
from pilotlight_export.fuse.graph import ABSTRACT, add_initializer, add_node
from pilotlight_export.lower import lower
from pilotlight_export.recipes import RECIPES, GraphRecipe, Recipe

WEIGHT = np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)

Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    directory = tmp_path_factory.mktemp("product")
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["rows", 64]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="product")
    linear = add_node(graph, "Linear", [x, add_initializer(graph, "w", WEIGHT)], name="y", domain=ABSTRACT)
    linear.outputs[0].dtype = ir.DataType.FLOAT
    graph.outputs.append(linear.outputs[0])
    scheme = RECIPES["w8a8"].graph.scheme_for("model.layers.0.mlp.down_proj.weight")
    assert scheme is not None
    lower(ir.Model(graph, ir_version=10), Recipe("w8a8", "w8a8", GraphRecipe((("*", scheme),))), directory)
    return ort.InferenceSession(str(directory / GRAPH), providers=["CPUExecutionProvider"])


def multiplied(session: ort.InferenceSession, rows: Rows) -> Rows:
    result: Rows = session.run(None, {"x": rows})[0]
    return result


def test_a_row_of_any_size_is_multiplied_as_exactly_as_eight_bits_allow(session: ort.InferenceSession) -> None:
    rows = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    rows *= np.array([1e-30, 1e-3, 1, 1e3, 1e30], np.float32)[:, None]
    exact = rows.astype(np.float64) @ WEIGHT.T
    errors = np.abs(multiplied(session, rows) - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert errors.max() < 0.05


def test_a_row_of_zeros_gives_zeros_and_touches_no_other(session: ort.InferenceSession) -> None:
    rows = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    alone = multiplied(session, rows[[0, 2]])
    rows[1] = 0
    result = multiplied(session, rows)
    assert np.array_equal(result[1], np.zeros(48))
    assert np.array_equal(result[[0, 2]], alone)
