"""Runs an artifact's graphs on a KV cache of their own, for verification only; the runtime has a real engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pilotlight.artifact import BATCH_GRAPH, GRAPH, KV_SCALES, KV_STEPS, PREFILL_GRAPH, Shapes

Logits = npt.NDArray[np.float32]
TokenIds = Sequence[int]
QUIET_THREADS = {"session.intra_op.allow_spinning": "0"}
"""PyTorch runs between two runs of a session: threads that spin would hold its cores."""


MIN_BATCH_ROWS = 4
"""A runtime takes steps of so many rows and more on a hybrid's graph for batches."""


class Graphs:
    """The sessions of one artifact: for steps, for prompts and for steps of many rows, in most artifacts the same.

    ``kv_scales`` are there where the cache of the graph for prompts is float32 and that of the others int8.
    """

    def __init__(self, directory: Path, shapes: Shapes, config: Mapping[str, str] = QUIET_THREADS) -> None:
        self.directory = directory
        self.shapes = shapes
        self.decode = _session(directory / GRAPH, config)
        prefill, batch, scales = (directory / name for name in (PREFILL_GRAPH, BATCH_GRAPH, KV_SCALES))
        self.prefill = _session(prefill, config) if prefill.exists() else self.decode
        self.batch = _session(batch, config) if batch.exists() else self.prefill
        self.kv_scales = np.load(scales, allow_pickle=False) if scales.exists() and prefill.exists() else None

    def for_rows(self, num_rows: int) -> Any:
        """Return the session that takes a step of so many rows."""
        return self.batch if num_rows >= MIN_BATCH_ROWS else self.decode


class GraphRunner:
    """A KV cache of ``num_rows`` rows for an artifact's graphs, and how many tokens each row holds."""

    def __init__(self, graphs: Graphs, num_rows: int, cache_tokens: int) -> None:
        shapes = graphs.shapes
        self._graphs = graphs
        self._cache_tokens = cache_tokens
        row_shape = (shapes.num_kv_heads, cache_tokens, shapes.head_size)
        axes = (shapes.num_layers, 2, num_rows, *row_shape)
        self.cache = np.zeros(axes, _cache_dtype(graphs.prefill))
        self._steps_cache = np.zeros(axes, np.int8) if graphs.kv_scales is not None else self.cache
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
        return self._read(padded, num_tokens, flat)

    def extend(self, tokens: TokenIds) -> Logits:
        """Read more tokens into the only row and return the logits at all of them.

        Shapes:
            output [T, V]
        """
        self.lengths += len(tokens)
        return self._read(np.array([tokens], np.int64), self._cache_tokens, range(len(tokens)))

    def decode(self, tokens: npt.NDArray[np.int64]) -> Logits:
        """Read one token into each row.

        Shapes:
            tokens [B], output [B, V]
        """
        self.lengths += 1
        session = self._graphs.for_rows(len(tokens))
        return self._run(session, self._steps_cache, tokens[:, None], self._cache_tokens, range(len(tokens)))

    def _read(self, token_ids: npt.NDArray[np.int64], total: int, positions: Sequence[int]) -> Logits:
        logits = self._run(self._graphs.prefill, self.cache, token_ids, total, positions)
        if self._graphs.kv_scales is not None:
            steps = np.rint(self.cache / self._graphs.kv_scales[:, :, None, :, None])
            self._steps_cache[:] = steps.clip(-KV_STEPS, KV_STEPS)
        return logits

    def _run(
        self,
        session: Any,
        layers: npt.NDArray[Any],
        token_ids: npt.NDArray[np.int64],
        total: int,
        positions: Sequence[int],
    ) -> Logits:
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids))
        binding.bind_cpu_input("seqlens_k", (self.lengths - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logits_indices", np.array(positions, np.int64))
        binding.bind_output("logits", "cpu")
        for layer in range(len(layers)):
            for index, part in enumerate(("key", "value")):
                cache = layers[layer, index]
                place = ("cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
                binding.bind_input(f"past_key_values.{layer}.{part}", *place)
                binding.bind_output(f"present.{layer}.{part}", *place)
        session.run_with_iobinding(binding)
        logits: Logits = binding.copy_outputs_to_cpu()[0]
        return logits


def _cache_dtype(session: Any) -> npt.DTypeLike:
    """Return the type of a graph's keys and values."""
    declared = next(value.type for value in session.get_inputs() if value.name.startswith("past_key_values"))
    return {"tensor(float16)": np.float16, "tensor(int8)": np.int8}.get(declared, np.float32)


def _session(graph_path: Path, config: Mapping[str, str]) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
