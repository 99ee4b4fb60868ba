"""The artifact's directory: filled in private, sealed by its manifest, then moved into place in one step."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    sha256_of,
)
from pilotlight_export.config import read_optional_json
from pilotlight_export.errors import TargetError
from pilotlight_export.recipes import Recipe
from pilotlight_export.source import Source

TOOLS = ("pilotlight", "torch", "optimum", "optimum-onnx", "transformers", "onnx", "onnx-ir", "onnxruntime")


def check_target(target: Path) -> None:
    """Refuse to replace anything but an artifact.

    Raises:
        TargetError: the target exists and is not an artifact.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: exists and is not a directory")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise TargetError(f"{target}: is a directory with other files in it, not an artifact; it will not be replaced")


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Make a temporary directory beside the target, on the same disk, and remove it however the export ends.

    Raises:
        TargetError: the target's parent cannot be written, or its disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as directory:
            yield Path(directory)
    except OSError as error:
        raise TargetError(f"{error.filename or target}: {error.strerror or error}") from error


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


def seal(
    source: Source, recipe: Recipe, verification: dict[str, str | int | float | bool], directory: Path
) -> Manifest:
    """Write the manifest over all files in the directory; nothing may change after this."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source.entry,
        family=source.family.name,
        precision=recipe.precision,
        recipe=recipe.summary(),
        num_parameters=source.num_parameters,
        shapes=source.shapes,
        special_tokens=source.special_tokens,
        kv=KvLayout(dtype=recipe.graph.dtype),
        verification=verification,
        files={path.name: FileEntry(sha256_of(path), path.stat().st_size) for path in sorted(directory.iterdir())},
        tools={name: importlib.metadata.version(name) for name in TOOLS},
    )
    (directory / MANIFEST).write_bytes(manifest.encode())
    return manifest


def move_into_place(directory: Path, target: Path, aside: Path) -> None:
    """Rename the finished directory to the target; an artifact that was there goes ``aside``, and back if that fails.

    Raises:
        TargetError: another program put something there in the meantime.
    """
    check_target(target)
    if target.exists():
        target.rename(aside)
    try:
        directory.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise


def _license_file(model_dir: Path) -> str | None:
    found = sorted(path.name for pattern in ("LICENSE*", "LICENCE*") for path in model_dir.glob(pattern))
    return found[0] if found else None
