"""The KV cache: one preallocated buffer a layer for keys and one for values, cut into slots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pilotlight.artifact import Shapes

KV_DTYPES = {"float32": np.float32, "float16": np.float16}


class KvCache:
    """``num_slots`` rows of ``max_context_tokens`` each. Memory becomes resident only where a slot was written.

    Shapes: ``keys[i]`` and ``values[i]`` are [slots, kv heads, context, head size].
    """

    def __init__(self, shapes: Shapes, dtype: str, num_slots: int, max_context_tokens: int) -> None:
        axes = (num_slots, shapes.num_kv_heads, max_context_tokens, shapes.head_size)
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self.keys: list[NDArray[np.floating]] = [np.zeros(axes, KV_DTYPES[dtype]) for _ in range(shapes.num_layers)]
        self.values: list[NDArray[np.floating]] = [np.zeros(axes, KV_DTYPES[dtype]) for _ in range(shapes.num_layers)]

    @property
    def reserved_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    @property
    def bytes_per_token(self) -> int:
        return self.reserved_bytes // (self.num_slots * self.max_context_tokens)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` of one slot over another slot."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :num_tokens] = buffer[source, :, :num_tokens]
