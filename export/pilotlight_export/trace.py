"""Optimum's ONNX export: the model as PyTorch traces it, in float32, with every weight under its own name."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from pilotlight_export.errors import ExportError, first_line
from pilotlight_export.quiet import quiet

TRACED_GRAPH = "model.onnx"


def trace(model_dir: Path, output_dir: Path) -> ir.Model:
    """Export a model with Optimum and open the result; large weights stay in their file until they are read.

    Constants are not folded: folding would rename weights and store a tied embedding twice.

    Raises:
        ExportError: Optimum failed.
    """
    with quiet():
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
                no_post_process=True,
                do_validation=False,
                do_constant_folding=False,
            )
        except Exception as error:
            raise ExportError(f"Optimum could not export the model: {first_line(error)}") from error
    return ir.load(output_dir / TRACED_GRAPH)
