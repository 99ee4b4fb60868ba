"""Weights that were pickled: refused, or converted by a reader of tensors that runs nothing."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pilotlight_export.checkpoint import open_checkpoint
from pilotlight_export.errors import SourceError, UnsupportedModel
from pilotlight_export.source import open_source


@pytest.fixture
def pickled(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model, its weights in one pickle file."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (_touch, (str(self.path),))


def _touch(path: str) -> None:
    Path(path).write_text("your machine is mine")


def test_pickles_are_refused_unless_the_user_insists(pickled: Path) -> None:
    expected = r"found pytorch_model\.bin, which may run code .* --allow-pickle converts"
    with pytest.raises(SourceError, match=expected):
        open_source(str(pickled), None)


def test_pickles_become_safetensors_in_a_place_of_their_own(pickled: Path, tiny_llama: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in pickled.iterdir())
    source = open_source(str(pickled), None, unpickle_into=tmp_path)
    assert sorted(path.name for path in pickled.iterdir()) == before
    assert not list(source.directory.glob("*.bin"))
    assert source.entry == open_source(str(tiny_llama), None).entry.__class__("model", None, "apache-2.0")
    assert source.num_parameters == open_source(str(tiny_llama), None).num_parameters
    expected = load_file(tiny_llama / "model.safetensors")
    found = open_checkpoint(source.directory)
    assert found.keys() == expected.keys()
    assert all((found[name].read() == expected[name].numpy()).all() for name in expected)


def test_shards_are_converted_one_by_one(pickled: Path, tmp_path: Path) -> None:
    weights = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    names = sorted(weights)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, pickled / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (pickled / "pytorch_model.bin").unlink()
    source = open_source(str(pickled), None, unpickle_into=tmp_path)
    assert open_checkpoint(source.directory).keys() == weights.keys()
    (pickled / "pytorch_model-00002-of-00002.bin").unlink()
    shutil.rmtree(source.directory)
    with pytest.raises(SourceError, match=r"pytorch_model-00002-of-00002\.bin: is missing"):
        open_source(str(pickled), None, unpickle_into=tmp_path)


def test_weights_that_share_memory_are_stored_apart(pickled: Path, tmp_path: Path) -> None:
    weights = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, pickled / "pytorch_model.bin")
    source = open_source(str(pickled), None, unpickle_into=tmp_path)
    assert "lm_head.weight" in open_checkpoint(source.directory)


def test_no_code_is_run_even_then(pickled: Path, tmp_path: Path) -> None:
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "mine")}))
    with pytest.raises(SourceError, match=r"pytorch_model\.bin: holds more than tensors, or is damaged"):
        open_source(str(pickled), None, unpickle_into=tmp_path)
    assert not (tmp_path / "mine").exists()


def test_safetensors_are_taken_where_both_exist(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "mine")}))
    assert open_source(str(model), None, unpickle_into=tmp_path).directory == model
    assert not (tmp_path / "mine").exists()


def test_safetensors_under_another_name_do_not_hide_a_pickle(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"found pytorch_model\.bin"):
        open_source(str(model), None)


def test_a_model_with_code_of_its_own_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'mine')!r}, 'w')")
    with pytest.raises(UnsupportedModel, match="brings its own code"):
        open_source(str(model), None)
    assert not (tmp_path / "mine").exists()
