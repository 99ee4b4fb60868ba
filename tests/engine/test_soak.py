"""Mixed traffic on the demo model: memory stays flat, slots come free, and tokens are those of solo runs.

``make soak`` sends as many requests as the busiest public chat trace has in an hour (Mooncake: 12,031).
"""

from __future__ import annotations

import gc
import os
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.request import FinishReason, SamplingParams, Sequence

pytestmark = pytest.mark.model

CONTEXT = 512
NUM_OPEN = 20
"""More than there are slots, so that a queue forms."""
AN_HOUR = 12_000
COMPARED_EVERY = 40
MAX_GROWTH_BYTES = 24 << 20

POLICIES = {
    "default": Policy(prefix_cache_bytes=4 << 20),
    "deterministic, in a tight cache": Policy(
        max_chunk_tokens=64, kv_budget_tokens=CONTEXT, deterministic=True, prefix_cache_bytes=4 << 20
    ),
}


@pytest.fixture(scope="module")
def session(demo_fp32: Artifact) -> OnnxSession:
    return OnnxSession(demo_fp32, num_slots=8, max_context_tokens=CONTEXT, num_threads=len(os.sched_getaffinity(0)))


def traffic(count: int, seed: int) -> Iterator[Sequence]:
    """Yield prompts of three tenants, two fifths of them behind a shared beginning, with all kinds of sampling."""
    rng = random.Random(seed)
    beginnings = [rng.choices(range(3, 500), k=length) for length in (70, 150, 220)]
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.2, top_p=0.9),
        SamplingParams(top_k=20, repetition_penalty=1.2, presence_penalty=0.3),
        SamplingParams(min_p=0.05, logit_bias={5: 2.0}),
    ]
    for number in range(count):
        begun = rng.choice(beginnings) if rng.random() < 0.4 else []
        own = rng.choices(range(3, 500), k=min(190, max(1, round(rng.lognormvariate(3.5, 1)))))
        yield Sequence(
            f"s{number}",
            (*begun, *own),
            min(100, max(1, round(rng.lognormvariate(3.2, 0.8)))),
            sampling=replace(rng.choice(kinds), seed=number),
            tenant=rng.choice("abc"),
        )


@dataclass
class Ended:
    """What became of the sequences that are compared, and the memory on the way."""

    compared: dict[str, Sequence] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finishes: dict[str, FinishReason] = field(default_factory=dict)
    resident_bytes: list[int] = field(default_factory=list)


def send(engine: Engine, events: queue.SimpleQueue[list[Event]], asked: Iterator[Sequence], count: int) -> Ended:
    """Keep some requests open, abort one in twenty, and note every fortieth."""
    ended, rng = Ended(), random.Random(1)
    num_open = num_sent = num_ended = 0
    while num_ended < count:
        while num_open < NUM_OPEN and (one := next(asked, None)) is not None:
            if num_sent % COMPARED_EVERY == 0:
                ended.compared[one.id], ended.tokens[one.id] = one, []
            engine.submit(one)
            num_open, num_sent = num_open + 1, num_sent + 1
            if rng.random() < 0.05:
                engine.abort(f"s{num_sent - rng.randint(1, NUM_OPEN)}")
        for name, event in events.get(timeout=300):
            assert event.error is None
            if name in ended.compared and event.token_id is not None:
                ended.tokens[name].append(event.token_id)
            if event.finish is not None:
                num_open, num_ended = num_open - 1, num_ended + 1
                if name in ended.compared:
                    ended.finishes[name] = event.finish
                if num_ended % max(1, count // 10) == 0:
                    ended.resident_bytes.append(resident_bytes())
    return ended


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(session: OnnxSession, policy: Policy, count: int) -> Ended:
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(session, events.put, policy)
    engine.start()
    try:
        ended = send(engine, events, traffic(count, seed=count), count)
        signals = engine.signals()
    finally:
        engine.close()
    assert (signals.num_waiting, signals.num_running, signals.kv_used_bytes) == (0, 0, 0)
    assert signals.prefix_cache_bytes <= policy.prefix_cache_bytes
    assert signals.num_prefix_hit_tokens > 0
    assert (signals.num_preemptions > 0) == (policy.kv_budget_tokens is not None)
    assert not engine.holds_anything
    return ended


def assert_solo_runs_give_the_same(session: OnnxSession, policy: Policy, ended: Ended) -> None:
    alone = Policy(max_chunk_tokens=policy.max_chunk_tokens, deterministic=policy.deterministic)
    for name, one in ended.compared.items():
        events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        engine = Engine(session, events.put, alone)
        engine.start()
        try:
            engine.submit(one)
            tokens: list[int] = []
            while len(tokens) < one.max_new_tokens:
                tokens += [event.token_id for _, event in events.get(timeout=300) if event.token_id is not None]
        finally:
            engine.close()
        assert ended.tokens[name] == tokens[: len(ended.tokens[name])]
        assert ended.finishes[name] is FinishReason.CANCELLED or len(ended.tokens[name]) == len(tokens)


@pytest.mark.parametrize("name", POLICIES)
def test_mixed_traffic(session: OnnxSession, name: str) -> None:
    ended = soak(session, POLICIES[name], 160)
    assert FinishReason.LENGTH in ended.finishes.values()
    assert_solo_runs_give_the_same(session, POLICIES[name], ended)


@pytest.mark.soak
@pytest.mark.parametrize("name", POLICIES)
def test_an_hour_of_mixed_traffic(session: OnnxSession, name: str) -> None:
    ended = soak(session, POLICIES[name], AN_HOUR)
    print(f"{name}: resident MB by tenths: {[size >> 20 for size in ended.resident_bytes]}")
    assert max(ended.resident_bytes[2:]) - ended.resident_bytes[1] <= MAX_GROWTH_BYTES
    assert_solo_runs_give_the_same(session, POLICIES[name], ended)
