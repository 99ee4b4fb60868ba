"""Weights in PyTorch's pickle files, for users who insist: read as tensors and nothing else, stored as safetensors.

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotlight_export.errors import SourceError, first_line
from pilotlight_export.safetensors_headers import INDEX

PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_PATTERN = "pytorch_model*.bin"


def pickle_files(directory: Path) -> list[Path]:
    """List a directory's files of pickled weights, as transformers names them."""
    return sorted(directory.glob(PICKLE_PATTERN))


def convert_pickles(directory: Path, scratch: Path) -> Path:
    """Return a copy of a model directory, in ``scratch``, whose weights are safetensors; its other files are links.

    Files are converted one by one, so that memory holds no more than one of them.

    Raises:
        SourceError: a file is missing or damaged, or asks for more than tensors.
    """
    converted = scratch / "unpickled"
    converted.mkdir()
    for path in directory.iterdir():
        if path.is_file() and path.suffix != ".bin" and path.name != PICKLE_INDEX:
            (converted / path.name).symlink_to(path.resolve())
    weight_map: dict[str, str] = {}
    for path in _listed_files(directory):
        name = f"{path.stem}.safetensors"
        weight_map |= dict.fromkeys(_convert(path, converted / name), name)
    (converted / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return converted


def _listed_files(directory: Path) -> list[Path]:
    index = directory / PICKLE_INDEX
    if not index.exists():
        return pickle_files(directory)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index}: cannot be read ({error})") from error
    return [directory / Path(name).name for name in names]


def _convert(path: Path, target: Path) -> list[str]:
    """Convert one file and return the names of its tensors; one that is stored twice under two names is cloned."""
    import torch
    from safetensors.torch import save_file

    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in loaded.items()}
    except FileNotFoundError as error:
        raise SourceError(f"{path}: is missing, but {PICKLE_INDEX} names it") from error
    except Exception as error:
        raise SourceError(f"{path}: holds more than tensors, or is damaged ({first_line(error)})") from error
    save_file(tensors, target, metadata={"format": "pt"})
    return list(tensors)
