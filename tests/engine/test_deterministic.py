"""``deterministic``: what a sequence gets is bit for bit the same in any company, in every precision."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pilotlight.artifact import Artifact
from pilotlight.engine.engine import Engine, Event
from pilotlight.engine.policy import Policy
from pilotlight.engine.session import OnnxSession
from pilotlight.request import SamplingParams, Sequence, TokenLogprobs

pytestmark = pytest.mark.model

CONTEXT = 256
VOCAB = range(10, 500)
DETERMINISTIC = Policy(max_chunk_tokens=32, deterministic=True)
Scored = tuple[int, TokenLogprobs | None]


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "w8a8", "int4", "hybrid"])
def session(request: pytest.FixtureRequest, demo_artifact: Callable[[str], Artifact]) -> OnnxSession:
    return OnnxSession(demo_artifact(request.param), num_slots=6, max_context_tokens=CONTEXT, num_threads=2)


def sequences() -> list[Sequence]:
    """Prompts whose last chunk would be of one token, of a few, of all, and one longer than two chunks."""
    rng = random.Random(8)
    lengths = (33, 5, 64, 1, 100, 40, 65, 17, 3, 50)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=4)
    return [
        Sequence(f"s{index}", tuple(rng.choices(VOCAB, k=length)), 24, frozenset(), sampling, num_top_logprobs=3)
        for index, length in enumerate(lengths)
    ]


def run(session: OnnxSession, asked: list[Sequence], policy: Policy, eagerness: float = 1.0) -> dict[str, list[Scored]]:
    """Return every token with its log probabilities. At eagerness 0 sequences come one after the other."""
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    engine = Engine(session, events.put, policy)
    engine.start()
    found: dict[str, list[Scored]] = {one.id: [] for one in asked}
    rng = random.Random(1)
    waiting, num_ended = list(asked), 0
    try:
        while num_ended < len(asked):
            while waiting and (num_ended == len(asked) - len(waiting) or rng.random() < eagerness):
                engine.submit(waiting.pop(0))
            for name, event in events.get(timeout=300):
                assert event.error is None
                if event.token_id is not None:
                    found[name].append((event.token_id, event.logprobs))
                num_ended += event.finish is not None
    finally:
        engine.close()
    return found


@pytest.fixture(scope="module")
def alone(session: OnnxSession) -> dict[str, list[Scored]]:
    return {one.id: run(session, [one], DETERMINISTIC)[one.id] for one in sequences()}


def test_alone_and_in_company(session: OnnxSession, alone: dict[str, list[Scored]]) -> None:
    asked = sequences()
    assert run(session, asked, DETERMINISTIC) == alone
    for seed in range(4):
        random.Random(seed).shuffle(asked)
        assert run(session, asked, DETERMINISTIC, eagerness=0.2) == alone


def test_after_making_room(session: OnnxSession, alone: dict[str, list[Scored]]) -> None:
    assert run(session, sequences(), replace(DETERMINISTIC, kv_budget_tokens=CONTEXT)) == alone


def test_after_a_hit_in_the_prefix_cache(session: OnnxSession, alone: dict[str, list[Scored]]) -> None:
    caching = replace(DETERMINISTIC, prefix_cache_bytes=1 << 30)
    twice = [replace(one, id=f"{one.id}{turn}") for turn in "ab" for one in sequences()]
    assert run(session, twice, caching) == {one.id: alone[one.id[:-1]] for one in twice}


def test_after_a_move(session: OnnxSession, alone: dict[str, list[Scored]]) -> None:
    for one in sequences()[:3]:
        emitted = tuple(token_id for token_id, _ in alone[one.id])
        for cut in (1, 9):
            rest = replace(one, id="rest", emitted_ids=emitted[:cut])
            assert run(session, [rest], DETERMINISTIC)["rest"] == alone[one.id][cut:]


def test_a_lone_padded_row_is_the_row_of_a_batch(session: OnnxSession) -> None:
    """The whole logits, and what the padding costs nobody: the slot beside it keeps its tokens."""
    prompts = [np.array(one.prompt_ids, np.int64) for one in (sequences()[0], sequences()[4])]
    for slot, prompt in enumerate(prompts):
        session.prefill(slot, prompt, 0)
    tokens, pasts = np.array([11, 12]), np.array([33, 100])
    both = session.decode(tokens, pasts).copy()
    lone = session.decode(np.array([11, 0]), pasts)[0].copy()
    assert np.array_equal(lone, both[0])
    assert np.array_equal(session.decode(tokens, pasts), both)


def test_a_hit_in_the_prefix_cache_changes_nothing_without_it_either(
    session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, so that neighbours change nothing either."""
    plain, caching = Policy(max_chunk_tokens=64), Policy(max_chunk_tokens=64, prefix_cache_bytes=1 << 30)
    rng = random.Random(10)
    shared = tuple(rng.choices(VOCAB, k=130))
    lengths = (1, 20, 64, 65)
    asked = [replace(sequences()[0], prompt_ids=(*shared, *rng.choices(VOCAB, k=length))) for length in lengths]
    asked = [replace(one, id=f"s{index}") for index, one in enumerate(asked)]
    missed = run(session, asked, plain, eagerness=0)
    loaded: list[int] = []
    load_prefix = session.load_prefix

    def load_and_count(slot: int, start: int, held: np.ndarray) -> None:
        loaded.append(start)
        load_prefix(slot, start, held)

    monkeypatch.setattr(session, "load_prefix", load_and_count)
    assert run(session, asked, caching, eagerness=0) == missed
    assert loaded == [0, 64] * 3


def test_without_it_a_hybrid_depends_on_company(demo_artifact: Callable[[str], Artifact]) -> None:
    """Otherwise the tests above would prove nothing."""
    session = OnnxSession(demo_artifact("hybrid"), num_slots=6, max_context_tokens=CONTEXT, num_threads=2)
    asked, policy = sequences(), Policy(max_chunk_tokens=32)
    assert run(session, asked, policy) != {one.id: run(session, [one], policy)[one.id] for one in asked}
