"""The weights as they lie in safetensors files: listed by their headers, read one at a time, as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pilotlight_export.errors import SourceError
from pilotlight_export.safetensors_headers import LENGTH_BYTES, read_header, weight_files

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StoredTensor:
    """Where one weight lies in which file."""

    path: Path
    offset_bytes: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Floats:
        """Read the weight into memory of its own: a mapped file would count, and stay, as the process's memory."""
        stored, widen = DTYPES[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.offset_bytes)
            raw = np.fromfile(file, stored, int(np.prod(self.shape)))
        return widen(raw).reshape(self.shape)


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """List the weights of all of a directory's safetensors files by name; nothing is read but headers.

    Raises:
        SourceError: a file is missing, damaged, or holds numbers of another kind.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        start = LENGTH_BYTES + _header_bytes(path)
        for name, entry in read_header(path).items():
            if entry["dtype"] not in DTYPES:
                raise SourceError(f"{path}: stores {name} as {entry['dtype']}; supported: {', '.join(DTYPES)}")
            begin = start + entry["data_offsets"][0]
            found[name] = StoredTensor(path, begin, entry["dtype"], tuple(entry["shape"]))
    return found


def lazy_weight(name: str, checkpoint: Mapping[str, StoredTensor]) -> ir.LazyTensor | None:
    """Return a weight that is read from its file each time that it is needed, or None where there is no such weight."""
    stored = checkpoint.get(name)
    if stored is None:
        return None

    def read() -> ir.TensorProtocol:
        return ir.tensor(stored.read(), name=name)

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(stored.shape), name=name)


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(LENGTH_BYTES), "little")


def _same(raw: npt.NDArray[Any]) -> Floats:
    return raw


def _cast(raw: npt.NDArray[Any]) -> Floats:
    return raw.astype(np.float32)


def _from_bfloat16(raw: npt.NDArray[Any]) -> Floats:
    """Widen the upper halves of float32 numbers, which is what bfloat16 numbers are."""
    wide = raw.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


DTYPES: dict[str, tuple[str, Callable[[npt.NDArray[Any]], Floats]]] = {
    "F32": ("<f4", _same),
    "F16": ("<f2", _cast),
    "BF16": ("<u2", _from_bfloat16),
}
"""What a header calls its numbers, how they lie in the file, and how they become float32."""
