"""The model to export: found or downloaded, and checked for all that can be known before the long work starts."""

from __future__ import annotations

import atexit
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotlight.artifact import Shapes, SpecialTokens
from pilotlight.artifact import Source as SourceEntry
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
from pilotlight_export.safetensors_headers import count_parameters

CONFIG = "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL_FILES = ["*.json", "*.jinja", "LICENSE*", "LICENCE*", "README.md", "tokenizer.model"]


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


def open_source(model: str, revision: str | None) -> Source:
    """Find a model on disk or fetch it from the hub, and check that it can be exported.

    Raises:
        SourceError: the model is missing, incomplete or damaged, or the hub does not answer.
        UnsupportedModel: the model cannot be exported.
    """
    if Path(model).is_dir():
        return _open_directory(Path(model), revision)
    if not HUB_ID.fullmatch(model):
        raise SourceError(f"{model}: no such directory, and not the id of a model on the hub")
    return _open_hub(model, revision)


def _open_directory(directory: Path, revision: str | None) -> Source:
    if revision is not None:
        raise SourceError(f"{directory}: a directory has no revisions; leave out --revision {revision}")
    config = check_config(read_json(directory / CONFIG))
    return _complete(directory, config, directory.resolve().name, None)


def _open_hub(model: str, revision: str | None) -> Source:
    """Fetch the small files first, so that an unsupported model is refused before its weights are downloaded."""
    directory = _download(model, revision, SMALL_FILES)
    config = check_config(read_json(directory / CONFIG))
    commit = directory.name
    return _complete(_download(model, commit, [*SMALL_FILES, "*.safetensors"]), config, model, commit)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SourceError(f"{model}: is gated; accept its licence on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{model}: no such directory, and no such model on the hub") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"{model}: no such directory, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(f"{model}: the hub refused it ({first_line(error)})") from error


def _complete(directory: Path, config: dict[str, Any], model: str, revision: str | None) -> Source:
    """Make a Source of a directory whose config has been checked."""
    _check_weights_exist(directory)
    _check_tokenizer(directory, read_shapes(config))
    entry = SourceEntry(model=model, revision=revision, license=_license_name(directory))
    num_parameters = count_parameters(directory, is_tied=bool(config.get("tie_word_embeddings", False)))
    return Source(_readable(directory, config), entry, config, family_of(config), num_parameters)


def _readable(directory: Path, config: dict[str, Any]) -> Path:
    """Return a directory with this config: the model's own, or links to its files until the process ends."""
    if config == read_json(directory / CONFIG):
        return directory
    linked = Path(tempfile.mkdtemp(prefix="pilotlight-"))
    atexit.register(shutil.rmtree, linked, ignore_errors=True)
    for path in directory.iterdir():
        (linked / path.name).symlink_to(path.resolve())
    (linked / CONFIG).unlink()
    (linked / CONFIG).write_text(json.dumps(config))
    return linked


def _check_weights_exist(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    found = f"{pickles[0]}, which may run code when it is loaded" if pickles else "no weights"
    raise SourceError(f"{directory}: found {found}; only safetensors weights are supported")


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
