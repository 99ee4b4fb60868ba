"""The external data file: page-aligned, every distinct content stored once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from pilotlight.artifact import WEIGHTS

PAGE_BYTES = 4096
MAX_INLINE_BYTES = 1024


class WeightFile:
    """Collects tensors into ``model.onnx.data`` one at a time, in the order they are added."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / WEIGHTS).open("wb")
        self._directory = directory
        self._offsets: dict[bytes, int] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.TensorProtocol:
        """Store a tensor and return a reference to it; what is too small to be worth a page stays in the graph."""
        array = np.ascontiguousarray(array)
        if array.nbytes < MAX_INLINE_BYTES:
            return ir.Tensor(array, name=name)
        return ir.ExternalTensor(
            WEIGHTS,
            self._store(array.data.cast("B")),
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._directory,
        )

    def _store(self, content: memoryview) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self._offsets:
            offset = -(-self._file.tell() // PAGE_BYTES) * PAGE_BYTES
            self._file.seek(offset)
            self._file.write(content)
            self._offsets[digest] = offset
        return self._offsets[digest]
