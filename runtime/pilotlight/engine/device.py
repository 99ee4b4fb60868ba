"""A session whose KV cache and logits stay on a device: ONNX Runtime's CUDA provider, and by the same way its CPU one.

The cache is bound by its address, the steps' inputs have places on the device that are written before each run, and of
the logits only what a choice needs comes back. Decode steps run on a few batch sizes, padded up to the next one, so
that each can be captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pilotlight.artifact import Artifact, Shapes
from pilotlight.engine import small_graphs
from pilotlight.engine.device_logits import DeviceLogits
from pilotlight.engine.pace import DecodeGraph
from pilotlight.engine.session import Ids
from pilotlight.engine.speculation import DRAFT_TOKENS
from pilotlight.errors import ArtifactError, ConfigError, OutOfMemory

logger = logging.getLogger("pilotlight.engine")

Kind = Literal["cpu", "cuda"]
Opened = Any
"""What ONNX Runtime's untyped package gives: a session, a binding, a tensor."""

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""The batch sizes of decode steps; beyond the last one, multiples of it."""

NO_GRAPH = "-1"
"""The graph id under which the CUDA provider neither captures nor replays."""

ALLOCATION_FAILURES = (
    "failed to allocate memory",
    "out of memory",
    "bfcarena",
    "bad_alloc",
    "cudaerrormemoryallocation",
)
"""ONNX Runtime has no error of its own for this; its messages and CUDA's hold one of these."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a session computes. ``arena_bytes`` bound what its weights and runs may take beside the cache.

    ``captures`` asks for CUDA graphs. With a ``profile_prefix``, ONNX Runtime profiles the model's runs into a file.
    """

    kind: Kind = "cpu"
    index: int = 0
    arena_bytes: int | None = None
    num_threads: int = 0
    captures: bool = True
    profile_prefix: str | None = None

    @property
    def place(self) -> tuple[str, int]:
        """The device as bindings name it."""
        return self.kind, self.index

    def providers(self, *, captures: bool) -> list[Any]:
        """Return ONNX Runtime's providers, the device's first; its arena takes what it is asked for and no more."""
        if self.kind == "cpu":
            return ["CPUExecutionProvider"]
        options = {"device_id": str(self.index), "arena_extend_strategy": "kSameAsRequested"}
        if self.arena_bytes is not None:
            options["gpu_mem_limit"] = str(self.arena_bytes)
        if captures:  # and then nothing may run on the processor, which must not even be named
            return [("CUDAExecutionProvider", {**options, "enable_cuda_graph": "1"})]
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def bucket_of(num_rows: int, num_slots: int) -> int:
    """Return the batch size that a decode step of so many rows runs on: the next bucket, or all slots."""
    beyond = -(-num_rows // BUCKETS[-1]) * BUCKETS[-1]
    return min(next((size for size in BUCKETS if size >= num_rows), beyond), num_slots)


def check_provider(kind: Kind) -> None:
    """Raise where ONNX Runtime cannot use a device; it would fall back to the processor without a word.

    Raises:
        ConfigError: the provider is not there.
    """
    if kind == "cuda":
        ort.preload_dlls()
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise ConfigError("provider is 'cuda', but this onnxruntime has no CUDA; install pilotlight[gpu]")


STEP, PROMPT = "step logits", "prompt logits"
READ_ROWS = max(DRAFT_TOKENS) + 1
"""The most positions of one slot whose logits are wanted."""

Axes = tuple[int, ...]


class DeviceSession:
    """An artifact's graph on a device, as the engine's ``Session``.

    The logits that a run returns are valid until the next run of the same kind. Nothing of the cache leaves the device,
    so no beginnings of prompts are kept.
    """

    has_batch_graph = False

    def __init__(self, artifact: Artifact, num_slots: int, max_context_tokens: int, device: Device) -> None:
        """Load the graph and allocate the cache.

        Raises:
            ArtifactError: the artifact has another kind of cache, or ONNX Runtime cannot load its graph.
            ConfigError: the provider is not there.
            OutOfMemory: the cache does not fit.
        """
        manifest = artifact.manifest
        check_artifact(artifact, device.kind)
        check_provider(device.kind)
        self.num_slots = num_slots
        self.max_context_tokens = max_context_tokens
        self.run_s = 0.0
        self._device = device
        self._vocab_size = manifest.shapes.vocab_size
        self._model, self.captures = _open_model(artifact, device)
        asked = {name: (num_rows, self._vocab_size) for name, num_rows in ((STEP, num_slots), (PROMPT, READ_ROWS))}
        cache_axes = cache_tensors(manifest.shapes, num_slots, max_context_tokens)
        memory = allocate({**cache_axes, **asked}, manifest.kv.dtype, "float32", device)
        self._step_logits, self._prompt_logits = memory.pop(STEP), memory.pop(PROMPT)
        self._cache = DeviceCache(memory, device)
        self.kv_bytes_per_token = self._cache.reserved_bytes // (num_slots * max_context_tokens)
        self._picker = Picker(device)
        self._decode_runs: dict[int, _DecodeRun] = {}
        self._reads: dict[tuple[int, int], Opened] = {}

    @property
    def kv_reserved_bytes(self) -> int:
        return self._cache.reserved_bytes

    def prefill(self, slot: int, token_ids: Ids, past_tokens: int) -> DeviceLogits:
        return self._read(slot, token_ids, past_tokens, np.array([len(token_ids) - 1], np.int64))

    def verify(
        self, slot: int, token_ids: Ids, past_tokens: int, graph: DecodeGraph = DecodeGraph.MAIN
    ) -> DeviceLogits:
        return self._read(slot, token_ids, past_tokens, np.arange(len(token_ids)))

    def _read(self, slot: int, token_ids: Ids, past_tokens: int, positions: Ids) -> DeviceLogits:
        """Run tokens of one slot behind its past, for the logits of some of them."""
        num_tokens, num_rows = len(token_ids), len(positions)
        binding = self._reads.get((slot, num_rows))
        if binding is None:
            binding = self._reads[slot, num_rows] = self._bind(slot, slot + 1, self._prompt_logits, num_rows)
        # The kernel takes a run for the first one of its sequence when the total length is the run's own length.
        total = num_tokens if past_tokens == 0 else self.max_context_tokens
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids.reshape(1, num_tokens)))
        binding.bind_cpu_input("seqlens_k", np.array([past_tokens + num_tokens - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logits_indices", positions)
        self._run(binding, NO_GRAPH)
        return DeviceLogits(self._picker, self._prompt_logits.address, tuple(range(num_rows)), self._vocab_size)

    def decode(self, token_ids: Ids, past_tokens: Ids, graph: DecodeGraph = DecodeGraph.MAIN) -> DeviceLogits:
        num_rows = len(token_ids)
        bucket = bucket_of(num_rows, self.num_slots)
        run = self._decode_runs.get(bucket)
        if run is None:
            run = self._decode_runs[bucket] = self._make_decode_run(bucket)
        run.write(token_ids, past_tokens, padding_past=self.max_context_tokens - 1)
        self._run(run.binding, str(bucket))
        return DeviceLogits(self._picker, self._step_logits.address, tuple(range(num_rows)), self._vocab_size)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self._cache.move(source, target)

    def end_profile(self) -> Path:
        """Return the profile that ONNX Runtime has written."""
        return Path(self._model.end_profiling())

    def save_prefix(self, slot: int, start: int, end: int) -> None:
        return None

    def load_prefix(self, slot: int, start: int, held: Any) -> None:
        raise AssertionError("this session has saved none")

    def _run(self, binding: Opened, graph_id: str) -> None:
        started_at = time.perf_counter()
        options = ort.RunOptions()
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", graph_id)
        with allocation_failures():
            self._model.run_with_iobinding(binding, options)
        self.run_s = time.perf_counter() - started_at

    def _make_decode_run(self, bucket: int) -> _DecodeRun:
        binding = self._bind(0, bucket, self._step_logits, bucket)
        run = _DecodeRun.of(bucket, binding, self._device)
        binding.bind_cpu_input("total_sequence_length", np.array(self.max_context_tokens, np.int32))
        return run

    def _bind(self, first_slot: int, end_slot: int, logits: Tensor, num_rows: int) -> Opened:
        binding = self._model.io_binding()
        num_slots = end_slot - first_slot
        for name, tensor in self._cache.tensors.items():
            part, _, layer = name.partition(".")
            where = (*self._device.place, tensor.dtype, [num_slots, *tensor.axes[1:]], tensor.row(first_slot))
            binding.bind_input(f"past_key_values.{layer}.{part}", *where)
            binding.bind_output(f"present.{layer}.{part}", *where)
        axes = [num_rows, self._vocab_size]
        binding.bind_output("logits", *self._device.place, np.float32, axes, logits.address)
        return binding


@dataclass(frozen=True, slots=True)
class Tensor:
    """Memory on a device, which lives as long as ``owner``."""

    address: int
    dtype: type[np.generic]
    axes: Axes
    owner: Opened

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.axes)) * np.dtype(self.dtype).itemsize

    def row(self, index: int) -> int:
        """Return the address of a place on the first axis."""
        return self.address + index * (self.nbytes // self.axes[0])


class DeviceCache:
    """The KV cache on a device: a tensor a layer for keys and one for values, [slots, kv heads, context, head size]."""

    def __init__(self, tensors: dict[str, Tensor], device: Device) -> None:
        self.tensors = tensors
        self._device = device

    @property
    def reserved_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def move(self, source: int, target: int) -> None:
        """Copy a whole slot over another one, from the device to the device."""
        binding = self._copier.io_binding()
        for name, tensor in self.tensors.items():
            what = tensor.dtype, [1, *tensor.axes[1:]]
            binding.bind_input(f"source.{name}", *self._device.place, *what, tensor.row(source))
            binding.bind_output(f"target.{name}", *self._device.place, *what, tensor.row(target))
        with allocation_failures():
            self._copier.run_with_iobinding(binding)

    @cached_property
    def _copier(self) -> Opened:
        dtype = np.dtype(next(iter(self.tensors.values())).dtype).name
        return _open_small(small_graphs.copies(list(self.tensors), dtype), self._device)


class Picker:
    """Brings what is asked for of logits on the device to the host."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._likeliest = _open_small(small_graphs.likeliest(), device)
        self._rows = _open_small(small_graphs.rows(), device)

    def likeliest(self, logits: int, axes: tuple[int, int], count: int) -> tuple[NDArray[np.float32], Ids]:
        """Return the values [N, count] and ids [N, count] of the largest logits of each row, largest first."""
        values, ids = self._run(self._likeliest, logits, axes, ("values", "ids"), count=np.array([count]))
        return values, ids

    def rows(self, logits: int, axes: tuple[int, int], indices: list[int]) -> NDArray[np.float32]:
        """Return some rows [M, V] whole."""
        (picked,) = self._run(self._rows, logits, axes, ("picked",), indices=np.array(indices))
        return np.array(picked)  # the caller may write into it

    def _run(
        self, session: Opened, logits: int, axes: tuple[int, int], outputs: tuple[str, ...], **inputs: Ids
    ) -> list[Any]:
        binding = session.io_binding()
        binding.bind_input("logits", *self._device.place, np.float32, list(axes), logits)
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        with allocation_failures():
            session.run_with_iobinding(binding)
        return [output.numpy() for output in binding.get_outputs()]


