"""What can be exported is told from what cannot before any long work, in one line that names what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from pilotlight_export.config import check_block_size, read_special_tokens
from pilotlight_export.errors import SourceError, UnsupportedModel
from pilotlight_export.source import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def configure(model: Path, **settings: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_of_a_missing_shard(model: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def small_vocabulary(model: Path) -> None:
    configure(model, vocab_size=100)


def test_a_directory_is_described(tiny_llama: Path) -> None:
    source = open_source(str(tiny_llama), None)
    assert source.entry.model == "tiny-llama"
    assert source.entry.revision is None
    assert source.entry.license == "apache-2.0"
    assert source.family.name == "llama"
    assert source.shapes.head_size == 16
    assert source.num_parameters == 320 * 64 + 2 * (64 * (64 + 64 + 64) + 3 * 64 * 96 + 2 * 64) + 64


def test_special_tokens_are_joined_from_both_configs() -> None:
    tokens = read_special_tokens({"eos_token_id": 1, "bos_token_id": 0}, {"eos_token_id": [2, 1], "pad_token_id": 2})
    assert (tokens.bos_id, tokens.eos_ids, tokens.pad_id) == (0, [2, 1], 2)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; supported: Gemma2ForCausalLM, "),
        ({"architectures": None}, "no architecture is not supported"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "its own code"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not supported in llama; supported: default, linear, "),
        ({"head_dim": 24}, "head size 24 is not supported: it must be a multiple of 16"),
    ],
)
def test_a_config_that_cannot_be_exported(model: Path, settings: dict[str, Any], line: str) -> None:
    configure(model, **settings)
    with pytest.raises(UnsupportedModel, match=line):
        open_source(str(model), None)


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (lambda model: (model / "config.json").unlink(), r"config\.json: is missing"),
        (lambda model: (model / "config.json").write_text("[]"), r"config\.json: is not a JSON object"),
        (lambda model: (model / "config.json").write_text("{"), r"config\.json: cannot be read"),
        (lambda model: configure(model, hidden_size="wide"), "malformed dimension"),
        (lambda model: (model / "model.safetensors").unlink(), "found no weights; only safetensors"),
        (only_pickles, r"found pytorch_model\.bin, which may run code when it is loaded; only safetensors"),
        (lambda model: truncate(model / "model.safetensors"), r"model\.safetensors: has [\d,]+ bytes instead of"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "not a complete safetensors file"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"), "not a safetensors"),
        (index_of_a_missing_shard, r"model-00001-of-00002\.safetensors: is missing"),
        (lambda model: (model / "tokenizer.json").unlink(), r"tokenizer\.json: is missing"),
        (lambda model: truncate(model / "tokenizer.json"), r"tokenizer\.json: cannot be read"),
        (small_vocabulary, "the model knows only 100 tokens"),
    ],
)
def test_an_incomplete_or_damaged_model(model: Path, break_it: Callable[[Path], object], line: str) -> None:
    break_it(model)
    with pytest.raises(SourceError, match=line):
        open_source(str(model), None)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory, and not the id of a model"):
        open_source(str(tmp_path / "nowhere"), None)


def test_a_directory_has_no_revision(tiny_llama: Path) -> None:
    with pytest.raises(SourceError, match="has no revisions; leave out --revision main"):
        open_source(str(tiny_llama), "main")


@pytest.mark.parametrize("width", ["hidden_size", "intermediate_size"])
def test_rows_that_do_not_divide_into_blocks(width: str) -> None:
    config = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 10,
        "max_position_embeddings": 16,
    }
    check_block_size(config, 32)
    with pytest.raises(UnsupportedModel, match=f"{width} 80 is not a multiple of the quantization block of 32"):
        check_block_size(config | {width: 80}, 32)


class FakeHub:
    """Stands in for ``snapshot_download``: serves one model and notes what was asked for."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.requests: list[tuple[str | None, bool]] = []

    def download(self, model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert model == "someone/tiny-llama"
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".bin", ".py", ".pt"))]
        self.requests.append((revision, "model.safetensors" in allow_patterns))
        return str(self.snapshot)


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(Path(shutil.copytree(tiny_llama, tmp_path / COMMIT)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


def test_the_hub_gives_weights_of_the_commit_whose_config_was_checked(hub: FakeHub) -> None:
    source = open_source("someone/tiny-llama", "main")
    assert hub.requests == [("main", False), (COMMIT, True)]
    assert (source.entry.model, source.entry.revision) == ("someone/tiny-llama", COMMIT)


def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(hub: FakeHub) -> None:
    configure(hub.snapshot, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModel):
        open_source("someone/tiny-llama", None)
    assert hub.requests == [(None, False)]


def answer(status: int) -> requests.Response:
    response = requests.Response()
    response.status_code = status
    return response


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LocalEntryNotFoundError("cannot reach it\nsee the log"), "no such directory, and the hub cannot be reached"),
        (RepositoryNotFoundError("401 Client Error", answer(401)), "no such directory, and no such model on the hub"),
        (GatedRepoError("403 Client Error", answer(403)), "is gated; accept its licence on the hub and set HF_TOKEN"),
        (HfHubHTTPError("500 Server Error\nRequest ID: 7", answer(500)), r"the hub refused it \(500 Server Error\)"),
    ],
)
def test_a_hub_that_gives_no_model_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(SourceError, match=f"^someone/thing: {line}$"):
        open_source("someone/thing", None)
