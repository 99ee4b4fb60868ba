"""Log probabilities: the model's own, whatever the sampler makes of the logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine_support import Log, engine_on
from pilotlight.engine.engine import Engine
from pilotlight.engine.fake import FakeSession
from pilotlight.engine.logprobs import keep_asked, token_logprobs
from pilotlight.request import SamplingParams, Sequence, TokenLogprobs

ROWS = arrays(np.float32, 50, elements=st.integers(-40, 40).map(lambda n: n / 2))


@given(ROWS, st.integers(0, 49), st.integers(0, 60))
def test_they_are_the_softmax_of_the_logits(
    logits: np.ndarray[tuple[int], np.dtype[np.float32]], token: int, num_top: int
) -> None:
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    found = token_logprobs(logits, token, num_top)
    assert np.exp(found.logprob) == pytest.approx(probabilities[token], rel=1e-4)
    assert len(found.top) == min(num_top, 50)
    expected = sorted(range(50), key=lambda other: (-logits[other], other))[:num_top]
    assert [other for other, _ in found.top] == expected
    assert [np.exp(logprob) for _, logprob in found.top] == pytest.approx(list(probabilities[expected]), rel=1e-4)


def test_only_rows_that_ask_are_copied() -> None:
    logits = np.arange(6, dtype=np.float32).reshape(3, 2)
    first, second, third = keep_asked(logits, [None, 0, 2])
    assert first is None
    assert second is not None
    assert third is not None
    logits[:] = 0
    assert (second.tolist(), third.tolist()) == ([2, 3], [4, 5])


def events_of(engine: Engine, log: Log, sequence: Sequence) -> list[TokenLogprobs | None]:
    engine.submit(sequence)
    log.wait_for_end(sequence.id)
    return [event.logprobs for event in log.by_sequence[sequence.id]]


def test_the_engine_reports_them_before_bias_penalties_and_temperature() -> None:
    with engine_on(FakeSession(100)) as (engine, log):
        plain = SamplingParams(temperature=0.0)
        bent = SamplingParams(temperature=0.5, frequency_penalty=2.0, logit_bias={7: 100.0})
        unasked = events_of(engine, log, Sequence("unasked", (1, 2), 3, sampling=plain))
        asked = events_of(engine, log, Sequence("asked", (1, 2), 3, sampling=plain, num_top_logprobs=1))
        biased = events_of(engine, log, Sequence("biased", (1, 2), 3, sampling=bent, num_top_logprobs=1))
        assert unasked == [None] * 3
        likeliest = 10.0 - np.log(np.exp(10.0) + 99)
        for event, token_id in zip(asked, log.tokens("asked"), strict=True):
            assert event is not None
            assert event.logprob == pytest.approx(likeliest, abs=1e-5)
            assert [other for other, _ in event.top] == [token_id]
        assert log.tokens("biased") == [7, 7, 7]
        assert all(event is not None and event.logprob == pytest.approx(likeliest - 10, abs=1e-5) for event in biased)
