"""External data files: page-aligned, every distinct content stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

PAGE_BYTES = 4096
MAX_INLINE_BYTES = 1024


class WeightFile:
    """Collects tensors into a file one at a time, in the order they are added.

    What lies in ``earlier`` already, another graph's file in the same directory, is not stored again.
    """

    def __init__(self, path: Path, earlier: WeightFile | None = None) -> None:
        self._file = path.open("wb")
        self._path = path
        self._places: dict[bytes, tuple[str, int]] = {} if earlier is None else dict(earlier._places)

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.TensorProtocol:
        """Store a tensor and return a reference to it; what is too small to be worth a page stays in the graph."""
        array = np.asarray(array, order="C")
        if array.nbytes < MAX_INLINE_BYTES:
            return ir.Tensor(array, name=name)
        file_name, offset = self._store(array.data.cast("B"))
        return ir.ExternalTensor(
            file_name,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )

    def _store(self, content: memoryview) -> tuple[str, int]:
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            offset = -(-self._file.tell() // PAGE_BYTES) * PAGE_BYTES
            self._file.seek(offset)
            self._file.write(content)
            self._places[digest] = (self._path.name, offset)
        return self._places[digest]
