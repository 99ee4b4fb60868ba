"""A model's config.json: the dimensions and special tokens in it, and whether such a model can be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotlight.artifact import Shapes, SpecialTokens
from pilotlight_export.errors import SourceError, UnsupportedModel
from pilotlight_export.families import FAMILIES, Family
from pilotlight_export.rope import check_rope, usable_context_tokens, with_older_rope_keys

HEAD_SIZE_STEP = 16
"""The attention kernel takes heads in such steps only."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def check_config(stored: dict[str, Any]) -> dict[str, Any]:
    """Check all that a config tells about whether its model can be exported.

    Returns the config as transformers 4 is to read it, completed by what its family assumes.

    Raises:
        SourceError: a dimension is missing or malformed.
        UnsupportedModel: the model cannot be exported.
    """
    _check_architecture(stored)
    _check_weights_format(stored)
    family = family_of(stored)
    _check_code(stored, family)
    config = {**family.assumed, **with_older_rope_keys(stored)}
    config.pop("auto_map", None)
    check_rope(config, family)
    _check_attention(config)
    _check_dimensions(read_shapes(config))
    return config


def family_of(config: dict[str, Any]) -> Family:
    """Return the family of a config that has been checked."""
    return FAMILIES[config["architectures"][0]]


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
            max_context_tokens=usable_context_tokens(config),
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
                f"{name} {width} is not a multiple of the quantization block of {block_size}; "
                "a recipe with smaller blocks, if there is one, or fp32 is possible"
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


def _check_architecture(config: dict[str, Any]) -> None:
    found = config.get("architectures") or ["no architecture"]
    if found[0] not in FAMILIES:
        raise UnsupportedModel(f"{found[0]} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def _check_code(config: dict[str, Any], family: Family) -> None:
    classes = {name for kind, name in (config.get("auto_map") or {}).items() if kind != "AutoTokenizer"}
    if not classes <= family.adopted_code:
        raise UnsupportedModel("the model brings its own code (auto_map in config.json), which Pilotlight never runs")


def _check_weights_format(config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModel(f"the model is quantized already ({method}); export its unquantized original")


def _check_attention(config: dict[str, Any]) -> None:
    unknown = set(config.get("layer_types") or []) - LAYER_TYPES
    if unknown:
        supported = ", ".join(sorted(LAYER_TYPES))
        raise UnsupportedModel(f"layers of type {sorted(unknown)[0]!r} are not supported; supported: {supported}")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("attention to later tokens (use_bidirectional_attention) is not supported")


def _check_dimensions(shapes: Shapes) -> None:
    if shapes.head_size % HEAD_SIZE_STEP:
        raise UnsupportedModel(
            f"head size {shapes.head_size} is not supported: it must be a multiple of {HEAD_SIZE_STEP}"
        )


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
