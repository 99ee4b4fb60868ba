"""Constrained decoding on the fake session: every answer is in its grammar, whatever the model would rather say."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_support import Log, engine_on
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.grammar import Grammars, GrammarState
from pilotlight.errors import EngineError
from pilotlight.request import FinishReason, SamplingParams, Sequence
from support import EOS_ID, VOCAB_SIZE, toy_tokenizer

STOP_IDS = frozenset({EOS_ID})
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["a", "bc"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grammar") / "tokenizer.json"
    toy_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="module")
def grammars(tokenizer_path: Path) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer_path, VOCAB_SIZE, [EOS_ID])
    yield grammars
    grammars.close()


def schema(of: object) -> str:
    return json.dumps({"grammars": [{"json_schema": of}]})


def lark(definition: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": definition}]})


def state_of(grammars: Grammars, grammar: str, emitted_ids: list[int]) -> GrammarState:
    return grammars.compile(grammar, emitted_ids, STOP_IDS).result(20)


def allowed(grammars: Grammars, state: GrammarState) -> list[int]:
    masks = grammars.find_banned([None, state])
    assert masks is not None
    masks.result(20)
    found: list[int] = np.flatnonzero(~state.banned).tolist()
    return found


def ids(text: str) -> list[int]:
    found: list[int] = toy_tokenizer().encode(text).ids
    return found


def text_of(token_ids: list[int]) -> str:
    text: str = toy_tokenizer().decode(token_ids)
    return text


def constrained(name: str, grammar: str, max_new_tokens: int = 60, **params: object) -> Sequence:
    sampling = SamplingParams(**{"temperature": 5.0, "seed": len(name), **params})  # type: ignore[arg-type]
    return Sequence(name, (1, 2, len(name)), max_new_tokens, STOP_IDS, sampling, grammar=grammar)


def test_a_state_is_what_its_tokens_make_it(grammars: Grammars) -> None:
    text = '{"x":4,"name":"bc"}'
    walked = state_of(grammars, schema({**POINT, "x-guidance": {"whitespace_flexible": False}}), [])
    for place, token_id in enumerate(ids(text)):
        again = state_of(grammars, schema({**POINT, "x-guidance": {"whitespace_flexible": False}}), ids(text[:place]))
        assert allowed(grammars, walked) == allowed(grammars, again)
        assert token_id in allowed(grammars, again)
        walked.commit(token_id)
    assert walked.complete
    assert walked.failure is None


def test_an_end_is_allowed_only_where_the_grammar_may_end(grammars: Grammars) -> None:
    grammar = lark("start: /ab*/")
    assert allowed(grammars, state_of(grammars, grammar, [])) == ids("a")
    assert allowed(grammars, state_of(grammars, grammar, ids("a"))) == sorted([*ids("b"), EOS_ID])


def test_a_token_outside_the_grammar_and_a_bad_grammar_are_failures(grammars: Grammars) -> None:
    with pytest.raises(EngineError, match="doesn't satisfy the grammar"):
        state_of(grammars, lark("start: /a/"), ids("b"))
    with pytest.raises(EngineError, match="cannot be used"):
        state_of(grammars, lark("nothing"), [])


def test_a_model_with_more_or_fewer_tokens_than_its_tokenizer(tokenizer_path: Path) -> None:
    for vocab_size in (VOCAB_SIZE - 2, VOCAB_SIZE + 70):
        grammars = Grammars(tokenizer_path, vocab_size, [EOS_ID] if vocab_size > EOS_ID else [])
        state = grammars.compile(lark("start: /a/"), [], STOP_IDS).result(20)
        assert allowed(grammars, state) == ids("a")
        assert len(state.banned) == vocab_size
        grammars.close()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=8), st.integers(0, 10**6))
def test_answers_of_a_batch_are_in_their_grammars(
    tokenizer_path: Path, wanted: list[tuple[int, bool]], seed: int
) -> None:
    """Constrained and free sequences beside each other, with a model whose logits mean nothing."""
    grammar = schema({**POINT, "x-guidance": {"whitespace_flexible": False}})
    with engine_on(FakeSession(VOCAB_SIZE, 3), grammars=Grammars(tokenizer_path, VOCAB_SIZE, [EOS_ID])) as (
        engine,
        log,
    ):
        for number, (temperature, held) in enumerate(wanted):
            params = SamplingParams(temperature=float(temperature), top_p=0.9, seed=seed + number)
            of = grammar if held else None
            engine.submit(Sequence(str(number), (number,), 40, STOP_IDS, params, grammar=of))
        log.wait_for_end(*(str(number) for number in range(len(wanted))))
        for number, (_, held) in enumerate(wanted):
            last = log.by_sequence[str(number)][-1]
            if held:
                answer = json.loads(text_of(log.tokens(str(number))))
                assert last.finish is FinishReason.STOP
                assert answer.keys() == POINT["properties"].keys()  # type: ignore[attr-defined]
                assert answer["name"] in ("a", "bc")
                assert 0 <= answer["x"] <= 99
            else:
                assert last.finish in (FinishReason.STOP, FinishReason.LENGTH)


def finished(log: Log, sequence: Sequence) -> tuple[str, FinishReason | None]:
    log.wait_for_end(sequence.id)
    return text_of(log.tokens(sequence.id)), log.by_sequence[sequence.id][-1].finish


def test_ends_bias_and_limits(tokenizer_path: Path) -> None:
    with engine_on(FakeSession(VOCAB_SIZE), grammars=Grammars(tokenizer_path, VOCAB_SIZE, [EOS_ID])) as (engine, log):
        cases = [
            constrained("a forced end needs no end token", lark('start: "yes"')),
            constrained("an end token ends", lark("start: /a+/"), logit_bias={EOS_ID: 100.0}),
            constrained("a limit cuts", lark("start: /[ab]{50}/"), max_new_tokens=7),
            constrained("a bias cannot break out", lark("start: /[ab]{5}/"), logit_bias={ids("c")[0]: 100.0}),
            constrained("penalties neither", lark("start: /aaaaa/"), repetition_penalty=9.0, frequency_penalty=2.0),
        ]
        for case in cases:
            engine.submit(case)
        forced, ended, cut, biased, penalised = [finished(log, case) for case in cases]
        assert forced == ("yes", FinishReason.STOP)
        assert log.tokens(cases[0].id)[-1] != EOS_ID
        assert (ended[0], ended[1], log.tokens(cases[1].id)[-1]) == ("a", FinishReason.STOP, EOS_ID)
        assert re.fullmatch("[ab]{7}", cut[0])
        assert cut[1] is FinishReason.LENGTH
        assert re.fullmatch("[ab]{5}", biased[0])
        assert penalised == ("aaaaa", FinishReason.STOP)


def test_a_sequence_goes_on_elsewhere_as_it_would_have_here(tokenizer_path: Path) -> None:
    whole = constrained("sequence", lark("start: /([ab]|[cd]{2}){30}/"))
    with engine_on(FakeSession(VOCAB_SIZE), grammars=Grammars(tokenizer_path, VOCAB_SIZE, [EOS_ID])) as (engine, log):
        engine.submit(whole)
        log.wait_for_end("sequence")
    for num_emitted in (1, 7, 20):
        emitted_ids = tuple(log.tokens("sequence")[:num_emitted])
        resumed = replace(whole, emitted_ids=emitted_ids)
        grammars = Grammars(tokenizer_path, VOCAB_SIZE, [EOS_ID])
        with engine_on(FakeSession(VOCAB_SIZE), grammars=grammars) as (engine, again):
            engine.submit(resumed)
            again.wait_for_end("sequence")
            assert [*emitted_ids, *again.tokens("sequence")] == log.tokens("sequence")
            assert again.by_sequence["sequence"][-1].finish is FinishReason.STOP


def test_a_grammar_that_fails_ends_its_own_sequence_only(tokenizer_path: Path) -> None:
    with engine_on(FakeSession(VOCAB_SIZE), grammars=Grammars(tokenizer_path, VOCAB_SIZE, [EOS_ID])) as (engine, log):
        engine.submit(constrained("good", lark("start: /[ab]{9}/")))
        engine.submit(constrained("bad", lark("start: nothing")))
        log.wait_for_end("good", "bad")
        assert log.by_sequence["good"][-1].finish is FinishReason.STOP
        bad = log.by_sequence["bad"][-1]
        assert bad.finish is FinishReason.ERROR
        assert bad.error is not None
        assert "unknown name" in bad.error


class SlowGrammars(Grammars):
    """Compiles when it is told to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, VOCAB_SIZE, [EOS_ID])
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Event()

    def _state(self, grammar: str, emitted_ids: object, stop_ids: frozenset[int]) -> GrammarState:
        self.asked.release()
        assert self.go_on.wait(300)
        return super()._state(grammar, (), stop_ids)