@dataclass(frozen=True, slots=True)
class _DecodeRun:
    """What one batch size of decode steps is bound to: what the host writes, and where it lies on the device."""

    token_ids: Ids
    seqlens_k: NDArray[np.int32]
    binding: Opened
    token_ids_there: Opened
    seqlens_k_there: Opened

    @staticmethod
    def of(bucket: int, binding: Opened, device: Device) -> _DecodeRun:
        arrays = np.zeros((bucket, 1), np.int64), np.zeros(bucket, np.int32), np.arange(bucket, dtype=np.int64)
        there = [ort.OrtValue.ortvalue_from_numpy(array.copy(), *device.place) for array in arrays]
        for name, value in zip(("input_ids", "seqlens_k", "logits_indices"), there, strict=True):
            binding.bind_ortvalue_input(name, value)
        return _DecodeRun(arrays[0], arrays[1], binding, there[0], there[1])

    def write(self, token_ids: Ids, past_tokens: Ids, padding_past: int) -> None:
        """Put a step's inputs on the device; rows beyond them are padding, which reads and writes behind such a past.

        Padding runs on slots that no sequence decodes in. The last position of a slot is written by the last token that
        can be, so nothing that a prompt has read until then is lost.
        """
        num_rows = len(token_ids)
        self.token_ids[:num_rows, 0] = token_ids
        self.token_ids[num_rows:] = 0
        self.seqlens_k[:num_rows] = past_tokens  # the length after this run, minus one
        self.seqlens_k[num_rows:] = padding_past
        self.token_ids_there.update_inplace(self.token_ids)
        self.seqlens_k_there.update_inplace(self.seqlens_k)


