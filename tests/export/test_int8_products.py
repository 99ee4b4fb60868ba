"""The int8 product by itself: close to the exact one, row by row, for whatever rows there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx_ir.passes import common

from pilotlight.artifact import GRAPH
from pilotlight_export.fuse.graph import ABSTRACT, KERNELS, add_initializer, add_node
from pilotlight_export.fuse.linear import pack_linears, split_columns
from pilotlight_export.lower import lower
from pilotlight_export.recipes import RECIPES, GraphRecipe, Recipe

RANDOM = np.random.default_rng(1)
WEIGHT = RANDOM.standard_normal((48, 64)).astype(np.float32)
GATE, UP = RANDOM.standard_normal((2, 96, 64)).astype(np.float32) / 8
DOWN = RANDOM.standard_normal((64, 96)).astype(np.float32)

Rows = NDArray[np.float32]


def lowered(graph: ir.Graph, directory: Path) -> ort.InferenceSession:
    scheme = RECIPES["w8a8"].graph.scheme_for("model.layers.0.mlp.down_proj.weight")
    assert scheme is not None
    lower(ir.Model(graph, ir_version=10), Recipe("w8a8", "w8a8", GraphRecipe((("*", scheme),))), directory)
    return ort.InferenceSession(str(directory / GRAPH), providers=["CPUExecutionProvider"])


def graph_of_rows() -> tuple[ir.Graph, ir.Value]:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["rows", 64]))
    return ir.Graph([x], [], nodes=[], opset_imports={"": 18, KERNELS: 1}, name="products"), x


def linear(graph: ir.Graph, x: ir.Value, weight: Rows, name: str) -> ir.Node:
    return add_node(graph, "Linear", [x, add_initializer(graph, f"{name}.weight", weight)], name=name, domain=ABSTRACT)


def give(graph: ir.Graph, value: ir.Value) -> ir.Graph:
    value.dtype = ir.DataType.FLOAT
    graph.outputs.append(value)
    return graph


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ort.InferenceSession:
    graph, x = graph_of_rows()
    return lowered(give(graph, linear(graph, x, WEIGHT, "y").outputs[0]), tmp_path_factory.mktemp("product"))


@pytest.fixture(scope="module")
def mlp_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate and up packed into one ``Linear``, as ``fuse`` does, and a third product behind them."""
    directory = tmp_path_factory.mktemp("mlp")
    graph, x = graph_of_rows()
    packed = pack_linears(graph, [linear(graph, x, GATE, "gate"), linear(graph, x, UP, "up")], "/gate_up")
    gate, up = split_columns(graph, packed, [96, 96], "/split")
    activated = add_node(graph, "QuickGelu", [gate], name="/act", domain=KERNELS, attributes={"alpha": 1.0})
    product = add_node(graph, "Mul", [activated.outputs[0], up], name="/mul")
    give(graph, linear(graph, product.outputs[0], DOWN, "down").outputs[0])
    common.RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
    lowered(graph, directory)
    return directory


def exact_mlp(rows: Rows) -> NDArray[np.float64]:
    gate = rows.astype(np.float64) @ GATE.T
    result: NDArray[np.float64] = (gate / (1 + np.exp(-gate)) * (rows @ UP.T.astype(np.float64))) @ DOWN.T
    return result


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


def test_an_mlp_is_as_exact_as_its_products(mlp_directory: Path) -> None:
    session = ort.InferenceSession(str(mlp_directory / GRAPH), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(4).standard_normal((5, 64)).astype(np.float32)
    rows *= np.array([1e-12, 1e-3, 1, 10, 1e2], np.float32)[:, None]
    exact = exact_mlp(rows)
    errors = np.abs(multiplied(session, rows) - exact).max(axis=1) / np.abs(exact).max(axis=1)
    assert errors.max() < 0.05
    rows[2] = 0
    assert np.array_equal(multiplied(session, rows)[2], np.zeros(64))


def test_an_mlp_has_three_products_and_nothing_to_split(mlp_directory: Path) -> None:
    counts = Counter(node.op_type for node in ir.load(mlp_directory / GRAPH).graph)
    assert counts["MatMulIntegerToFloat"] == 3
    assert counts["ReduceMax"] == 2, "gate and up read the same tokens"
    assert counts["Split"] == 0
    assert counts["Mul"] == 6, "the steps of x, gate's results, gate and up, the steps of that, both steps, the results"
