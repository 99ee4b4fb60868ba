"""Speculative decoding: which drafts there are, when they pay, and that nobody's tokens change by them."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_support import Log, Steps, engine_on
from pilotlight.artifact import Artifact
from pilotlight.config import FunctionSettings
from pilotlight.engine import speculation
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.grammar import Grammars
from pilotlight.engine.pace import FORGET_AFTER_STEPS, DecodeGraph, Pace
from pilotlight.engine.policy import Policy
from pilotlight.engine.scheduler import Active, Scheduler
from pilotlight.engine.session import Logits, OnnxSession
from pilotlight.engine.speculation import DRAFT_TOKENS, PromptLookup, drafts_that_pay
from pilotlight.request import FinishReason, SamplingParams, Sequence, Signals
from support import EOS_ID, PATIENCE_S, VOCAB_SIZE, toy_tokenizer

PLAIN, EAGER = Policy(max_chunk_tokens=8), Policy(max_chunk_tokens=8, speculates=True)
POEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


def copying(num_copied: int, source: list[int] = POEM) -> PromptLookup:
    """A sequence that has copied so many tokens of its prompt, the first three at once."""
    lookup = PromptLookup([*source, 0, *source[:3]])
    for token_id in source[3:num_copied]:
        lookup.push(token_id)
    return lookup


class TestLookup:
    @given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=30))
    def test_a_draft_is_what_followed_the_same_tokens_before(self, prompt: list[int], answer: list[int]) -> None:
        lookup = PromptLookup(prompt)
        for place, token_id in enumerate(answer):
            lookup.push(token_id)
            tokens = [*prompt, *answer[: place + 1]]
            drafted = list(lookup.draft(4))
            ends = [end for end in range(3, len(tokens)) if tokens[end - 3 : end] == tokens[-3:]]
            assert bool(drafted) == bool(ends) == bool(lookup.num_guessed)
            assert not drafted or any(tokens[end : end + 4] == drafted for end in ends)

    def test_a_copy_is_followed_although_the_same_words_came_later_again(self) -> None:
        lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 1, 2, 3, 4, 5])  # and so 6, 7, 8 come next
        lookup.push(6)
        assert lookup.draft(2) == (7, 8)

    def test_acceptance_grows_with_every_guess_that_comes_true_and_falls_with_others(self) -> None:
        likely = [copying(count).acceptance for count in range(4, 14)]
        assert likely == sorted(likely)
        assert likely[0] < 0.5 < likely[-1]
        lookup = copying(13)
        before = lookup.acceptance
        lookup.push(0)
        assert lookup.acceptance < before
        assert lookup.draft(1) == ()

    def test_any_token_id_can_be_looked_up(self) -> None:
        ids = [0, 0xD800, 0xDFFF, 0x10FFFF]
        assert PromptLookup([*ids, *ids[:3]]).draft(5) == (0x10FFFF, 0, 0xD800, 0xDFFF)


class TestWhatPays:
    def test_a_draft_is_as_long_as_its_acceptance_is_worth(self) -> None:
        def drafted(num_copied: int, token_cost: float) -> int:
            source = list(range(1, 90))
            drafts = drafts_that_pay([copying(num_copied, source)], [50], 1.0, lambda n: 1 + token_cost * (n - 1))
            return len(drafts[0]) if drafts else 0

        assert [drafted(count, 0.25) for count in (4, 10, 60)] == [0, 3, 15]
        assert [drafted(count, 0.05) for count in (4, 10, 60)] == [1, 7, 15]
        assert drafted(60, 1.0) == 0

    def test_a_draft_fits_its_room(self) -> None:
        found = [drafts_that_pay([copying(12)], [room], 1.0, lambda _: 1.0) for room in range(9)]
        assert [len(draft) for drafts in found for draft in drafts] == [1, 1, 3, 3, 3, 3, 7, 7]
        assert set(DRAFT_TOKENS) >= {1, 3, 7}

    def test_in_a_batch_all_gain_or_none_is_drafted(self) -> None:
        long = list(range(1, 200))

        def cost(num_tokens: int) -> float:
            return 1 + 0.05 * num_tokens

        both, one = [copying(90, long), copying(80, long)], [copying(90, long), PromptLookup([1, 2, 3])]
        assert len(drafts_that_pay(both, [99, 99], 1.3, cost)) == 2
        assert drafts_that_pay(one, [99, 99], 1.3, cost) == ()
        assert drafts_that_pay([copying(90, long), copying(4, long)], [99, 99], 1.3, cost) == ()

    def test_measured_times_replace_assumed_ones_and_are_forgotten(self) -> None:
        pace = Pace()
        assert pace.verify_s(DecodeGraph.MAIN, 4) == float("inf")
        pace.observe_step(1, 0.1)
        assert pace.verify_s(DecodeGraph.MAIN, 4) == pytest.approx(0.175)
        for seconds in (9.0, 0.5, 0.5):  # the first one also made what is made only once
            pace.observe_verify(DecodeGraph.MAIN, 4, seconds)
        assert pace.verify_s(DecodeGraph.MAIN, 4) == pytest.approx(0.5)
        assert pace.verify_s(DecodeGraph.BATCH, 4) == pytest.approx(0.175)
        for _ in range(FORGET_AFTER_STEPS + 1):
            pace.observe_step(1, 0.1)
        assert pace.verify_s(DecodeGraph.MAIN, 4) == pytest.approx(0.175)


class TestPlans:
    def plan(self, policy: Policy, num_rows: int = 1, max_new_tokens: int = 99, **pace: Any) -> list[int]:
        """Return the lengths of the drafts for rows that repeat themselves."""
        measured = Pace(**pace)
        measured.observe_step(num_rows, 0.01)
        for num_tokens in (2, 4, 8, 16):
            for _ in range(2):
                measured.observe_verify(DecodeGraph.MAIN, num_tokens, 0.001 * (2 + num_tokens / 4) / num_rows)
        scheduler = Scheduler(8, policy, measured)
        for number in range(num_rows):
            active = Active(Sequence(str(number), (1, 2, 3, 4) * 4, max_new_tokens, emitted_ids=(1, 2, 3, 4) * 5))
            active.num_cached = len(active.tokens) - 1
            active.lookup = PromptLookup(active.tokens[:16])
            for token_id in active.tokens[16:]:
                active.lookup.push(token_id)
            scheduler.running.append(active)
        return [len(draft) for draft in scheduler.schedule().drafts]

    def test_rows_that_repeat_themselves_are_drafted(self) -> None:
        assert self.plan(EAGER) == [3]
        assert self.plan(EAGER, num_rows=3) == [3] * 3

    def test_nothing_is_drafted_where_it_must_not_be(self) -> None:
        assert self.plan(PLAIN) == []
        assert self.plan(replace(EAGER, deterministic=True)) == []
        assert self.plan(EAGER, num_rows=5) == []

    def test_the_answers_limit_the_budget_and_the_patience_are_kept(self) -> None:
        assert self.plan(EAGER, max_new_tokens=23) == [1]
        assert self.plan(EAGER, max_new_tokens=21) == []
        assert self.plan(replace(EAGER, kv_budget_tokens=38)) == []
        assert self.plan(replace(EAGER, kv_budget_tokens=39)) == [3]
        assert self.plan(EAGER, max_inter_token_ms=2.7) == [1]
        assert self.plan(EAGER, max_inter_token_ms=1) == []

    def test_settings_turn_it_off(self) -> None:
        assert Policy.from_settings(FunctionSettings("a")).speculates
        assert not Policy.from_settings(FunctionSettings("a", speculation="off")).speculates
        assert not Policy.from_settings(FunctionSettings("a", deterministic=True)).speculates


class Forgetful(FakeSession):
    """Its next token depends on the last three, and a little on how many there are, so answers repeat, nearly."""

    def _logits(self, slots: list[list[int]]) -> Logits:
        logits = np.zeros((len(slots), self.vocab_size), np.float32)
        for row, tokens in enumerate(slots):
            ordinary = zlib.crc32(bytes(token_id % 7 for token_id in tokens[-3:]))
            logits[row, (ordinary + (len(tokens) % 11 == 0)) % self.vocab_size] = 9.0
            logits[row, ordinary % 5] += 6.0
        return logits


@pytest.fixture
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "MIN_GAIN", 0.0)


def outcome(asked: list[Sequence], policy: Policy, tokenizer: Path | None = None) -> tuple[Log, Signals]:
    session = Forgetful(VOCAB_SIZE, num_slots=2, max_context_tokens=120)
    grammars = None if tokenizer is None else Grammars(tokenizer, VOCAB_SIZE, [EOS_ID])
    with engine_on(session, policy, grammars) as (engine, log):
        for one in asked:
            engine.submit(one)
        log.wait_for_end(*(one.id for one in asked))
        signals = engine.signals()
        assert (signals.num_running, signals.kv_used_bytes) == (0, 0)
    assert not engine.holds_anything
    return log, signals


def what_came(log: Log) -> dict[str, list[Any]]:
    return {
        name: [(event.token_id, event.finish, event.logprobs, event.prefill_started_at is None) for event in events]
        for name, events in log.by_sequence.items()
    }


SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=0.9, top_p=0.95, seed=3),
    "penalised": SamplingParams(temperature=0.5, repetition_penalty=1.05, frequency_penalty=0.1, seed=4),
    "biased": SamplingParams(temperature=0.0, logit_bias={5: 2.0}),
}


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("budget", [None, 150])
@pytest.mark.usefixtures("everything_pays")
def test_answers_are_those_without_drafts(name: str, budget: int | None) -> None:
    """With log probabilities, random lengths, ends in the middle of a draft, and sequences that have to make room."""
    rng = random.Random(5)
    prompts = [tuple(rng.choices(range(7), k=rng.randint(1, 30))) for _ in range(25)]
    asked = [
        Sequence(f"s{n}", prompt, rng.randint(1, 90), frozenset({200 + n % 7, n % 3}), SAMPLING[name], (None, 2)[n % 2])
        for n, prompt in enumerate(prompts)
    ]
    plain, _ = outcome(asked, replace(PLAIN, kv_budget_tokens=budget))
    eager, signals = outcome(asked, replace(EAGER, kv_budget_tokens=budget))
    assert what_came(eager) == what_came(plain)
    assert 0 < signals.num_accepted_tokens < signals.num_drafted_tokens
    assert {events[-1].finish for events in eager.by_sequence.values()} == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.usefixtures("everything_pays")
def test_answers_stay_in_their_grammar(tmp_path: Path) -> None:
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    grammar = json.dumps({"grammars": [{"lark_grammar": 'start: ("abcde" /[fg]/ "hijkl"){7}'}]})
    asked = [
        Sequence(f"s{n}", (n,), 100, frozenset({EOS_ID}), SamplingParams(temperature=3.0, seed=n), grammar=grammar)
        for n in range(6)
    ]
    plain, _ = outcome(asked, PLAIN, tmp_path / "tokenizer.json")
    eager, signals = outcome(asked, EAGER, tmp_path / "tokenizer.json")
    assert what_came(eager) == what_came(plain)
    assert signals.num_accepted_tokens > 20


@pytest.mark.usefixtures("everything_pays")
def test_a_failed_run_ends_its_sequence_with_the_tokens_before_it() -> None:
    class Failing(Forgetful):
        def verify(self, slot, token_ids, past_tokens, graph=DecodeGraph.MAIN):  # type: ignore[no-untyped-def]
            raise RuntimeError("no memory")

    asked = Sequence("a", (1, 2, 3), 90, sampling=SAMPLING["greedy"])
    plain, _ = outcome([asked], PLAIN)
    with engine_on(Failing(VOCAB_SIZE, max_context_tokens=120), EAGER) as (engine, log):
        engine.submit(asked)
        log.wait_for_end("a")
    tokens = log.tokens("a")
    assert log.by_sequence["a"][-1].finish is FinishReason.ERROR
    assert 0 < len(tokens) < 90
    assert tokens == plain.tokens("a")[: len(tokens)]


@pytest.mark.usefixtures("everything_pays")
def test_an_aborted_sequence_ends_once() -> None:
    steps = Steps(40)
    session = Forgetful(VOCAB_SIZE, max_context_tokens=4000, before_run=steps.take)
    with engine_on(session, EAGER) as (engine, log):
        for number in range(12):
            engine.submit(Sequence(f"s{number}", (1, 2, 3), 3900, sampling=SAMPLING["greedy"]))
        assert steps.waits.wait(PATIENCE_S)
        for number in range(12):
            engine.abort(f"s{number}")
        steps.release(1000)
        log.wait_for_end(*(f"s{number}" for number in range(12)))  # which refuses events behind the last one
        assert {events[-1].finish for events in log.by_sequence.values()} == {FinishReason.CANCELLED}


@pytest.mark.model
@pytest.mark.parametrize("precision", ["fp32", "hybrid"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_models_answers_are_those_without_drafts(
    precision: str, temperature: float, demo_artifact: Callable[[str], Artifact]
) -> None:
    """Behind prompts that hold the answer already; a rejected draft leaves nothing in the cache that is read."""
    session = OnnxSession(demo_artifact(precision), num_slots=3, max_context_tokens=512, num_threads=1)
    rng = random.Random(6)
    sampling = SamplingParams(temperature=temperature, seed=9)
    asked = []
    for number in range(6):
        words = rng.choices(range(10, 500), k=40)
        asked.append(Sequence(f"s{number}", tuple(words * 3 + words[:20]), 150, sampling=sampling))
    found: dict[bool, dict[str, list[int]]] = {}
    for policy in (Policy(), Policy(speculates=True)):
        with engine_on(session, policy) as (engine, log):  # type: ignore[arg-type]
            for one in asked:
                engine.submit(one)
                log.wait_for_end(one.id)
            found[policy.speculates] = {one.id: log.tokens(one.id) for one in asked}
            signals = engine.signals()
    assert found[True] == found[False]
    assert signals.num_accepted_tokens > 0


@pytest.mark.model
@pytest.mark.parametrize("precision", ["fp32", "hybrid"])
def test_a_verified_run_gives_the_logits_of_single_steps(
    precision: str, demo_artifact: Callable[[str], Artifact]
) -> None:
    session = OnnxSession(demo_artifact(precision), num_slots=3, max_context_tokens=128, num_threads=1)
    prompt, tokens = np.arange(30, 90), np.array([7, 40, 300, 12, 9, 80, 200, 3])
    for slot in range(3):
        session.prefill(slot, prompt, 0)
    single = [session.decode(tokens[at : at + 1], np.array([60 + at]))[0].copy() for at in range(8)]
    session.prefill(2, np.arange(100, 112), 0)  # another prompt is read between
    wrong = np.array([7, 40, 11, 11, 11, 11, 11, 11])
    np.testing.assert_allclose(session.verify(1, wrong, 60)[:2], single[:2], atol=1e-4)
    np.testing.assert_allclose(session.verify(1, tokens[2:6], 62), single[2:6], atol=1e-4)
    again = session.decode(np.array([5, tokens[6]]), np.array([60, 66]))[1]
    np.testing.assert_allclose(again, single[6], atol=1e-4)
