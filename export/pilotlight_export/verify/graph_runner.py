"""Runs an artifact's graph on a KV cache of its own, for verification only; the runtime has a real engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pilotlight.artifact import Shapes

Logits = npt.NDArray[np.float32]
TokenIds = Sequence[int]


class GraphRunner:
    """A session, a KV cache of ``num_rows`` rows, and how many tokens each row holds."""

    def __init__(self, graph_path: Path, shapes: Shapes, num_rows: int, cache_tokens: int) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        # PyTorch runs between two runs of this session: threads that spin would hold its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = onnxruntime.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
        self._num_layers = shapes.num_layers
        self._cache_tokens = cache_tokens
        row_shape = (shapes.num_kv_heads, cache_tokens, shapes.head_size)
        self._cache = np.zeros((shapes.num_layers, 2, num_rows, *row_shape), self._cache_dtype())
        self.lengths = np.zeros(num_rows, np.int64)

    def prefill(self, rows: Sequence[TokenIds], positions: Sequence[Sequence[int]]) -> Logits:
        """Read whole prompts into empty rows and return the logits at each row's positions, row after row.

        Shapes:
            output [N, V], N requested positions of all rows
        """
        num_tokens = max(len(row) for row in rows)
        padded = np.zeros((len(rows), num_tokens), np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        self.lengths[:] = [len(row) for row in rows]
        flat = [index * num_tokens + position for index, row in enumerate(positions) for position in row]
        return self._run(padded, num_tokens, flat)

    def extend(self, tokens: TokenIds) -> Logits:
        """Read more tokens into the only row and return the logits at all of them.

        Shapes:
            output [T, V]
        """
        self.lengths += len(tokens)
        return self._run(np.array([tokens], np.int64), self._cache_tokens, range(len(tokens)))

    def decode(self, tokens: npt.NDArray[np.int64]) -> Logits:
        """Read one token into each row.

        Shapes:
            tokens [B], output [B, V]
        """
        self.lengths += 1
        return self._run(tokens[:, None], self._cache_tokens, range(len(tokens)))

    def _run(self, token_ids: npt.NDArray[np.int64], total: int, positions: Sequence[int]) -> Logits:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids))
        binding.bind_cpu_input("seqlens_k", (self.lengths - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logits_indices", np.array(positions, np.int64))
        binding.bind_output("logits", "cpu")
        for layer in range(self._num_layers):
            for index, part in enumerate(("key", "value")):
                cache = self._cache[layer, index]
                place = ("cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
                binding.bind_input(f"past_key_values.{layer}.{part}", *place)
                binding.bind_output(f"present.{layer}.{part}", *place)
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.copy_outputs_to_cpu()[0]
        return logits

    def _cache_dtype(self) -> npt.DTypeLike:
        declared = next(value.type for value in self._session.get_inputs() if value.name.startswith("past_key_values"))
        return np.float16 if declared == "tensor(float16)" else np.float32
