"""Whole exports of a tiny model: what an artifact holds, and that a failing export leaves nothing behind."""

from __future__ import annotations

import errno
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

import pilotlight_export.fuse
from pilotlight.artifact import GRAPH, WEIGHTS, Artifact
from pilotlight_export.errors import ExportError, TargetError, UnsupportedModel, VerificationError
from pilotlight_export.export import export_model
from pilotlight_export.fuse.rotary import Rotation, read_rotation
from pilotlight_export.progress import Progress
from pilotlight_export.verify.graph_runner import GraphRunner, Graphs
from pilotlight_export.verify.reference import Reference
from tiny_models import CHAT_TEMPLATE

pytestmark = pytest.mark.model
SILENT = Progress(io.StringIO())


def initializers(artifact: Artifact) -> dict[str, ir.TensorProtocol]:
    graph = ir.load(artifact.graph_path).graph
    return {name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None}


def op_types(artifact: Artifact) -> set[str]:
    return {node.op_type for node in ir.load(artifact.graph_path).graph}


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_an_artifact_opens_and_its_checksums_hold(artifacts: dict[str, Artifact], precision: str) -> None:
    artifact = artifacts[precision]
    artifact.verify()
    assert artifact.manifest.precision == precision
    assert artifact.manifest.special_tokens.eos_ids == [1, 2]
    assert artifact.optional_text("chat_template.jinja") == CHAT_TEMPLATE
    assert artifact.optional_text("LICENSE") == "Use it as you like.\n"
    assert set(artifact.manifest.files) == {entry.name for entry in artifact.path.iterdir()} - {"manifest.json"}


def test_parity_and_fidelity_are_in_the_manifest(artifacts: dict[str, Artifact]) -> None:
    exact = artifacts["fp32"].manifest.verification
    assert 0 < float(exact["batched_decode_max_abs_difference"]) <= 1e-4
    assert exact["full_context_tokens"] == 128
    quantized = [artifacts[precision].manifest.verification for precision in ("int8", "int4")]
    assert 0 < float(quantized[0]["mean_kl"]) < float(quantized[1]["mean_kl"])
    assert float(quantized[0]["mean_kl"]) < 0.01


def test_every_large_tensor_starts_on_a_page_and_no_bytes_are_stored_twice(artifacts: dict[str, Artifact]) -> None:
    for artifact in artifacts.values():
        external = [tensor for tensor in initializers(artifact).values() if isinstance(tensor, ir.ExternalTensor)]
        contents = {tensor.offset: tensor.tobytes() for tensor in external}
        assert all(offset is not None and offset % 4096 == 0 for offset in contents)
        assert len(set(contents.values())) == len(contents)
        inline = [tensor for tensor in initializers(artifact).values() if not isinstance(tensor, ir.ExternalTensor)]
        assert all(tensor.nbytes < 1024 for tensor in inline)


def test_a_tied_head_shares_the_bytes_of_the_embedding(artifacts: dict[str, Artifact]) -> None:
    for precision in ("int8", "int4"):
        tensors = initializers(artifacts[precision])
        rows, packed = (tensors[f"model.embed_tokens.weight.{part}"] for part in ("rows", "packed"))
        assert isinstance(rows, ir.ExternalTensor)
        assert isinstance(packed, ir.ExternalTensor)
        assert rows.offset == packed.offset
    assert "Gemm" in op_types(artifacts["fp32"])


def test_quantized_artifacts_use_quantized_kernels_only(artifacts: dict[str, Artifact]) -> None:
    for precision in ("int8", "int4"):
        assert {"MatMulNBits", "GatherBlockQuantized"} <= op_types(artifacts[precision])
        assert not op_types(artifacts[precision]) & {"MatMul", "Gemm"}


def test_sizes_shrink_with_the_precision(artifacts: dict[str, Artifact]) -> None:
    num_parameters = artifacts["fp32"].manifest.num_parameters
    bytes_per_parameter = {
        precision: sum(tensor.nbytes for name, tensor in initializers(artifact).items() if "rows" not in name)
        / num_parameters
        for precision, artifact in artifacts.items()
    }
    assert bytes_per_parameter["fp32"] < 4.3
    assert bytes_per_parameter["int8"] < 1.6
    assert bytes_per_parameter["int4"] < 1.1


