"""What an artifact has beside its graph: texts, a report, and the manifest that seals it."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from pilotlight.artifact import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    GENERATION_CONFIG,
    LICENSE,
    MANIFEST,
    TOKENIZER,
    FileEntry,
    KvLayout,
    Manifest,
    Probe,
    sha256_of,
)
from pilotlight_export.config import read_optional_json
from pilotlight_export.recipes import Recipe
from pilotlight_export.report import REPORT, report
from pilotlight_export.source import Source
from pilotlight_export.verify.figures import Figures

TOOLS = ("pilotlight", "torch", "optimum", "optimum-onnx", "transformers", "onnx", "onnx-ir", "onnxruntime")


def copy_texts(source: Source, directory: Path) -> None:
    """Put the tokenizer, the chat template, the generation settings and the licence beside the graph."""
    shutil.copyfile(source.directory / "tokenizer.json", directory / TOKENIZER)
    template = read_chat_template(source.directory)
    if template is not None:
        (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    for name, found in ((GENERATION_CONFIG, GENERATION_CONFIG), (LICENSE, _license_file(source.directory))):
        if found is not None and (source.directory / found).is_file():
            shutil.copyfile(source.directory / found, directory / name)


def read_chat_template(model_dir: Path) -> str | None:
    """Return a model's chat template, from its own file or the tokenizer's config; of several, the default one."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = read_optional_json(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def seal(source: Source, recipe: Recipe, verification: Figures, probe: Probe, directory: Path) -> Manifest:
    """Write the report, and the manifest over all files in the directory; nothing may change after this."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source.entry,
        family=source.family.name,
        precision=recipe.precision,
        recipe=recipe.summary(),
        num_parameters=source.num_parameters,
        shapes=source.shapes,
        special_tokens=source.special_tokens,
        kv=KvLayout(dtype=recipe.kv_dtype),
        verification=verification,
        files={path.name: _entry(path) for path in sorted(directory.iterdir())},
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        probe=probe,
    )
    (directory / REPORT).write_text(report(manifest), encoding="utf-8")
    manifest.files[REPORT] = _entry(directory / REPORT)
    (directory / MANIFEST).write_bytes(manifest.encode())
    return manifest


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256_of(path), path.stat().st_size)


def _license_file(model_dir: Path) -> str | None:
    found = sorted(path.name for pattern in ("LICENSE*", "LICENCE*") for path in model_dir.glob(pattern))
    return found[0] if found else None
