"""The model to export: found or downloaded, and checked for all that can be known before the long work starts."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotlight.artifact import Shapes, SpecialTokens
from pilotlight.artifact import Source as SourceEntry
from pilotlight_export.errors import SourceError, UnsupportedModel, first_line
from pilotlight_export.families import FAMILIES, Family
from pilotlight_export.safetensors_headers import count_parameters

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL_FILES = ["*.json", "*.jinja", "LICENSE*", "LICENCE*", "README.md", "tokenizer.model"]
HEAD_SIZE_STEP = 16


@dataclass(frozen=True)
class Source:
    """A complete model directory of a supported family."""

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


def read_shapes(config: dict[str, Any]) -> Shapes:
    """Read the dimensions out of a decoder's config.

    Raises:
        SourceError: a dimension is missing.
    """
    try:
        num_heads = int(config["num_attention_heads"])
        hidden_size = int(config["hidden_size"])
        return Shapes(
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_size=int(config.get("head_dim") or hidden_size // num_heads),
            hidden_size=hidden_size,
            vocab_size=int(config["vocab_size"]),
            max_context_tokens=int(config["max_position_embeddings"]),
        )
    except KeyError as error:
        raise SourceError(f"config.json has no {error.args[0]}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise SourceError(f"config.json has a malformed dimension ({error})") from error


def check_block_size(config: dict[str, Any], block_size: int) -> None:
    """Check that the rows of every weight divide into blocks.

    Raises:
        UnsupportedModel: a dimension is not a multiple of the block size.
    """
    shapes = read_shapes(config)
    widths = {
        "hidden_size": shapes.hidden_size,
        "intermediate_size": int(config["intermediate_size"]),
        "num_attention_heads * head_dim": shapes.num_heads * shapes.head_size,
    }
    for name, width in widths.items():
        if width % block_size:
            raise UnsupportedModel(
                f"{name} {width} is not a multiple of the quantization block of {block_size}; only fp32 is possible"
            )


def read_special_tokens(config: dict[str, Any], generation: dict[str, Any]) -> SpecialTokens:
    """Join the special tokens of both configs; any end-of-sequence token that either names ends an answer."""
    eos_ids = _ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id"))
    bos_ids = _ids(generation.get("bos_token_id")) + _ids(config.get("bos_token_id"))
    pad_ids = _ids(generation.get("pad_token_id")) + _ids(config.get("pad_token_id"))
    return SpecialTokens(
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=list(dict.fromkeys(eos_ids)),
        pad_id=pad_ids[0] if pad_ids else None,
    )


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or an empty one where the file does not exist.

    Raises:
        SourceError: the file is not a JSON object.
    """
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(f"{path}: is missing") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: is not a JSON object")
    return content


def _open_directory(directory: Path, revision: str | None) -> Source:
    if revision is not None:
        raise SourceError(f"{directory}: a directory has no revisions; leave out --revision {revision}")
    _check_config(directory)
    return _checked(directory, directory.resolve().name, None)


def _open_hub(model: str, revision: str | None) -> Source:
    """Fetch the small files first, so that an unsupported model is refused before its weights are downloaded."""
    directory = _download(model, revision, SMALL_FILES)
    _check_config(directory)
    commit = directory.name
    return _checked(_download(model, commit, [*SMALL_FILES, "*.safetensors"]), model, commit)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise SourceError(f"{model}: no such directory, and no such model on the hub") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"{model}: no such directory, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(f"{model}: the hub refused it ({first_line(error)})") from error


def _checked(directory: Path, model: str, revision: str | None) -> Source:
    """Make a Source of a directory whose config has been checked."""
    config = read_json(directory / "config.json")
    _check_weights_exist(directory)
    _check_tokenizer(directory, read_shapes(config))
    entry = SourceEntry(model=model, revision=revision, license=_license_name(directory))
    num_parameters = count_parameters(directory, is_tied=bool(config.get("tie_word_embeddings", False)))
    return Source(directory, entry, config, FAMILIES[config["architectures"][0]], num_parameters)


def _check_config(directory: Path) -> None:
    config = read_json(directory / "config.json")
    _check_architecture(config)
    _check_weights_format(config)
    _check_rotary(config)
    _check_dimensions(read_shapes(config))


def _check_architecture(config: dict[str, Any]) -> None:
    if "auto_map" in config:
        raise UnsupportedModel("the model brings its own code (auto_map in config.json), which Pilotlight never runs")
    found = config.get("architectures") or ["no architecture"]
    if found[0] not in FAMILIES:
        raise UnsupportedModel(f"{found[0]} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def _check_weights_format(config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModel(f"the model is quantized already ({method}); export its unquantized original")


def _check_rotary(config: dict[str, Any]) -> None:
    if "rope_parameters" in config and "rope_theta" not in config:
        raise UnsupportedModel(
            "config.json has the rope_parameters of transformers 5, which the exporter's transformers 4 would ignore; "
            "write them as rope_theta and rope_scaling"
        )
    supported = FAMILIES[config["architectures"][0]].rope_types
    scaling = config.get("rope_scaling") or {}
    found = scaling.get("rope_type", scaling.get("type", "default"))
    if found not in supported:
        raise UnsupportedModel(f"rope scaling {found!r} is not supported; supported: {', '.join(sorted(supported))}")


def _check_dimensions(shapes: Shapes) -> None:
    if shapes.head_size % HEAD_SIZE_STEP:
        raise UnsupportedModel(
            f"head size {shapes.head_size} is not supported: it must be a multiple of {HEAD_SIZE_STEP}"
        )


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


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
