"""The traced graph and its weights: no weight passes through Optimum's file, and each is read as it was stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from pilotlight_export.checkpoint import open_checkpoint
from pilotlight_export.errors import SourceError
from pilotlight_export.fuse import fuse
from pilotlight_export.source import open_source
from pilotlight_export.trace import trace
from tiny_models import write_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be stored otherwise."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def store_as(model: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Store a model's weights in another type and return them widened again."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.float() for name, tensor in weights.items()}


def shard(model: Path) -> None:
    """Split a model's weights over two files with an index."""
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, model / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def weights_of(traced: ir.Model) -> dict[str, ir.TensorProtocol]:
    found = traced.graph.initializers.items()
    return {name: value.const_value for name, value in found if value.const_value is not None}


@pytest.mark.model
def test_no_weight_passes_through_the_traced_file(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=20_000)
    traced = trace(model, tmp_path / "traced")
    assert (model / "model.safetensors").stat().st_size > 5_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "traced").glob("*.onnx*")) < 200_000
    assert [value.name for value in traced.graph.inputs if value.name in open_checkpoint(model)] == []
    assert {name for name, tensor in weights_of(traced).items() if isinstance(tensor, ir.LazyTensor)} == set(
        open_checkpoint(model)
    )


@pytest.mark.model
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_weights_are_what_was_stored_bit_for_bit(model: Path, tmp_path: Path, dtype: str, sharded: bool) -> None:
    expected = store_as(model, TYPES[dtype])
    if sharded:
        shard(model)
    source = open_source(str(model), None)
    traced = trace(model, tmp_path / "traced")
    found = weights_of(traced)
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), weight.numpy(), strict=True)
    fuse(traced, source.shapes)


def test_numbers_of_another_kind_are_refused(model: Path) -> None:
    store_as(model, torch.float64)
    with pytest.raises(SourceError, match=r"stores \S+ as F64; supported: F32, F16, BF16"):
        open_checkpoint(model)


def test_a_weight_that_the_files_lack_is_one_line(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"the weights lack model\.norm\.weight"):
        trace(model, tmp_path / "traced")
