"""The model itself: ONNX Runtime on an artifact's graph, bound to a KV cache. The only importer of onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pilotlight.artifact import GRAPH, Artifact
from pilotlight.engine.slots import KvCache
from pilotlight.errors import ArtifactError

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Session(Protocol):
    """What the engine asks of a model. Slots are dense: a decode step runs on slots 0 to B - 1."""

    num_slots: int
    max_context_tokens: int
    kv_bytes_per_token: int

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        """Run a chunk [T] of one slot's prompt behind its ``past_tokens``; return the last position's logits [1, V]."""

    def decode(self, token_ids: Ids, past_tokens: Ids) -> Logits:
        """Run one token [B] for each of the first B slots, each behind its own past [B]; return logits [B, V]."""

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a slot's cache over another slot's."""


class OnnxSession:
    """An ONNX Runtime session whose past and present share the buffers of one ``KvCache``.

    The logits that a run returns are valid until the next run of the same kind; the caller may change them in place.
    """

    def __init__(self, artifact: Artifact, num_slots: int, max_context_tokens: int, num_threads: int) -> None:
        """Load the graph and allocate the cache.

        Raises:
            ArtifactError: ONNX Runtime cannot load the graph.
        """
        manifest = artifact.manifest
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self._vocab_size = manifest.shapes.vocab_size
        self._cache = KvCache(manifest.shapes, manifest.kv.dtype, num_slots, max_context_tokens)
        self.kv_bytes_per_token = self._cache.bytes_per_token
        self._session = _load(artifact, num_threads)
        self._decode_runs: dict[int, _DecodeRun] = {}
        self._prefill_bindings: dict[int, ort.IOBinding] = {}
        self._prefill_logits = np.empty((1, self._vocab_size), np.float32)

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind(slot, slot + 1, self._prefill_logits)
        num_tokens = len(token_ids)
        # The kernel takes a run for the first one of its sequence when the total length is the run's own length.
        total = num_tokens if past_tokens == 0 else self.max_context_tokens
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids.reshape(1, num_tokens)))
        binding.bind_cpu_input("seqlens_k", np.array([past_tokens + num_tokens - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logits_indices", np.array([num_tokens - 1], np.int64))
        self._session.run_with_iobinding(binding)
        return self._prefill_logits

    def decode(self, token_ids: Ids, past_tokens: Ids) -> Logits:
        num_rows = len(token_ids)
        run = self._decode_runs.get(num_rows)
        if run is None:
            run = self._decode_runs[num_rows] = self._make_decode_run(num_rows)
        run.token_ids[:, 0] = token_ids
        run.seqlens_k[:] = past_tokens  # the length after this run, minus one
        self._session.run_with_iobinding(run.binding)
        return run.logits

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self._cache.move(source, target, num_tokens)

    def _make_decode_run(self, num_rows: int) -> _DecodeRun:
        logits = np.empty((num_rows, self._vocab_size), np.float32)
        run = _DecodeRun(
            token_ids=np.zeros((num_rows, 1), np.int64),
            seqlens_k=np.zeros(num_rows, np.int32),
            logits=logits,
            binding=self._bind(0, num_rows, logits),
        )
        # bind_cpu_input copies, so the arrays which change between steps are bound by their address
        for name, array in (("input_ids", run.token_ids), ("seqlens_k", run.seqlens_k)):
            run.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        run.binding.bind_cpu_input("total_sequence_length", np.array(self.max_context_tokens, np.int32))
        run.binding.bind_cpu_input("logits_indices", np.arange(num_rows, dtype=np.int64))
        return run

    def _bind(self, first_slot: int, end_slot: int, logits: Logits) -> ort.IOBinding:
        binding = self._session.io_binding()
        for kind, buffers in (("key", self._cache.keys), ("value", self._cache.values)):
            for layer, buffer in enumerate(buffers):
                value = ort.OrtValue.ortvalue_from_numpy(buffer[first_slot:end_slot])
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", value)
                binding.bind_ortvalue_output(f"present.{layer}.{kind}", value)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        return binding


@dataclass(frozen=True, slots=True)
class _DecodeRun:
    """The arrays that one decode batch size is bound to."""

    token_ids: Ids
    seqlens_k: NDArray[np.int32]
    logits: Logits
    binding: ort.IOBinding


def _load(artifact: Artifact, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(artifact.graph_path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(artifact.path / GRAPH, f"ONNX Runtime cannot load it ({cause})") from error
