"""The device's session on the CPU provider: what differs on a GPU is the provider, and the address space."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine_support import generate
from pilotlight.artifact import Artifact
from pilotlight.engine.device import BUCKETS, Device, DeviceSession, bucket_of
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.errors import ArtifactError, ConfigError, OutOfMemory
from pilotlight.request import SamplingParams, Sequence

CONTEXT = 256
DEMO_PRECISIONS = ("fp16", "int4", "int4-fp16")
NUM_SLOTS = 6
CPU = Device("cpu", num_threads=1)


@pytest.fixture(scope="module")
def there(demo_fp32: Artifact) -> DeviceSession:
    return DeviceSession(demo_fp32, NUM_SLOTS, CONTEXT, CPU)


@pytest.fixture(scope="module")
def here(demo_fp32: Artifact) -> OnnxSession:
    return OnnxSession(demo_fp32, NUM_SLOTS, CONTEXT, num_threads=1)


def prompts(count: int, vocab_size: int, seed: int = 1) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.choices(range(3, vocab_size), k=rng.randint(1, 120))) for _ in range(count)]


@pytest.mark.model
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.3, top_k=20, seed=4),
        SamplingParams(temperature=1.1, top_k=40, top_p=0.9, min_p=0.02, seed=5),
        SamplingParams(temperature=1.0, seed=6),
        SamplingParams(temperature=0.9, top_p=0.8, repetition_penalty=1.2, seed=7),
        SamplingParams(temperature=0.0, logit_bias={5: 3.0, 9: -100.0}),
    ],
    ids=["greedy", "top-k", "top-k, top-p and min-p", "plain", "penalties", "bias"],
)
def test_tokens_are_those_of_the_host(there: DeviceSession, here: OnnxSession, sampling: SamplingParams) -> None:
    vocab_size = 300
    many = [
        Sequence(f"s{index}", prompt, 20, frozenset(), sampling)
        for index, prompt in enumerate(prompts(10, vocab_size, seed=sampling.seed))
    ]
    joins = [random.Random(2).randrange(9) for _ in many]
    assert generate(there, many, joins) == generate(here, many, joins)


@pytest.mark.model
def test_sixty_four_streams_are_what_each_is_alone(
    demo_fp32: Artifact, here: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [
        Sequence(f"s{index}", prompt[:4], 100, frozenset(), SamplingParams(temperature=0.0))
        for index, prompt in enumerate(prompts(70, 300))
    ]
    session = DeviceSession(demo_fp32, 64, 128, CPU)
    largest: list[int] = []
    decode = session.decode

    def noting(token_ids: Any, *rest: Any) -> Any:
        largest.append(len(token_ids))
        return decode(token_ids, *rest)

    monkeypatch.setattr(session, "decode", noting)
    assert generate(session, many, policy=Policy(max_chunk_tokens=64)) == generate(here, many)
    assert max(largest) == 64


@pytest.mark.model
def test_mixed_ways_of_sampling_in_one_step(there: DeviceSession, here: OnnxSession) -> None:
    ways = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_k=5, seed=3),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.0, frequency_penalty=0.5),
    ]
    many = [Sequence(f"s{i}", prompt, 25, frozenset(), ways[i % 4]) for i, prompt in enumerate(prompts(12, 300))]
    asked = [replace(sequence, num_top_logprobs=3) for sequence in many]
    assert generate(there, asked) == generate(here, many)


@pytest.mark.model
@pytest.mark.parametrize("precision", DEMO_PRECISIONS)
def test_tokens_are_the_same_in_other_precisions(demo_artifact: Callable[[str], Artifact], precision: str) -> None:
    """Each alone: with quantized weights, rows beside it may change the last bits, and padding is such a row."""
    artifact = demo_artifact(precision)
    assert (artifact.manifest.kv.dtype == "float16") == precision.endswith("fp16")
    here, there = OnnxSession(artifact, 1, CONTEXT, 1), DeviceSession(artifact, 1, CONTEXT, CPU)
    for prompt in prompts(4, 300):
        one = [Sequence("one", prompt, 30, frozenset(), SamplingParams(temperature=0.0))]
        assert generate(there, one) == generate(here, one)


@pytest.mark.model
def test_a_cache_that_is_too_small_moves_slots_and_changes_no_tokens(there: DeviceSession) -> None:
    many = [
        Sequence(f"s{i}", prompt, 40, frozenset(), SamplingParams(temperature=0.0))
        for i, prompt in enumerate(prompts(16, 300))
    ]
    tight = Policy(max_chunk_tokens=64, kv_budget_tokens=CONTEXT + 60)
    assert generate(there, many, policy=tight) == generate(there, many)


@pytest.mark.model
def test_moving_a_slot_is_a_copy_on_the_device(there: DeviceSession) -> None:
    prompt = np.array(prompts(1, 300)[0] * 3, np.int64)[:90]
    there.prefill(3, prompt, 0)
    there.move(3, 0, len(prompt))
    moved = there.decode(np.array([7]), np.array([90])).host([0])
    there.prefill(0, prompt, 0)
    assert np.array_equal(there.decode(np.array([7]), np.array([90])).host([0]), moved)


@pytest.mark.model
def test_padding_leaves_what_a_prompt_has_read(there: DeviceSession, here: OnnxSession) -> None:
    """Five rows run on a bucket of six, whose last one is the slot that is being read."""
    assert bucket_of(5, NUM_SLOTS) == NUM_SLOTS
    rows = prompts(6, 300)
    long = np.array(rows[5] * 9, np.int64)[: CONTEXT - 1]
    found = []
    for session in (there, here):
        for slot, prompt in enumerate(rows[:5]):
            session.prefill(slot, np.array(prompt, np.int64), 0)
        for past in range(0, len(long), 51):
            last = session.prefill(5, long[past : past + 51], past)
            session.decode(np.full(5, 4), np.array([len(prompt) for prompt in rows[:5]]))
        found.append(last[0].copy())
    assert np.array_equal(found[0], found[1])


@pytest.mark.model
def test_drafted_tokens_are_verified_in_one_run(there: DeviceSession, here: OnnxSession) -> None:
    prompt, drafted = np.array(prompts(1, 300)[0], np.int64), np.array([5, 9, 5, 9, 5, 9, 5, 9], np.int64)
    for session in (there, here):
        session.prefill(1, prompt, 0)
    found = there.verify(1, drafted, len(prompt))
    assert found.shape[0] == len(drafted)
    assert np.array_equal(found.host([*range(8)]), here.verify(1, drafted, len(prompt)))
    assert found[3:4].likeliest(1)[1][0, 0] == here.verify(1, drafted, len(prompt))[3].argmax()


@pytest.mark.model
def test_memory_is_exactly_what_the_cache_needs(there: DeviceSession, here: OnnxSession) -> None:
    assert there.kv_bytes_per_token == here.kv_bytes_per_token
    assert there.kv_reserved_bytes == NUM_SLOTS * CONTEXT * here.kv_bytes_per_token


@pytest.mark.model
def test_of_a_greedy_step_one_number_a_row_crosses(there: DeviceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed: list[tuple[int, ...]] = []
    run = there._picker._run

    def noting(*args: Any, **inputs: Any) -> list[Any]:
        outputs = run(*args, **inputs)
        crossed.extend(output.shape for output in outputs)
        return outputs

    monkeypatch.setattr(there._picker, "_run", noting)
    many = [
        Sequence(f"s{i}", prompt, 12, frozenset(), SamplingParams(temperature=0.0))
        for i, prompt in enumerate(prompts(5, 300))
    ]
    generate(there, many)
    assert crossed
    assert {shape[1] for shape in crossed} == {1}


@pytest.mark.parametrize(
    ("num_rows", "num_slots", "bucket"),
    [(1, 64, 1), (3, 64, 4), (9, 64, 16), (33, 64, 48), (64, 64, 64), (65, 200, 128), (5, 6, 6), (1, 1, 1)],
)
def test_steps_run_on_few_batch_sizes(num_rows: int, num_slots: int, bucket: int) -> None:
    assert bucket_of(num_rows, num_slots) == bucket
    assert len({bucket_of(rows, 64) for rows in range(1, 65)}) == len(BUCKETS)


@pytest.mark.model
@pytest.mark.parametrize(
    "message",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:359 BFCArena::AllocateRawInternal "
        "Failed to allocate memory for requested buffer of size 19134",
        "CUDA failure 2: out of memory ; GPU=0",
        "std::bad_alloc",
    ],
)
def test_a_failed_allocation_has_an_error_of_its_own(
    there: DeviceSession, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    class Full:
        def run_with_iobinding(self, *_: object) -> None:
            raise RuntimeError(message)

        def io_binding(self) -> Any:
            return model.io_binding()

    model = there._model
    monkeypatch.setattr(there, "_model", Full())
    with pytest.raises(OutOfMemory):
        there.decode(np.array([1]), np.array([3]))


@pytest.mark.model
def test_what_cannot_run_on_a_gpu_is_refused(
    demo_fp32: Artifact, demo_hybrid: Artifact, demo_artifact: Callable[[str], Artifact]
) -> None:
    with pytest.raises(ArtifactError, match="has a float32 cache; a GPU wants float16"):
        DeviceSession(demo_fp32, 1, CONTEXT, Device("cuda"))
    with pytest.raises(ArtifactError, match="has a int8 cache"):
        DeviceSession(demo_hybrid, 1, CONTEXT, CPU)
    with pytest.raises(ConfigError, match="has no CUDA"):
        DeviceSession(demo_artifact("fp16"), 1, CONTEXT, Device("cuda"))


def test_the_provider_is_asked_for_bounded_memory_and_graphs() -> None:
    cuda = Device("cuda", 1, arena_bytes=5_000_000)
    assert cuda.place == ("cuda", 1)
    ((name, options),) = cuda.providers(captures=True)
    assert name == "CUDAExecutionProvider"
    assert options == {
        "device_id": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "5000000",
        "enable_cuda_graph": "1",
    }
    ((name, options), fallback) = cuda.providers(captures=False)
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert "enable_cuda_graph" not in options
