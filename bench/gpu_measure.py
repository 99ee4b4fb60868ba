"""What is measured of an artifact on a device: start stages, prefill, decode, memory, and the share of the roofline."""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pilotlight.artifact import Artifact, open_artifact
from pilotlight.engine.device import Device, DeviceCache, DeviceSession, allocate
from pilotlight.engine.hbm import Demand, HbmPlan, kv_bytes_per_token, plan_hbm, weights_bytes
from pilotlight.engine.nvml import Gpu

WARM_UP_STEPS = 3
COPIED_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
COPIED_HEAD_SIZE = 64
COPY_OPERATORS = ("MemcpyFromHost", "MemcpyToHost")


@dataclass(frozen=True)
class Wanted:
    """What to measure, and on which device."""

    device: Device
    streams: tuple[int, ...]
    context_tokens: int
    prompt_tokens: int
    num_steps: int
    gpu: Gpu | None = None
    budget_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """The memory that the plan may share out: a GPU's, or where there is none a budget that stands for it."""
        return self.gpu.read().free_bytes if self.gpu is not None else self.budget_bytes

    def used_bytes(self) -> int | None:
        return self.gpu.read().used_bytes if self.gpu is not None else None


@dataclass
class Figures:
    """All that was found out about one artifact; rates are tokens per second of all streams together."""

    plan: dict[str, int]
    captures_decode_steps: bool
    start_ms: dict[str, float]
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: dict[int, float] = field(default_factory=dict)
    step_ms: dict[int, float] = field(default_factory=dict)
    roofline_share: dict[int, float] = field(default_factory=dict)
    copy_gb_per_s: float = 0.0
    memory_used_bytes: int | None = None
    memory_bound_bytes: int = 0
    copies_in_decode: dict[str, int] = field(default_factory=dict)


def measure(artifact: Artifact, wanted: Wanted) -> Figures:
    """Measure an artifact; a fresh process tells the stages of its start."""
    start_ms = start_stages(artifact.path, wanted)
    gc.collect()  # what an earlier artifact left on the device
    before = wanted.used_bytes()
    plan = plan_of(artifact, wanted)
    device = Device(wanted.device.kind, wanted.device.index, plan.arena_bytes, wanted.device.num_threads)
    session = DeviceSession(artifact, plan.num_slots, plan.max_context_tokens, device)
    described = {name: getattr(plan, name) for name in ("num_slots", "max_context_tokens", "kv_bytes")}
    figures = Figures(described, session.captures, start_ms, memory_bound_bytes=plan.total_bytes)
    figures.prefill_tokens_per_s = prefill_rate(session, wanted)
    for num_streams in (count for count in wanted.streams if count <= plan.num_slots):
        step_s = decode_step_s(session, num_streams, wanted)
        figures.step_ms[num_streams] = step_s * 1000
        figures.decode_tokens_per_s[num_streams] = num_streams / step_s
    if before is not None:
        figures.memory_used_bytes = (wanted.used_bytes() or 0) - before
    figures.copy_gb_per_s = copy_rate(wanted.device)
    for num_streams, step_ms in figures.step_ms.items():
        least = step_bytes(artifact, num_streams, wanted.prompt_tokens)
        figures.roofline_share[num_streams] = least / (step_ms / 1000) / (figures.copy_gb_per_s * 1e9)
    figures.copies_in_decode = copies_in_decode(artifact, wanted)
    return figures


def plan_of(artifact: Artifact, wanted: Wanted) -> HbmPlan:
    """Return how the device's memory is shared out for as many streams as are measured."""
    demand = Demand(max(wanted.streams), wanted.context_tokens, wanted.prompt_tokens, is_context_fixed=True)
    return plan_hbm(wanted.free_bytes, artifact, demand)


