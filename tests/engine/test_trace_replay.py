"""The scheduler on the arrivals of real services, their lengths scaled to a small model and a small machine."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path

import pytest

from pilotlight.engine.policy import Policy
from simulation import Simulation, make

TRACES = next((p / "shared/data/traces" for p in Path(__file__).parents if (p / "shared/data/traces").is_dir()), None)
CODE, CHAT = "AzureLLMInferenceTrace_code.csv", "mooncake_conversation_trace.jsonl"
NUM_REQUESTS = 1500
NUM_SLOTS = 8
BUDGET_TOKENS = 1200
STEPS_PER_S = 25
"""Simulated: one step takes 40 ms."""

Arrival = tuple[float, int, int]
"""Seconds, prompt tokens, new tokens."""


def code_arrivals(path: Path) -> Iterator[Arrival]:
    """Yield the coding service's requests, prompts divided by eight, at a sixth of their rate."""
    with path.open() as file:
        rows = list(islice(csv.DictReader(file), NUM_REQUESTS))
    instants = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    for at, row in zip(instants, rows, strict=True):
        yield 6 * (at - instants[0]), 1 + int(row["ContextTokens"]) // 8, min(200, int(row["GeneratedTokens"]))


def chat_arrivals(path: Path) -> Iterator[Arrival]:
    """Yield the chat service's requests, prompts divided by 64 and answers by 8, at a third of their rate."""
    with path.open() as file:
        rows = [json.loads(line) for line in islice(file, NUM_REQUESTS)]
    for row in rows:
        prompt, answer = 1 + row["input_length"] // 64, 1 + row["output_length"] // 8
        yield 3 * row["timestamp"] / 1000, min(512, prompt), min(400, answer)


@pytest.mark.parametrize(("name", "read"), [(CODE, code_arrivals), (CHAT, chat_arrivals)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_everything_is_served_in_order_within_the_budget(name: str, read: object, deterministic: bool) -> None:
    if TRACES is None or not (TRACES / name).is_file():
        pytest.skip(f"the trace {name} is not on this machine; it belongs into shared/data/traces beside the checkout")
    assert callable(read)
    arrivals: list[Arrival] = list(read(TRACES / name))
    policy = Policy(max_chunk_tokens=128, kv_budget_tokens=BUDGET_TOKENS, deterministic=deterministic)
    simulation = Simulation(NUM_SLOTS, policy)
    arrived = 0
    while arrived < len(arrivals) or len(simulation.scheduler):
        while arrived < len(arrivals) and arrivals[arrived][0] * STEPS_PER_S <= simulation.num_steps:
            _, num_prompt, num_new = arrivals[arrived]
            simulation.scheduler.add(make(str(arrived), num_prompt, num_new))
            arrived += 1
        if not len(simulation.scheduler):
            simulation.num_steps = int(arrivals[arrived][0] * STEPS_PER_S) + 1
        simulation.step()
    assert len(simulation.finished) == len(arrivals)
    starts = list(dict.fromkeys(simulation.started))
    assert starts == [str(number) for number in range(len(arrivals))]
    assert simulation.scheduler.num_preemptions > 0
    assert simulation.scheduler.num_cached_tokens == 0
