"""The model to export: found or downloaded, and checked for all that can be known before the long work starts."""

from __future__ import annotations

import atexit
import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotlight.artifact import Shapes, SpecialTokens
from pilotlight.artifact import Source as SourceEntry
from pilotlight.scratch import scratch
from pilotlight_export.config import (
    check_config,
    family_of,
    read_json,
    read_optional_json,
    read_shapes,
    read_special_tokens,
)
from pilotlight_export.errors import SourceError, first_line
from pilotlight_export.families import Family
from pilotlight_export.hub import fetch_model
from pilotlight_export.pickles import convert_pickles, pickle_files
from pilotlight_export.safetensors_headers import INDEX, SINGLE, count_parameters, weight_files

CONFIG = "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A complete model of a supported family.

    ``directory`` is what transformers is to load: the model's own directory, or links to its files beside a config.json
    that says in transformers 4's words what the model's own one says or leaves out.
    """

    directory: Path
    entry: SourceEntry
    config: dict[str, Any]
    family: Family
    num_parameters: int

    @property
    def shapes(self) -> Shapes:
        return read_shapes(self.config)

    @property
    def special_tokens(self) -> SpecialTokens:
        generation = read_optional_json(self.directory / "generation_config.json")
        return read_special_tokens(self.config, generation)


def open_source(model: str, revision: str | None, unpickle_into: Path | None = None) -> Source:
    """Find a model on disk or fetch it from the hub, and check that it can be exported.

    Pickled weights are refused, or converted where a directory to ``unpickle_into`` is given.

    Raises:
        SourceError: the model is missing, incomplete or damaged, or the hub does not answer.
        UnsupportedModel: the model cannot be exported.
    """
    if Path(model).is_dir():
        return _open_directory(Path(model), revision, unpickle_into)
    if not HUB_ID.fullmatch(model):
        raise SourceError(f"{model}: no such directory, and not the id of a model on the hub")
    directory = fetch_model(model, revision, _read_config, allow_pickle=unpickle_into is not None)
    return _complete(directory, model, directory.name, unpickle_into)


def _open_directory(directory: Path, revision: str | None, unpickle_into: Path | None) -> Source:
    if revision is not None:
        raise SourceError(f"{directory}: a directory has no revisions; leave out --revision {revision}")
    return _complete(directory, directory.resolve().name, None, unpickle_into)


def _read_config(directory: Path) -> dict[str, Any]:
    return check_config(read_json(directory / CONFIG))


def _complete(directory: Path, model: str, revision: str | None, unpickle_into: Path | None) -> Source:
    """Make a Source of a directory that has all its files."""
    config = _read_config(directory)
    directory = _with_safetensors(directory, unpickle_into)
    _check_tokenizer(directory, read_shapes(config))
    entry = SourceEntry(model=model, revision=revision, license=_license_name(directory))
    num_parameters = count_parameters(directory, is_tied=bool(config.get("tie_word_embeddings", False)))
    return Source(_readable(directory, config), entry, config, family_of(config), num_parameters)


def _readable(directory: Path, config: dict[str, Any]) -> Path:
    """Return a directory with this config: the model's own, or links to its files until the process ends."""
    if config == read_json(directory / CONFIG):
        return directory
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    linked = until_the_end.enter_context(scratch("pilotlight-source-"))
    for path in directory.iterdir():
        (linked / path.name).symlink_to(path.resolve())
    (linked / CONFIG).unlink()
    (linked / CONFIG).write_text(json.dumps(config))
    return linked


def _with_safetensors(directory: Path, unpickle_into: Path | None) -> Path:
    """Return a directory with safetensors weights under the names that transformers looks for: otherwise it would take
    what else is there."""
    if weight_files(directory):
        return directory
    if unpickle_into is not None and pickle_files(directory):
        return convert_pickles(directory, unpickle_into)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise SourceError(
            f"{directory}: found {pickles[0]}, which may run code when it is loaded; only safetensors weights are "
            "supported, and --allow-pickle converts pytorch_model.bin to them"
        )
    raise SourceError(f"{directory}: found no weights; only safetensors weights are supported, as {SINGLE} or {INDEX}")


def _check_tokenizer(directory: Path, shapes: Shapes) -> None:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise SourceError(f"{path}: is missing; a tokenizer in the format of the tokenizers library is needed")
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:
        raise SourceError(f"{path}: cannot be read ({first_line(error)})") from error
    largest = max(vocabulary.values(), default=0)
    if largest >= shapes.vocab_size:
        raise SourceError(f"{path}: has token id {largest}, but the model knows only {shapes.vocab_size} tokens")


def _license_name(directory: Path) -> str | None:
    """Read the licence out of the front matter of the model card."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front_matter = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front_matter[1], re.MULTILINE) if front_matter else None
    return found[1] if found else None