def test_greedy_text_is_that_of_transformers(artifacts: dict[str, Artifact], tiny_llama: Path) -> None:
    artifact = artifacts["fp32"]
    runner = GraphRunner(Graphs(artifact.path, artifact.manifest.shapes), 1, 128)
    tokens = [0, 70, 80, 90]
    logits = runner.prefill([tokens], [[3]])
    while len(tokens) < 128:
        tokens.append(int(logits.argmax()))
        logits = runner.decode(np.array(tokens[-1:]))
    expected = Reference(tiny_llama).logits(tokens, range(3, 127)).argmax(axis=-1)
    assert expected.tolist() == tokens[4:]


def test_the_same_export_again_is_byte_for_byte_the_same(
    artifacts: dict[str, Artifact], tiny_llama: Path, tmp_path: Path
) -> None:
    export_model(str(tiny_llama), tmp_path / "again", precision="int4", progress=SILENT)
    for name in [*artifacts["int4"].manifest.files, "manifest.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (artifacts["int4"].path / name).read_bytes(), name


def test_a_wrong_graph_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misread(graph: ir.Graph, module: str) -> Rotation:
        rotation = read_rotation(graph, module)
        return Rotation(rotation.frequencies * np.float32(1.01), rotation.scale)

    monkeypatch.setattr(pilotlight_export.fuse, "read_rotation", misread)
    with pytest.raises(VerificationError, match=r"logits differ from PyTorch's by .* allowed is 0\.001"):
        export_model(str(tiny_llama), tmp_path / "out", precision="fp32", progress=SILENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupt_or_a_full_disk_leaves_the_old_artifact_alone(
    artifacts: dict[str, Artifact],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
) -> None:
    def fail(*_: object) -> None:
        raise failure

    shutil.copytree(artifacts["int8"].path, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    monkeypatch.setattr("pilotlight_export.weights.WeightFile.add", fail)
    with pytest.raises((KeyboardInterrupt, TargetError)):
        export_model(str(tiny_llama), tmp_path / "out", precision="fp32", progress=SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_an_old_artifact_is_replaced(artifacts: dict[str, Artifact], tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts["fp32"].path, tmp_path / "out")
    manifest = export_model(str(tiny_llama), tmp_path / "out", precision="int8", progress=SILENT)
    assert manifest == artifacts["int8"].manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in (GRAPH, WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (artifacts["int8"].path / name).read_bytes()


def test_a_directory_that_is_no_artifact_is_never_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(TargetError, match="not an artifact; it will not be replaced"):
        export_model(str(tiny_llama), tmp_path, progress=SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_target_that_cannot_be_made_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="file"):
        export_model(str(tiny_llama), tmp_path / "file" / "out", progress=SILENT)


def test_narrow_models_are_refused_before_they_are_exported(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 80'))
    monkeypatch.setattr("pilotlight_export.export.trace", None)
    with pytest.raises(UnsupportedModel, match="intermediate_size 80"):
        export_model(str(model), tmp_path / "out", precision="int4", progress=SILENT)


def reshaped(model: Path) -> None:
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 64'))


def without_a_weight(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def without_a_tokenizer_class(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer", "model_max_length": []}')


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (reshaped, "Optimum could not export the model: "),
        (without_a_weight, r"the weights lack model\.norm\.weight"),
        (without_a_tokenizer_class, "transformers cannot load the tokenizer: "),
    ],
)
def test_damage_that_shows_only_on_loading_is_one_line(
    tiny_llama: Path, tmp_path: Path, break_it: Callable[[Path], None], line: str
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    break_it(model)
    with pytest.raises(ExportError, match=line) as caught:
        export_model(str(model), tmp_path / "out", progress=SILENT)
    assert len(caught.value.message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
