"""Slots and context from a device's free memory; what the driver says; a device that has no memory left for a run."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_support import Log, engine_on
from pilotlight.artifact import Artifact, FileEntry, KvLayout, Shapes
from pilotlight.engine.fake import FakeSession, next_token
from pilotlight.engine.hbm import Demand, HbmPlan, kv_bytes_per_token, plan_hbm, weights_bytes, workspace_bytes
from pilotlight.engine.nvml import Gpu
from pilotlight.engine.scheduler import CALM_STEPS
from pilotlight.errors import ConfigError, OutOfMemory
from pilotlight.request import FinishReason, SamplingParams, Sequence
from support import toy_manifest

GB = 1_000_000_000
HALF_BILLION = Shapes(24, 14, 2, 64, 896, 151_936, 32_768)
"""The shape of Qwen2.5-0.5B."""


def artifact(precision: str = "fp16", weights: int = GB, shapes: Shapes = HALF_BILLION) -> Artifact:
    files = {"model.onnx.data": FileEntry("", weights)}
    manifest = toy_manifest(files, shapes=shapes, precision=precision, kv=KvLayout("float16"))
    return Artifact(Path("models/half"), manifest, "sha256:0")


def demand(num_slots: int = 64, context: int = 4096, *, fixed: bool = False) -> Demand:
    return Demand(num_slots, context, 256, fixed)


def test_everything_that_is_asked_for_fits_a_large_device() -> None:
    plan = plan_hbm(140 * GB, artifact(), demand())
    assert (plan.num_slots, plan.max_context_tokens) == (64, 4096)
    assert plan.kv_bytes == 64 * 4096 * 12_288 == 64 * 4096 * kv_bytes_per_token(artifact())
    assert plan.weights_bytes == weights_bytes(artifact()) == GB
    assert plan.total_bytes == plan.arena_bytes + plan.kv_bytes < 140 * GB


def test_on_a_smaller_device_there_are_fewer_slots_of_the_same_context() -> None:
    plan = plan_hbm(3 * GB, artifact(), demand())
    assert plan.max_context_tokens == 4096
    assert 1 < plan.num_slots < 64
    one_more = workspace_bytes(artifact(), plan.num_slots + 1, 256) + (plan.num_slots + 1) * 4096 * 12_288
    assert one_more > 0.92 * 3 * GB - GB, "one more would have fitted"


def test_one_slot_shrinks_if_it_may() -> None:
    free = int((GB + workspace_bytes(artifact(), 1, 256) + 1000 * 12_288) / 0.92)
    plan = plan_hbm(free, artifact(), demand())
    assert (plan.num_slots, plan.max_context_tokens) == (1, 960)
    with pytest.raises(ConfigError, match=r"models/half: needs [\d,]+ MB on the device for one slot of 4,096 tokens"):
        plan_hbm(free, artifact(), demand(fixed=True))


def test_a_model_that_is_too_large_is_refused_with_figures() -> None:
    with pytest.raises(ConfigError, match=r"7,360 MB of 8,000 MB free may be used"):
        plan_hbm(8 * GB, artifact(weights=14 * GB), demand())


def test_quantized_weights_are_widened_for_prompts() -> None:
    assert workspace_bytes(artifact("int4"), 1, 256) - workspace_bytes(artifact(), 1, 256) == 151_936 * 896 * 2


@given(
    free=st.integers(0, 200 * GB),
    weights=st.integers(1_000_000, 100 * GB),
    num_slots=st.integers(1, 300),
    context=st.integers(256, 32_768),
    fixed=st.booleans(),
)
def test_a_plan_never_takes_more_than_there_is(
    free: int, weights: int, num_slots: int, context: int, fixed: bool
) -> None:
    try:
        plan: HbmPlan | None = plan_hbm(free, artifact(weights=weights), demand(num_slots, context, fixed=fixed))
    except ConfigError:
        plan = None
    least = weights + workspace_bytes(artifact(), 1, 256) + 256 * 12_288
    if plan is None:
        assert fixed or least > int(0.92 * free) - 64 * 12_288
        return
    assert plan.total_bytes <= 0.92 * free
    assert 1 <= plan.num_slots <= num_slots
    assert plan.max_context_tokens <= context
    assert plan.max_context_tokens == context or (plan.num_slots == 1 and not fixed)


@dataclass
class FakeMemory:
    used: int
    free: int
    total: int


def fake_nvml(monkeypatch: pytest.MonkeyPatch, handles: dict[Any, FakeMemory]) -> None:
    """A driver that knows GPUs by index and by UUID."""
    module: Any = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def find(key: Any) -> FakeMemory:
        if key not in handles:
            raise NVMLError("Not Found")
        return handles[key]

    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = find
    module.nvmlDeviceGetHandleByUUID = find
    module.nvmlDeviceGetName = lambda handle: b"NVIDIA L4"
    module.nvmlDeviceGetMemoryInfo = lambda handle: handle
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_the_driver_is_asked_for_the_gpu_that_cuda_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, {0: FakeMemory(1, 2, 3), 3: FakeMemory(4, 5, 9), "GPU-b": FakeMemory(7, 1, 8)})
    assert Gpu(environment={}).read().free_bytes == 2
    assert Gpu(environment={"CUDA_VISIBLE_DEVICES": "3"}).read().used_bytes == 4
    assert Gpu(1, environment={"CUDA_VISIBLE_DEVICES": "0, GPU-b"}).read().total_bytes == 8
    assert Gpu(environment={}).name == "NVIDIA L4"
    with pytest.raises(LookupError, match="CUDA_VISIBLE_DEVICES names 1"):
        Gpu(1, environment={"CUDA_VISIBLE_DEVICES": "3"})
    with pytest.raises(LookupError, match="there is no GPU 0"):
        Gpu(environment={"CUDA_VISIBLE_DEVICES": "7"})


def test_without_the_package_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(LookupError, match="nvidia-ml-py is not installed"):
        Gpu(environment={})


class SmallDevice(FakeSession):
    """Has memory for steps of ``max_rows`` rows at most."""

    def __init__(self, max_rows: int) -> None:
        super().__init__(num_slots=8)
        self.max_rows = max_rows
        self.num_failures = 0
        self.largest_step = 0

    def decode(self, token_ids: Any, past_tokens: Any, graph: Any = None) -> Any:
        if len(token_ids) > self.max_rows:
            self.num_failures += 1
            raise OutOfMemory
        self.largest_step = max(self.largest_step, len(token_ids))
        return super().decode(token_ids, past_tokens)


def greedy(name: str, prompt: tuple[int, ...], num_tokens: int) -> Sequence:
    return Sequence(name, prompt, num_tokens, frozenset(), SamplingParams(temperature=0.0))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5])
def test_a_device_without_memory_sheds_load_and_every_answer_is_whole(max_rows: int) -> None:
    session = SmallDevice(max_rows)
    many = [greedy(f"s{index}", (index + 1, 7, index), 20) for index in range(12)]
    with engine_on(session) as (engine, log):
        for sequence in many:
            engine.submit(sequence)
        log.wait_for_end(*(sequence.id for sequence in many))
    for sequence in many:
        assert log.tokens(sequence.id) == expected_tokens_of(sequence)
        assert log.by_sequence[sequence.id][-1].finish is FinishReason.LENGTH
    assert session.num_failures > 0
    assert session.largest_step <= max_rows


def expected_tokens_of(sequence: Sequence) -> list[int]:
    tokens = list(sequence.prompt_ids)
    for _ in range(sequence.max_new_tokens):
        tokens.append(next_token(tokens, 512))
    return tokens[len(sequence.prompt_ids) :]


def test_all_slots_are_used_again_when_there_is_memory_again() -> None:
    session = SmallDevice(max_rows=2)
    log = Log()
    with engine_on(session, log=log) as (engine, _):
        for index in range(8):
            engine.submit(greedy(f"a{index}", (index + 1,), 8))
        log.wait_for_end(*(f"a{index}" for index in range(8)))
        assert session.num_failures > 0
        session.max_rows = 8
        for index in range(16):
            engine.submit(greedy(f"b{index}", (index + 1, 3), 60))
        log.wait_for_end(*(f"b{index}" for index in range(16)))
    assert session.largest_step == 8
    assert CALM_STEPS < 16 * 60


def test_who_is_alone_and_has_no_memory_is_told_to_come_back() -> None:
    with engine_on(SmallDevice(max_rows=0)) as (engine, log):
        engine.submit(greedy("alone", (1, 2), 5))
        log.wait_for_end("alone")
        engine.submit(greedy("short", (1, 2), 1))
        log.wait_for_end("short")
    last = log.by_sequence["alone"][-1]
    assert (last.finish, last.out_of_memory_retry_s) == (FinishReason.ERROR, 5.0)
    assert log.by_sequence["short"][-1].finish is FinishReason.LENGTH, "the engine goes on"


def test_a_prompt_that_finds_no_memory_waits_for_the_others() -> None:
    class NoRoomForPrompts(FakeSession):
        num_failures = 0

        def prefill(self, slot: int, token_ids: Any, past_tokens: int) -> Any:
            if slot > 0:
                self.num_failures += 1
                raise OutOfMemory
            return super().prefill(slot, token_ids, past_tokens)

    session = NoRoomForPrompts()
    many = [greedy(f"s{index}", (index + 1, 7, index), 12) for index in range(4)]
    with engine_on(session) as (engine, log):
        for sequence in many:
            engine.submit(sequence)
        log.wait_for_end(*(sequence.id for sequence in many))
    assert session.num_failures > 0
    assert [log.tokens(sequence.id) for sequence in many] == [expected_tokens_of(sequence) for sequence in many]
