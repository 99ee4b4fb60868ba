"""Optimum's ONNX export: the model as PyTorch traces it, in float32, with every weight under its own name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx_ir as ir

from pilotlight_export.checkpoint import lazy_weight, open_checkpoint
from pilotlight_export.errors import ExportError, SourceError, first_line
from pilotlight_export.quiet import quiet

TRACED_GRAPH = "model.onnx"


def trace(model_dir: Path, output_dir: Path) -> ir.Model:
    """Export a model with Optimum and open the result; each weight stays in its safetensors file until it is read.

    Constants are not folded: folding would rename weights and store a tied embedding twice.

    Raises:
        ExportError: Optimum failed.
        OSError: the output directory cannot be written or its disk is full.
        SourceError: the graph has a weight that the files lack.
    """
    with quiet(), _without_weights():
        from optimum.exporters.onnx import main_export

        try:
            main_export(
                str(model_dir),
                output_dir,
                task="text-generation-with-past",
                dtype="fp32",
                device="cpu",
                framework="pt",
                library_name="transformers",
                local_files_only=True,
                trust_remote_code=False,
                no_post_process=True,
                do_validation=False,
                do_constant_folding=False,
            )
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the model
            raise ExportError(f"Optimum could not export the model: {first_line(error)}") from error
    gc.collect()  # the traced model is a web of cycles, as large as the model
    model = ir.load(output_dir / TRACED_GRAPH)
    _attach_weights(model.graph, model_dir)
    return model


@contextmanager
def _without_weights() -> Iterator[None]:
    """Let Optimum write the graph alone: its parameters become inputs named after them.

    Otherwise the weights would pass through one protobuf, which takes three times their size in memory and fails above
    2 GB. Optimum has no option for it, but looks ``torch.onnx.export`` up when it calls it.
    """
    import torch.onnx

    export = torch.onnx.export
    torch.onnx.export = partial(export, export_params=False)
    try:
        yield
    finally:
        torch.onnx.export = export


def _attach_weights(graph: ir.Graph, model_dir: Path) -> None:
    checkpoint = open_checkpoint(model_dir)
    for value in list(graph.inputs):
        assert value.name is not None
        tensor = lazy_weight(value.name, checkpoint)
        if tensor is not None:
            graph.inputs.remove(value)
            value.const_value = tensor
            graph.register_initializer(value)
        elif value.name.endswith((".weight", ".bias")):
            raise SourceError(f"{model_dir}: the weights lack {value.name}")