def prefill_rate(session: DeviceSession, wanted: Wanted) -> float:
    """Return prompt tokens per second of a whole prompt in one chunk, the median of some."""
    times = []
    for seed in range(WARM_UP_STEPS + wanted.num_steps // 4 + 1):
        session.prefill(0, prompt_of(session, wanted.prompt_tokens, seed), 0).likeliest(1)
        times.append(session.run_s)
    return wanted.prompt_tokens / statistics.median(times[WARM_UP_STEPS:])


def decode_step_s(session: DeviceSession, num_streams: int, wanted: Wanted) -> float:
    """Return the median time of a step with its choice of tokens, all streams behind prompts of the same length."""
    for slot in range(num_streams):
        session.prefill(slot, prompt_of(session, wanted.prompt_tokens, slot), 0)
    token_ids, times = np.ones(num_streams, np.int64), []
    for step in range(WARM_UP_STEPS + wanted.num_steps):
        begun_at = time.perf_counter()
        logits = session.decode(token_ids, np.full(num_streams, wanted.prompt_tokens + step))
        token_ids = logits.likeliest(1)[1][:, 0]
        times.append(time.perf_counter() - begun_at)
    return statistics.median(times[WARM_UP_STEPS:])


def copy_rate(device: Device) -> float:
    """Return how many gigabytes a second the device reads and writes when it copies its own memory."""
    num_tokens = COPIED_BYTES[device.kind] // (COPIED_HEAD_SIZE * np.dtype(np.float16).itemsize)
    tensors = allocate({"key.0": (2, 1, num_tokens, COPIED_HEAD_SIZE)}, "float16", "float32", device)
    memory, times = DeviceCache(tensors, device), []
    for _ in range(WARM_UP_STEPS + 5):
        begun_at = time.perf_counter()
        memory.move(0, 1)
        times.append(time.perf_counter() - begun_at)
    return memory.reserved_bytes / statistics.median(times[WARM_UP_STEPS:]) / 1e9


def step_bytes(artifact: Artifact, num_streams: int, past_tokens: int) -> int:
    """Return the fewest bytes that a decode step reads: every weight once, and the cached tokens of each stream."""
    return weights_bytes(artifact) + num_streams * past_tokens * kv_bytes_per_token(artifact)


def copies_in_decode(artifact: Artifact, wanted: Wanted, num_streams: int = 2) -> dict[str, int]:
    """Return how often decode steps copied between host and device, by the input or output that was copied.

    Steps are profiled without CUDA graphs, which show no operators.
    """
    with tempfile.TemporaryDirectory() as directory:
        device = Device(
            wanted.device.kind,
            wanted.device.index,
            num_threads=wanted.device.num_threads,
            captures=False,
            profile_prefix=f"{directory}/steps",
        )
        session = DeviceSession(artifact, num_streams, min(64, wanted.context_tokens), device)
        for step in range(4):
            session.decode(np.ones(num_streams, np.int64), np.full(num_streams, step))
        return copies_of(json.loads(session.end_profile().read_text()))


def copies_of(events: list[dict[str, Any]]) -> dict[str, int]:
    """Return the copies between host and device in a profile of ONNX Runtime, by node."""
    nodes = (event for event in events if event.get("cat") == "Node")
    names = (str(event["name"]) for event in nodes if event.get("args", {}).get("op_name") in COPY_OPERATORS)
    return dict(Counter(name.removesuffix("_kernel_time") for name in names if name.endswith("_kernel_time")))


def copies_the_cache(copies: dict[str, int]) -> bool:
    """Return whether any of the copies is of keys or values."""
    return any("past_key_values" in name or "present" in name for name in copies)


def prompt_of(session: DeviceSession, num_tokens: int, seed: int) -> Any:
    return np.array(random.Random(seed).choices(range(3, 250), k=num_tokens), np.int64)


def start_stages(path: Path, wanted: Wanted) -> dict[str, float]:
    """Return the stages of a start in a process of its own, in milliseconds."""
    device = wanted.device
    command = [sys.executable, __file__, str(path), device.kind, str(wanted.prompt_tokens), str(device.num_threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a start failed: {done.stderr.strip().splitlines()[-1:]}")
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return stages


def _start(path: Path, kind: Any, prompt_tokens: int, num_threads: int, begun_at: float) -> dict[str, float]:
    stages = {}

    def end(name: str) -> None:
        nonlocal begun_at
        now = time.perf_counter()
        stages[name], begun_at = round((now - begun_at) * 1000, 1), now

    artifact = open_artifact(path)
    end("open")
    session = DeviceSession(artifact, 8, 2 * prompt_tokens, Device(kind, num_threads=num_threads))
    end("session")
    session.prefill(0, prompt_of(session, prompt_tokens, 0), 0).likeliest(1)
    end("first_prefill")
    session.decode(np.ones(1, np.int64), np.full(1, prompt_tokens)).likeliest(1)
    end("first_decode")
    session.decode(np.ones(1, np.int64), np.full(1, prompt_tokens + 1)).likeliest(1)
    end("second_decode")
    return stages


if __name__ == "__main__":
    artifact_path, of_kind, tokens, threads = sys.argv[1:]
    print(json.dumps(_start(Path(artifact_path), of_kind, int(tokens), int(threads), time.perf_counter())))
