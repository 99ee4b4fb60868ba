"""The real session on the demo model: batches equal solo runs, and greedy text equals transformers'."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from corpus import TASKS, held_out_turns, training_turns
from engine_support import generate
from pilotlight.artifact import Artifact
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.request import SamplingParams, Sequence
from support import DEMO_MODEL

pytestmark = pytest.mark.model

CONTEXT = 512
TURN_END = 2
NUM_THREADS = len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def session(demo_fp32: Artifact) -> OnnxSession:
    return OnnxSession(demo_fp32, num_slots=8, max_context_tokens=CONTEXT, num_threads=NUM_THREADS)


@pytest.fixture(scope="module")
def prompts(demo_fp32: Artifact) -> list[list[int]]:
    """Twenty-four prompts: each task's held-out questions, and conversations which nearly fill the context."""
    tokenizer = Tokenizer.from_file(str(demo_fp32.tokenizer_path))
    texts = [chat(turn.question) for task in TASKS for turn in held_out_turns(task, 4)]
    ids: list[list[int]] = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    turns = training_turns(random.Random(3))
    for length in (60, 120, 200, 300, 400, 480, 500, 511):
        conversation = "".join(f"{chat(turn.question)}{turn.answer}<|im_end|>\n" for turn in islice(turns, 40))
        ids.append(tokenizer.encode(conversation, add_special_tokens=False).ids[:length])
    return ids


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def greedy(name: str, prompt: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> Sequence:
    room = CONTEXT - len(prompt)
    return Sequence(name, tuple(prompt), min(max_new_tokens, room), stop_ids, SamplingParams(temperature=0.0))


def test_eight_together_are_what_each_is_alone(session: OnnxSession, prompts: list[list[int]]) -> None:
    chosen = [greedy(f"p{index}", prompt, 40, frozenset()) for index, prompt in enumerate(prompts[::3])]
    assert len(chosen) == 8
    alone = {sequence.id: generate(session, [sequence])[sequence.id] for sequence in chosen}
    assert generate(session, chosen) == alone
    rng = random.Random(5)
    for _ in range(3):
        rng.shuffle(chosen)
        assert generate(session, chosen, [rng.randrange(30) for _ in chosen]) == alone


def test_sequences_that_leave_at_different_times_do_not_disturb_the_others(
    session: OnnxSession, prompts: list[list[int]]
) -> None:
    rng = random.Random(6)
    many = [greedy(f"p{index}", prompt, rng.randint(1, 50), frozenset()) for index, prompt in enumerate(prompts * 2)]
    together = generate(session, many, [rng.randrange(12) for _ in many])
    for sequence in rng.sample(many, 12):
        assert together[sequence.id] == generate(session, [sequence])[sequence.id]


def test_a_seeded_sequence_draws_the_same_tokens_in_any_company(session: OnnxSession, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=11)
    seeded = Sequence("seeded", tuple(prompts[4]), 60, frozenset(), sampling)
    alone = generate(session, [seeded])["seeded"]
    company = [greedy(f"p{index}", prompt, 50, frozenset()) for index, prompt in enumerate(prompts[:10])]
    assert generate(session, [*company[:5], seeded, *company[5:]], [3] * 11)["seeded"] == alone


def test_greedy_tokens_equal_transformers(session: OnnxSession, prompts: list[list[int]]) -> None:
    """Until the end token, and for the long ones on to the end of the context."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    torch.set_num_threads(1)  # threads that wait for each other by spinning are slow on busy cores
    model.eval()
    assert len(prompts) >= 20
    for index, prompt in enumerate(prompts):
        stop_ids = frozenset({TURN_END}) if index < 16 else frozenset()
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = TURN_END if stop_ids else None
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=CONTEXT, do_sample=False)
        expected = whole[0, len(prompt) :].tolist()
        name = f"p{index}"
        assert generate(session, [greedy(name, prompt, CONTEXT, stop_ids)])[name] == expected


def test_moving_a_slot_changes_nothing(session: OnnxSession, prompts: list[list[int]]) -> None:
    prompt = np.array(prompts[20], np.int64)
    session.prefill(2, prompt[:100], 0)
    session.move(2, 0, 100)
    moved = session.decode(prompt[100:101], np.array([100]))[0].copy()
    session.prefill(0, prompt[:100], 0)
    assert np.array_equal(session.decode(prompt[100:101], np.array([100]))[0], moved)


def test_a_cache_that_is_too_small_changes_no_tokens(session: OnnxSession, prompts: list[list[int]]) -> None:
    tight = Policy(max_chunk_tokens=64, kv_budget_tokens=CONTEXT + 100)
    many = [greedy(f"p{index}", prompt, 60, frozenset()) for index, prompt in enumerate(prompts[8:])]
    assert generate(session, many, policy=tight) == generate(session, many)


def test_an_answer_goes_on_where_another_engine_left_it(session: OnnxSession, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(temperature=1.2, top_p=0.9, repetition_penalty=1.1, seed=3)
    whole = Sequence("whole", tuple(prompts[3]), 50, frozenset(), sampling)
    tokens = generate(session, [whole])["whole"]
    for cut in (1, 17, 49):
        rest = replace(whole, id="rest", emitted_ids=tuple(tokens[:cut]))
        assert generate(session, [rest])["rest"] == tokens[cut:]


def test_threads_stop_with_the_run(demo_fp32: Artifact) -> None:
    """They would spin for 24 ms of processor time, on a core that the next graph's threads need."""
    session = OnnxSession(demo_fp32, 1, CONTEXT, num_threads=2)
    spent_s = []
    for _ in range(5):
        session.prefill(0, np.arange(10, 90, dtype=np.int64), 0)
        before_s = time.process_time()
        threading.Event().wait(0.05)
        spent_s.append(time.process_time() - before_s)
    assert min(spent_s) < 0.005