def test_a_sequence_whose_grammar_takes_long_delays_nobody_and_can_be_cancelled(tokenizer_path: Path) -> None:
    grammars = SlowGrammars(tokenizer_path)
    with engine_on(FakeSession(VOCAB_SIZE), grammars=grammars) as (engine, log):
        engine.submit(constrained("slow", lark("start: /[ab]{9}/")))
        engine.submit(constrained("later", lark("start: /[ab]{8}/")))
        assert grammars.asked.acquire(timeout=300)
        engine.submit(Sequence("free", (1,), 5))
        log.wait_for_end("free")
        assert engine.signals().num_waiting == 2
        engine.abort("slow")
        log.wait_for_end("slow")
        assert log.by_sequence["slow"][-1].finish is FinishReason.CANCELLED
        grammars.go_on.set()
        log.wait_for_end("later")
        assert len(log.tokens("later")) == 8
        assert engine.signals().num_waiting == 0


def test_closing_ends_what_is_still_compiled(tokenizer_path: Path) -> None:
    grammars = SlowGrammars(tokenizer_path)
    log = Log()
    with engine_on(FakeSession(VOCAB_SIZE), grammars=grammars, log=log) as (engine, _):
        engine.submit(constrained("slow", lark("start: /[ab]{9}/")))
        assert grammars.asked.acquire(timeout=300)
        threading.Timer(0, grammars.go_on.set).start()
    log.wait_for_end("slow")
    assert log.by_sequence["slow"][-1].finish in (FinishReason.CANCELLED, FinishReason.STOP)


def test_masks_are_worked_out_while_the_model_runs(tokenizer_path: Path) -> None:
    """The run waits for the mask to be begun, which would never happen if it came after the run."""
    begun = threading.Event()

    class Watched(Grammars):
        def find_banned(self, states: object) -> Future[None] | None:
            masks = super().find_banned(states)  # type: ignore[arg-type]
            if masks is not None:
                masks.add_done_callback(lambda _: begun.set())
            return masks

    def wait_for_mask() -> None:
        assert begun.wait(300)
        begun.clear()

    session = FakeSession(VOCAB_SIZE, before_run=wait_for_mask)
    with engine_on(session, grammars=Watched(tokenizer_path, VOCAB_SIZE, [EOS_ID])) as (engine, log):
        engine.submit(constrained("beside", lark("start: /[ab]{9}/")))
        log.wait_for_end("beside")
        assert re.fullmatch("[ab]{9}", text_of(log.tokens("beside")))


def test_nothing_is_loaded_before_the_first_grammar(tokenizer_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, pilotlight.host.inprocess, pilotlight.api.app; print('llguidance' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
