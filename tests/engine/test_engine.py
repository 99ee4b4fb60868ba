"""The engine's thread on the fake session: every sequence gets its own tokens, whatever comes and goes beside it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from engine_support import Steps, engine_on
from pilotlight.engine.engine import Engine
from pilotlight.engine.fake import FakeSession, next_token
from pilotlight.engine.policy import Policy
from pilotlight.request import FinishReason, SamplingParams, Sequence
from support import PATIENCE_S

VOCAB_SIZE = 100


def sequence(name: str, prompt: tuple[int, ...], max_new_tokens: int = 5) -> Sequence:
    return Sequence(name, prompt, max_new_tokens, sampling=SamplingParams(temperature=0.0))


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCAB_SIZE))
    return tokens[len(prompt) :]


def test_random_traffic_gives_every_sequence_its_own_tokens() -> None:
    rng = random.Random(4)
    session = FakeSession(VOCAB_SIZE, num_slots=3, max_context_tokens=40)
    with engine_on(session) as (engine, log):
        sequences, aborted = {}, set()
        for number in range(150):
            prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20)))
            name = f"s{number}"
            sequences[name] = sequence(name, prompt, rng.randint(1, 20))
            engine.submit(sequences[name])
            if rng.random() < 0.2:
                aborted.add(victim := rng.choice(list(sequences)))
                engine.abort(victim)
            if rng.random() < 0.3:
                log.wait_for_end(rng.choice(list(sequences)))
        log.wait_for_end(*sequences)
        for name, asked in sequences.items():
            last = log.by_sequence[name][-1]
            assert last.finish in ({FinishReason.LENGTH} | ({FinishReason.CANCELLED} if name in aborted else set()))
            tokens = log.tokens(name)
            assert tokens == expected(asked.prompt_ids, len(tokens))
            assert last.finish is FinishReason.CANCELLED or len(tokens) == asked.max_new_tokens


def test_a_failed_run_ends_only_the_sequences_that_were_in_it() -> None:
    class Failing(FakeSession):
        def prefill(self, slot, token_ids, past_tokens):  # type: ignore[no-untyped-def]
            if 99 in token_ids:
                raise RuntimeError("bad prompt")
            return super().prefill(slot, token_ids, past_tokens)

    with engine_on(Failing(VOCAB_SIZE, num_slots=2)) as (engine, log):
        engine.submit(sequence("good", (1, 2), 20))
        engine.submit(sequence("bad", (99,)))
        engine.submit(sequence("later", (3,), 20))
        log.wait_for_end("good", "bad", "later")
        assert log.by_sequence["bad"] == [log.by_sequence["bad"][-1]]
        assert log.by_sequence["bad"][-1].finish is FinishReason.ERROR
        assert log.by_sequence["bad"][-1].error == "RuntimeError: bad prompt"
        assert log.tokens("good") == expected((1, 2), 20)
        assert log.tokens("later") == expected((3,), 20)


def _abort_while(when: Callable[[Engine], bool]) -> None:
    steps = Steps()
    session = FakeSession(VOCAB_SIZE, num_slots=1, before_run=steps.take)
    with engine_on(session) as (engine, log):
        engine.submit(sequence("first", (1,) * 12, 6))
        engine.submit(sequence("second", (2,), 3))
        assert steps.waits.wait(PATIENCE_S)
        while not when(engine):
            steps.release()
            assert steps.waits.wait(PATIENCE_S)
        engine.abort("first")
        steps.release(100)
        log.wait_for_end("first", "second")
        assert log.by_sequence["first"][-1].finish is FinishReason.CANCELLED
        assert log.tokens("second") == expected((2,), 3)
        assert engine.signals().num_running == 0
        assert engine.signals().kv_used_bytes == 0


def test_abort_while_prefilling() -> None:
    _abort_while(lambda engine: 0 < engine.signals().num_prefill_backlog_tokens < 13)


def test_abort_while_decoding() -> None:
    _abort_while(lambda engine: engine.signals().num_prefill_backlog_tokens == 1 and engine.signals().num_running == 1)


def test_closing_cancels_what_runs_and_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    session = FakeSession(VOCAB_SIZE, num_slots=1, before_run=steps.take)
    with engine_on(session) as (engine, log):
        for name in ("a", "b"):
            engine.submit(sequence(name, (1,), 50))
        told, join = threading.Event(), engine._thread.join

        def tell_and_join() -> None:
            told.set()
            join()

        monkeypatch.setattr(engine._thread, "join", tell_and_join)
        closing = threading.Thread(target=engine.close)
        closing.start()
        assert told.wait(PATIENCE_S)
        steps.release(1000)
        closing.join()
        log.wait_for_end("a", "b")
        assert {log.by_sequence[name][-1].finish for name in "ab"} == {FinishReason.CANCELLED}


def test_a_cache_that_is_too_small_changes_no_tokens() -> None:
    """Preemption, with penalties and random draws, which depend on what was generated before it."""
    rng = random.Random(7)
    sampling = SamplingParams(temperature=1.3, repetition_penalty=1.4, frequency_penalty=0.5, seed=5)
    prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))) for _ in range(40)]
    asked = [Sequence(f"s{n}", prompt, rng.randint(30, 45), sampling=sampling) for n, prompt in enumerate(prompts)]
    for policy in (Policy(4, kv_budget_tokens=70), Policy(4, kv_budget_tokens=70, deterministic=True)):
        tokens = []
        for limits in (Policy(4), policy):
            with engine_on(FakeSession(VOCAB_SIZE, num_slots=4), limits) as (engine, log):
                for one in asked:
                    engine.submit(one)
                log.wait_for_end(*(one.id for one in asked))
                tokens.append({one.id: log.tokens(one.id) for one in asked})
                recomputed = sum(e.num_recomputed_tokens for events in log.by_sequence.values() for e in events)
                assert (engine.signals().num_preemptions > 0) == (recomputed > 0) == (limits is policy)
                assert engine.signals().kv_used_bytes == 0
        assert tokens[0] == tokens[1]


def test_an_answer_goes_on_where_another_engine_left_it() -> None:
    sampling = SamplingParams(temperature=1.3, repetition_penalty=1.4, frequency_penalty=0.5, seed=5)
    whole = Sequence("whole", (1, 2, 3), 20, sampling=sampling)
    for policy in (Policy(4), Policy(4, deterministic=True)):
        with engine_on(FakeSession(VOCAB_SIZE), policy) as (engine, log):
            engine.submit(whole)
            log.wait_for_end("whole")
            tokens = log.tokens("whole")
            for cut in (1, 2, 7, 19):
                rest = Sequence(f"cut {cut}", (1, 2, 3), 20, sampling=sampling, emitted_ids=tuple(tokens[:cut]))
                engine.submit(rest)
                log.wait_for_end(rest.id)
                assert log.tokens(rest.id) == tokens[cut:]
                events = log.by_sequence[rest.id]
                assert [event.prefill_started_at is None for event in events] == [False] + [True] * (19 - cut)
                assert events[-1].finish is FinishReason.LENGTH
