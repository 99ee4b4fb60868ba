"""The KV cache: one preallocated buffer a layer for keys and one for values, cut into slots."""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import NDArray

from pilotlight.artifact import KV_STEPS, Shapes

KV_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}

Buffer = NDArray[np.floating | np.int8]
Scales = NDArray[np.float32]


class KvCache:
    """``num_slots`` rows of ``max_context_tokens`` each. Memory becomes resident only where a slot was written.

    Shapes: ``keys[i]`` and ``values[i]`` are [slots, kv heads, context, head size].
    """

    def __init__(self, shapes: Shapes, dtype: str, num_slots: int, max_context_tokens: int) -> None:
        axes = (num_slots, shapes.num_kv_heads, max_context_tokens, shapes.head_size)
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self.keys = [_allocate(axes, dtype) for _ in range(shapes.num_layers)]
        self.values = [_allocate(axes, dtype) for _ in range(shapes.num_layers)]

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

    def quantize(self, slot: int, staged: KvCache, scales: Scales, first: int, end: int) -> None:
        """Put the tokens from ``first`` to ``end`` of another cache's only slot into a slot of this one, in 8 bits.

        Shapes:
            scales [layers, 2, kv heads, D]
        """
        for layer, of_layer in enumerate(scales):
            for of_part, source, target in zip(
                of_layer,
                (staged.keys[layer], staged.values[layer]),
                (self.keys[layer], self.values[layer]),
                strict=True,
            ):
                steps = source[0, :, first:end] / of_part[:, None]
                np.rint(steps, out=steps)
                target[slot, :, first:end] = np.clip(steps, -KV_STEPS, KV_STEPS, out=steps)

    def dequantize(self, slot: int, staged: KvCache, scales: Scales, first: int, end: int) -> None:
        """Do the reverse of ``quantize``: put a slot's 8-bit tokens into the other cache's only slot."""
        for layer, (of_keys, of_values) in enumerate(scales):
            staged.keys[layer][0, :, first:end] = self.keys[layer][slot, :, first:end] * of_keys[:, None]
            staged.values[layer][0, :, first:end] = self.values[layer][slot, :, first:end] * of_values[:, None]

    def copy_out(self, slot: int, start: int, end: int) -> Buffer:
        """Return the tokens from ``start`` to ``end`` of a slot, [2 layers, kv heads, tokens, head size]."""
        return np.stack([buffer[slot, :, start:end] for buffer in (*self.keys, *self.values)])

    def copy_in(self, slot: int, start: int, held: Buffer) -> None:
        """Write back what ``copy_out`` has returned, from ``start`` on."""
        for buffer, part in zip((*self.keys, *self.values), held, strict=True):
            buffer[slot, :, start : start + part.shape[1]] = part


def _allocate(axes: tuple[int, ...], dtype: str) -> Buffer:
    """Return a zeroed buffer in small pages.

    NumPy asks for huge ones, and a few tokens in every slot would then make nearly all of it resident.
    """
    kind = np.dtype(KV_DTYPES[dtype])
    memory = mmap.mmap(-1, math.prod(axes) * kind.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind).reshape(axes)