def cache_tensors(shapes: Shapes, num_slots: int, max_context_tokens: int) -> dict[str, Axes]:
    """Return the names and axes of a cache's tensors."""
    axes = (num_slots, shapes.num_kv_heads, max_context_tokens, shapes.head_size)
    return {f"{part}.{layer}": axes for layer in range(shapes.num_layers) for part in ("key", "value")}


def allocate(asked: dict[str, Axes], cache_dtype: str, logits_dtype: str, device: Device) -> dict[str, Tensor]:
    """Return tensors of zeros on a device, in exactly so much memory: those of four axes are the cache's.

    They are the outputs of a graph, because the arena in which ONNX Runtime otherwise allocates tensors for its callers
    takes the next power of two.

    Raises:
        OutOfMemory: there is no room.
    """
    types = {name: cache_dtype if len(axes) == 4 else logits_dtype for name, axes in asked.items()}
    graph = small_graphs.zeros([small_graphs.Value(name, types[name], len(axes)) for name, axes in asked.items()])
    session = _open_small(graph, device)
    binding = session.io_binding()
    for name, axes in asked.items():
        binding.bind_cpu_input(f"{name}.axes", np.array(axes, np.int64))
        binding.bind_output(name, *device.place)
    with allocation_failures():
        session.run_with_iobinding(binding)
    return {
        name: Tensor(value.data_ptr(), np.dtype(types[name]).type, axes, (value, session))
        for (name, axes), value in zip(asked.items(), binding.get_outputs(), strict=True)
    }


