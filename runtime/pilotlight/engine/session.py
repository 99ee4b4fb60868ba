"""The model itself: ONNX Runtime on an artifact's graph, bound to a KV cache. The only importer of onnxruntime."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pilotlight.artifact import BATCH_GRAPH, GRAPH, KV_SCALES, PREFILL_GRAPH, WEIGHTS, Artifact, Manifest, Shapes
from pilotlight.engine.device_logits import DeviceLogits
from pilotlight.engine.graph_cache import GraphCache
from pilotlight.engine.heap import large_blocks_apart, return_freed_memory
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.prefix_cache import Held
from pilotlight.engine.slots import KV_DTYPES, KvCache, Scales
from pilotlight.engine.weight_alignment import ALIGNMENT_BYTES, align_weights
from pilotlight.errors import ArtifactError

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

# GroupQueryAttention reads this when a session is made. Its other way of attending, in tiles, was slower in every shape
# that we measured on CPUs: docs/performance.md.
os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")

KV_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int8)": "int8"}
ALL_GRAPHS = (GRAPH, PREFILL_GRAPH, BATCH_GRAPH)

KEPT_BY = f"onnxruntime {ort.__version__}, weights at multiples of {ALIGNMENT_BYTES}"


class Session(Protocol):
    """What the engine asks of a model. Slots are dense: a decode step runs on slots 0 to B - 1."""

    num_slots: int
    max_context_tokens: int
    kv_bytes_per_token: int
    has_batch_graph: bool
    run_s: float
    """How long the last prefill or decode was inside the graph."""

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits | DeviceLogits:
        """Run a chunk [T] of one slot's prompt behind its ``past_tokens``; return the last position's logits [1, V]."""

    def decode(self, token_ids: Ids, past_tokens: Ids, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits | DeviceLogits:
        """Run one token [B] for each of the first B slots, each behind its own past [B]; return logits [B, V].

        A session without a batch graph runs everything on its main one.
        """

    def verify(
        self, slot: int, token_ids: Ids, past_tokens: int, graph: DecodeGraph = DecodeGraph.MAIN
    ) -> Logits | DeviceLogits:
        """Run an answer's next tokens [T] of one slot behind its ``past_tokens``; return the logits [T, V] of each."""

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a slot's cache over another slot's."""

    def save_prefix(self, slot: int, start: int, end: int) -> Held | None:
        """Return what a prefill behind ``end`` reads of these tokens of the prompt that a slot was prefilled with last,
        or None where the prompt was read in another way than usual.

        It is asked for between this prompt's chunks or right after the last one, before any other prompt's.
        """

    def load_prefix(self, slot: int, start: int, held: Any) -> None:
        """Put what ``save_prefix`` has returned back into a slot, as if it had just been prefilled there."""


class OnnxSession:
    """An artifact's graphs on one KV cache: all read and write it, so a sequence can go from one to another between any
    two steps. Where the cache is int8 and the graph for prompts is not, that one has a float32 cache of one slot, from
    which each chunk is quantized into the prompt's own slot. A prompt is then read from its first to its last chunk
    with no other prompt between.

    The logits that a run returns are valid until the next run of the same kind; the caller may change them in place.
    """

    def __init__(
        self,
        artifact: Artifact,
        num_slots: int,
        max_context_tokens: int,
        num_threads: int,
        cache_dir: Path | None = None,
        *,
        graphs: Iterable[str] = ALL_GRAPHS,
        prepacks: bool = True,
        beside: OnnxSession | None = None,
        profile_prefix: str | None = None,
    ) -> None:
        """Load the graphs and allocate the KV cache. In ``cache_dir`` the optimized graphs are kept for the next start.

        Of two sessions ``beside`` each other, on one cache, either can run the next step of any sequence. A session
        of some of the ``graphs`` is sooner ready, and sooner still one that lays out no weights for its kernels
        beforehand: those of int8 products do it in each run then, which costs a prompt little and a step a lot.
        With a ``profile_prefix``, ONNX Runtime writes its own profile to files that begin so, until ``end_profiles``.

        Raises:
            ArtifactError: ONNX Runtime cannot load a graph.
        """
        manifest = artifact.manifest
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self._cache: KvCache
        self._staged: _Staged | None
        if beside is not None:
            self._cache, self._staged = beside._cache, beside._staged
        else:
            self._cache = KvCache(manifest.shapes, manifest.kv.dtype, num_slots, max_context_tokens)
            self._staged = _Staged.of(artifact, max_context_tokens)
        self.kv_bytes_per_token = self._cache.bytes_per_token
        kept = GraphCache(cache_dir, KEPT_BY) if cache_dir is not None else None
        there = [name for name in graphs if name in manifest.files]

        def load(name: str, cache: KvCache) -> _Graph:
            if artifact.contents is not None:
                session = _open_in_memory(artifact, name, _options(num_threads) if prepacks else _hasty(num_threads))
            elif profile_prefix is not None:
                session = _open(artifact.path / name, _profiling_options(num_threads, profile_prefix))
            else:
                session = (_load if prepacks else _load_as_it_is)(artifact, name, num_threads, kept)
            self._sessions.append(session)
            return _Graph(session, cache, manifest.shapes)

        self.run_s = 0.0
        self._sessions: list[ort.InferenceSession] = []
        first = load(there[0], self._cache)
        self._graph = self._prefill_graph = self._batch_graph = first
        if PREFILL_GRAPH in there[1:]:
            cache = self._staged.cache if self._staged is not None else self._cache
            self._prefill_graph = self._batch_graph = load(PREFILL_GRAPH, cache)
        if BATCH_GRAPH in there[1:]:
            self._batch_graph = load(BATCH_GRAPH, self._cache)
        self.has_batch_graph = self._batch_graph is not self._graph
        self._reads_staged = self._staged is not None and PREFILL_GRAPH in there[1:]

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        graph = self._prefill_graph
        logits = graph.prefill(0 if self._reads_staged else slot, token_ids, past_tokens)
        self.run_s = graph.run_s
        if self._staged is not None:
            end = past_tokens + len(token_ids)
            self._staged.is_usual = self._reads_staged and (self._staged.is_usual or past_tokens == 0)
            if self._reads_staged:
                self._cache.quantize(slot, self._staged.cache, self._staged.scales, past_tokens, end)
            else:  # a whole session may go on with this prompt
                self._cache.dequantize(slot, self._staged.cache, self._staged.scales, past_tokens, end)
        return logits

    def decode(self, token_ids: Ids, past_tokens: Ids, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        chosen = self._batch_graph if graph is DecodeGraph.BATCH else self._graph
        logits = chosen.decode(token_ids, past_tokens)
        self.run_s = chosen.run_s
        return logits

    def verify(self, slot: int, token_ids: Ids, past_tokens: int, graph: DecodeGraph = DecodeGraph.MAIN) -> Logits:
        chosen = self._batch_graph if graph is DecodeGraph.BATCH else self._graph
        logits = chosen.verify(slot, token_ids, past_tokens)
        self.run_s = chosen.run_s
        return logits

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self._cache.move(source, target, num_tokens)

    def end_profiles(self) -> list[Path]:
        """Return the profiles that ONNX Runtime has written, one for each graph."""
        return [Path(session.end_profiling()) for session in self._sessions]

    def save_prefix(self, slot: int, start: int, end: int) -> Held | None:
        if self._staged is None:
            return self._cache.copy_out(slot, start, end)
        return self._staged.cache.copy_out(0, start, end) if self._staged.is_usual else None

    def load_prefix(self, slot: int, start: int, held: Any) -> None:
        if self._staged is None:
            self._cache.copy_in(slot, start, held)
            return
        self._staged.is_usual = True
        self._staged.cache.copy_in(0, start, held)
        self._cache.quantize(slot, self._staged.cache, self._staged.scales, start, start + held.shape[2])


def quickest_graphs(manifest: Manifest) -> tuple[str, ...]:
    """Return the graph that gives a first token soonest and can go on from there."""
    return next((name,) for name in (BATCH_GRAPH, PREFILL_GRAPH, GRAPH) if name in manifest.files)


@dataclass(slots=True)
class _Staged:
    """The float32 cache of the prompt that is being read, and the scales with which it is quantized.

    ``is_usual`` says that the whole prompt was read on the graph for prompts, and not by a session that lacks it.
    """

    cache: KvCache
    scales: Scales
    is_usual: bool = True

    @staticmethod
    def of(artifact: Artifact, max_context_tokens: int) -> _Staged | None:
        """Return what an artifact needs: nothing where all of its graphs share one kind of cache.

        Raises:
            ArtifactError: the scales are missing, or not this model's.
        """
        shapes = artifact.manifest.shapes
        if not artifact.manifest.stages_prompts:
            return None
        path = artifact.path / KV_SCALES
        try:
            scales = np.load(io.BytesIO(artifact.read(KV_SCALES)), allow_pickle=False)
        except (ArtifactError, OSError, ValueError, EOFError) as error:
            raise ArtifactError(path, "has no scales for the int8 cache") from error
        if scales.shape != (shapes.num_layers, 2, shapes.num_kv_heads, shapes.head_size) or scales.dtype != np.float32:
            raise ArtifactError(path, f"has scales of shape {scales.shape}, which is not this model's")
        return _Staged(KvCache(shapes, "float32", 1, max_context_tokens), scales)


class _Graph:
    """One graph, bound to the cache: a binding for each slot's prefill and for each decode batch size."""

    def __init__(self, session: ort.InferenceSession, cache: KvCache, shapes: Shapes) -> None:
        self._session = session
        self._cache = cache
        self._vocab_size = shapes.vocab_size
        self._decode_runs: dict[int, _DecodeRun] = {}
        self._prefill_bindings: dict[int, ort.IOBinding] = {}
        self._prefill_logits = np.empty((1, self._vocab_size), np.float32)
        self._verify_bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._verify_logits: dict[int, Logits] = {}
        self.run_s = 0.0

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind(slot, slot + 1, self._prefill_logits)
        self._run_tokens(binding, token_ids, past_tokens, np.array([len(token_ids) - 1]))
        return self._prefill_logits

    def verify(self, slot: int, token_ids: Ids, past_tokens: int) -> Logits:
        num_tokens = len(token_ids)
        logits = self._verify_logits.get(num_tokens)
        if logits is None:
            logits = self._verify_logits[num_tokens] = np.empty((num_tokens, self._vocab_size), np.float32)
        binding = self._verify_bindings.get((slot, num_tokens))
        if binding is None:
            binding = self._verify_bindings[slot, num_tokens] = self._bind(slot, slot + 1, logits)
        self._run_tokens(binding, token_ids, past_tokens, np.arange(num_tokens))
        return logits

    def _run_tokens(self, binding: ort.IOBinding, token_ids: Ids, past_tokens: int, positions: Ids) -> None:
        """Run tokens of one slot behind its past, for the logits of some of them."""
        num_tokens = len(token_ids)
        # The kernel takes a run for the first one of its sequence when the total length is the run's own length.
        total = num_tokens if past_tokens == 0 else self._cache.max_context_tokens
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids.reshape(1, num_tokens)))
        binding.bind_cpu_input("seqlens_k", np.array([past_tokens + num_tokens - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logits_indices", positions)
        self._run(binding)

    def decode(self, token_ids: Ids, past_tokens: Ids) -> Logits:
        num_rows = len(token_ids)
        run = self._decode_runs.get(num_rows)
        if run is None:
            run = self._decode_runs[num_rows] = self._make_decode_run(num_rows)
        run.token_ids[:, 0] = token_ids
        run.seqlens_k[:] = past_tokens  # the length after this run, minus one
        self._run(run.binding)
        return run.logits

    def _run(self, binding: ort.IOBinding) -> None:
        started_at = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.run_s = time.perf_counter() - started_at

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
        run.binding.bind_cpu_input("total_sequence_length", np.array(self._cache.max_context_tokens, np.int32))
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


def _load(artifact: Artifact, name: str, num_threads: int, cache: GraphCache | None) -> ort.InferenceSession:
    """Open a graph, or what the cache keeps of it; a graph that was not kept yet is kept on the way."""
    path = artifact.path / name
    if cache is None:
        return _open(path, _options(num_threads))
    kept = cache.find(artifact, name)
    try:
        if kept is not None:
            return _open(kept, _kept_options(num_threads))
        with cache.making(artifact, name) as target:
            session = _open_and_keep(path, target, num_threads, artifact.manifest)
        return_freed_memory()
        return session
    except (ArtifactError, OSError):
        # a full disk, say; and if the artifact itself is bad, it fails again below
        cache.discard(artifact, name)
        return _open(path, _options(num_threads))


def _open_in_memory(artifact: Artifact, name: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """Open a graph whose bytes are nowhere on the disk; so nothing of it is kept there either.

    ONNX Runtime copies the weights, so for a moment they are in memory twice.
    """
    graph = bytes(artifact.read(name))
    weights = [file for file in artifact.manifest.files if file.endswith(".data") and file.encode() in graph]
    buffers = [np.frombuffer(artifact.read(file), np.uint8) for file in weights]  # they outlive the call that gets them
    options.add_external_initializers_from_files_in_memory(weights, buffers, [buffer.nbytes for buffer in buffers])
    session = _open(artifact.path / name, options, graph)
    del buffers
    return_freed_memory()
    return session


def _load_as_it_is(artifact: Artifact, name: str, num_threads: int, cache: GraphCache | None) -> ort.InferenceSession:
    """Open what the cache keeps of a graph whose kernels do without prepacked weights; the first time, keep it."""
    kept = cache.find(artifact, name) if cache is not None else None
    if kept is None:
        return _load(artifact, name, num_threads, cache)
    options = _hasty(num_threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _open(kept, options)


def _open_and_keep(path: Path, target: Path, num_threads: int, manifest: Manifest) -> ort.InferenceSession:
    """Open what is written to ``target``: the graph as it was optimized, with its weights prepacked where that works.

    Raises:
        ArtifactError: the graph cannot be loaded, or what was written computes something else.
    """
    for keep in (_KEEP | _PREPACKED, _KEEP):
        options = _options(num_threads)
        for key, value in keep.items():
            options.add_session_config_entry(key, value)
        options.optimized_model_filepath = str(target)
        expected = _probe(_open(path, options), manifest)
        align_weights(target, target.parent / WEIGHTS)
        kept = _open(target, _kept_options(num_threads))
        if np.array_equal(expected, _probe(kept, manifest)):
            return kept
    raise ArtifactError(target, "does not compute what it was made from")


_KEEP = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    # Between the two: axes and split sizes must stay in the graph, and weights must be where they can be mapped.
    "session.optimized_model_external_initializers_min_size_in_bytes": "128",
}

_PREPACKED = {"session.save_external_prepacked_constant_initializers": "1"}


def _probe(session: ort.InferenceSession, manifest: Manifest) -> Logits:
    """Return the logits [8, V] of a fixed prompt of eight tokens."""
    num_tokens = 8
    shapes = manifest.shapes
    declared = next(value.type for value in session.get_inputs() if value.name.startswith("past_key_values"))
    dtype = KV_DTYPES[KV_TYPES[declared]]
    empty = np.zeros((1, shapes.num_kv_heads, num_tokens, shapes.head_size), dtype)
    layers = range(shapes.num_layers)
    feeds: dict[str, Any] = {f"past_key_values.{layer}.{kind}": empty for layer in layers for kind in ("key", "value")}
    feeds["input_ids"] = np.arange(num_tokens, dtype=np.int64)[None]
    feeds["seqlens_k"] = np.array([num_tokens - 1], np.int32)
    feeds["total_sequence_length"] = np.array(num_tokens, np.int32)
    feeds["logits_indices"] = np.arange(num_tokens, dtype=np.int64)
    logits: Logits = session.run(["logits"], feeds)[0]
    return logits


def _kept_options(num_threads: int) -> ort.SessionOptions:
    options = _options(num_threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _options(num_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    # Each graph has threads of its own. Those that spin on after a run take a core from the graph that runs next: the
    # first steps after a prompt took twice their time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _hasty(num_threads: int) -> ort.SessionOptions:
    """Return the options of a session that lays out no weights for its kernels."""
    options = _options(num_threads)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _profiling_options(num_threads: int, prefix: str) -> ort.SessionOptions:
    options = _options(num_threads)
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    return options


def _open(path: Path, options: ort.SessionOptions, graph: bytes | None = None) -> ort.InferenceSession:
    """Open the graph at ``path``, or the one given in its place.

    Opening lays every weight out once more, if only to find that it was kept so. Among the small blocks those would
    leave the heap as large as they are all together.
    """
    try:
        with large_blocks_apart():
            return ort.InferenceSession(graph or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(path, f"ONNX Runtime cannot load it ({cause})") from error
