"""What the headers of safetensors files tell without reading a weight: is everything there, and how much of it.

Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pilotlight_export.errors import SourceError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000


def count_parameters(directory: Path, *, is_tied: bool) -> int:
    """Add up the parameters in all of a directory's safetensors files; a tied head counts once.

    Raises:
        SourceError: a file is missing, truncated or damaged.
    """
    tensors: dict[str, Any] = {}
    for path in weight_files(directory):
        tensors.update(read_header(path))
    if is_tied:
        tensors.pop("lm_head.weight", None)
    return sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def weight_files(directory: Path) -> list[Path]:
    """List the files that hold the weights: the single one or those of the index, as transformers chooses.

    Raises:
        SourceError: the index cannot be read or names a file that is not there.
    """
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if not (directory / INDEX).exists():
        return []
    paths = listed_files(directory)
    for path in paths:
        if not path.exists():
            raise SourceError(f"{path}: is missing, but {INDEX} names it")
    return paths


def listed_files(directory: Path) -> list[Path]:
    """List the files that the index names, whether they exist or not.

    Raises:
        SourceError: the index cannot be read, or names a file outside of the directory.
    """
    index = directory / INDEX
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index}: cannot be read ({error})") from error
    if outside:
        raise SourceError(f"{index}: names {outside[0]!r}, which is not a plain file name")
    return [directory / name for name in names]


def read_header(path: Path) -> dict[str, Any]:
    """Read one file's header and check that the file is as long as the header says.

    Raises:
        SourceError: the file is truncated or damaged.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, size_bytes - LENGTH_BYTES):
            raise SourceError(f"{path}: is not a complete safetensors file")
        header = _decode(path, file.read(header_bytes))
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    expected_bytes = LENGTH_BYTES + header_bytes + end
    if size_bytes != expected_bytes:
        raise SourceError(f"{path}: has {size_bytes:,} bytes instead of {expected_bytes:,}, so it is not complete")
    return header


def _decode(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
        _ = [(tensor["shape"], tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SourceError(f"{path}: is not a safetensors file ({error!r})") from error
    return dict(header)