@contextmanager
def allocation_failures() -> Iterator[None]:
    """Give ONNX Runtime's failures to allocate an error of their own.

    Raises:
        OutOfMemory: there was no room for what the block wanted to run.
    """
    try:
        yield
    except Exception as error:
        if is_allocation_failure(error):
            raise OutOfMemory from error
        raise


def is_allocation_failure(error: Exception) -> bool:
    """Return whether a run failed for want of memory."""
    return isinstance(error, MemoryError) or any(mark in str(error).lower() for mark in ALLOCATION_FAILURES)


def check_artifact(artifact: Artifact, kind: Kind) -> None:
    """Raise where an artifact is not made for a device.

    Raises:
        ArtifactError: its cache is 8 bits, or on a GPU anything but 16; or it is sealed, which ends at a device's door.
    """
    if artifact.contents is not None:
        raise ArtifactError(artifact.path, "is sealed, and a device's memory is not the processor's to protect")
    dtype = artifact.manifest.kv.dtype
    if dtype == "int8" or (kind == "cuda" and dtype != "float16"):
        raise ArtifactError(
            artifact.path,
            f"has a {dtype} cache; a GPU wants float16: export with --precision fp16, or int4 --recipe int4-fp16",
        )


def _open_model(artifact: Artifact, device: Device) -> tuple[Opened, bool]:
    """Open the graph, and say whether its decode steps are captured; a graph that cannot be captured runs without."""
    if device.kind == "cuda" and device.captures:
        try:
            return _open(artifact, device, captures=True), True
        except ArtifactError as error:
            logger.warning("decode steps run without CUDA graphs: %s", error.problem)
    return _open(artifact, device, captures=False), False


def _open(artifact: Artifact, device: Device, *, captures: bool) -> Opened:
    options = ort.SessionOptions()
    options.intra_op_num_threads = device.num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if device.profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = device.profile_prefix
    if device.kind != "cpu":
        # What would run on the processor would fetch its inputs from the device in every step.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1" if captures else "0")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        session = ort.InferenceSession(str(artifact.graph_path), options, providers=device.providers(captures=captures))
    except Exception as error:  # onnxruntime's errors share no base class of their own
        if is_allocation_failure(error):
            raise OutOfMemory from error
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(artifact.graph_path, f"ONNX Runtime cannot load it ({cause})") from error
    if device.kind == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise ConfigError("provider is 'cuda', but ONNX Runtime cannot use it: is there a GPU, and CUDA's libraries?")
    return session


def _open_small(graph: bytes, device: Device) -> Opened:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # nothing is constant here, or shared
    options.intra_op_num_threads = device.num_threads
    options.log_severity_level = 3
    unbounded = Device(device.kind, device.index)
    return ort.InferenceSession(graph, options, providers=unbounded.providers(captures=False))
