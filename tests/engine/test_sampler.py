"""The sampler against plain references, and each row's independence of its neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pilotlight.engine import draw as drawing
from pilotlight.engine.sampler import SamplingRow, sample, uniform_at
from pilotlight.request import SamplingParams

VOCAB = 50


def logits_of(rows: int, seed: int = 0, vocab: int = VOCAB) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, (rows, vocab)).astype(np.float32)


def draw(logits: NDArray[np.float32], params: SamplingParams, count: int) -> NDArray[np.int64]:
    row = SamplingRow(params, [1, 2], logits.shape[0])
    return np.array([sample(logits[None].copy(), [row])[0] for _ in range(count)])


def reference(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The distribution by the book: temperature, top-k, softmax, top-p, min-p, softmax again."""
    order = np.argsort(-logits, kind="stable")
    kept = order[: params.top_k or None]
    weights = np.exp((logits[kept] - logits.max()) / params.temperature)
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), params.top_p)) + 1
    kept, weights = kept[:count], weights[:count]
    above = weights >= params.min_p * weights.max()
    kept, weights = kept[above], weights[above]
    distribution = np.zeros(len(logits))
    distribution[kept] = weights / weights.sum()
    return distribution


def test_greedy_takes_the_largest() -> None:
    logits = logits_of(5)
    rows = [SamplingRow(SamplingParams(temperature=0.0), [], VOCAB) for _ in range(5)]
    assert sample(logits.copy(), rows).tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(top_k=5, seed=3),
        SamplingParams(top_p=0.7, seed=4),
        SamplingParams(min_p=0.1, seed=5),
        SamplingParams(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05, seed=6),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    logits = logits_of(1)[0]
    count = 4000
    expected = reference(logits, params)
    observed = np.bincount(draw(logits, params, count), minlength=VOCAB)
    assert not observed[expected == 0].any()
    sigma = np.sqrt(expected * (1 - expected) * count)
    assert np.all(np.abs(observed - expected * count) <= 5 * sigma + 1)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_only_what_the_filters_leave_is_drawn(data: st.DataObject) -> None:
    params = SamplingParams(
        temperature=data.draw(st.floats(0.1, 5)),
        top_k=data.draw(st.integers(0, 60)),
        top_p=data.draw(st.floats(0.01, 1)),
        min_p=data.draw(st.floats(0, 0.5)),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    logits = logits_of(1, data.draw(st.integers(0, 99)))[0]
    assert reference(logits, params)[draw(logits, params, 20)].min() > 0


@given(st.integers(0, 999), st.integers(1, 3000), st.sampled_from([1, 3, 300]), st.booleans())
def test_the_likeliest_are_those_of_a_whole_sort(seed: int, count: int, levels: int, some_are_impossible: bool) -> None:
    """Also where many are equal, and where a sample of them misleads."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(0, levels, 3000) / 7).astype(np.float32)
    logits[:: drawing.STRIDE] -= rng.integers(0, 3)
    if some_are_impossible:
        logits[rng.random(3000) < 0.9] = -np.inf
    expected = np.argsort(-logits, kind="stable")[:count]
    assert drawing.likeliest(logits, count).tolist() == expected[logits[expected] > -np.inf].tolist()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=40, min_p=0.01)])
def test_what_is_impossible_is_never_drawn(params: SamplingParams) -> None:
    logits = np.full(3000, -np.inf, np.float32)
    logits[[7, 90]] = 0.0
    assert set(draw(logits, params, 60).tolist()) == {7, 90}


@given(st.lists(st.sampled_from(["greedy", "plain", "top_k", "top_p", "min_p", "penalised"]), min_size=2, max_size=8))
@settings(max_examples=40, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours(kinds: list[str]) -> None:
    table = {
        "greedy": SamplingParams(temperature=0.0),
        "plain": SamplingParams(seed=1),
        "top_k": SamplingParams(top_k=3, seed=2),
        "top_p": SamplingParams(top_p=0.5, seed=3),
        "min_p": SamplingParams(min_p=0.2, seed=4),
        "penalised": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, logit_bias={3: 2.0}, seed=5),
    }
    logits = [logits_of(len(kinds), step) for step in range(4)]
    together = [SamplingRow(table[kind], [1, 2], VOCAB) for kind in kinds]
    batched = np.array([sample(step.copy(), together) for step in logits])
    for index, kind in enumerate(kinds):
        alone = SamplingRow(table[kind], [1, 2], VOCAB)
        solo = [sample(step[index : index + 1].copy(), [alone])[0] for step in logits]
        assert batched[:, index].tolist() == solo


def test_penalties_and_bias_follow_their_formulas() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={4: -1.0, 6: 100.0}
    )
    row = SamplingRow(params, [1], VOCAB)
    for token in (2, 2, 3):
        row.commit(token)
    logits = np.ones(VOCAB, np.float32)
    logits[3] = -1.0
    row.adjust(logits)
    assert logits[:7].tolist() == [1.0, 0.5, 0.5 - 1.0 - 0.25, -2.0 - 0.5 - 0.25, 0.0, 1.0, 101.0]


def test_random_numbers_are_a_function_of_seed_and_counter() -> None:
    stream = np.array([uniform_at(9, counter) for counter in range(10_000)])
    assert np.all((stream >= 0) & (stream < 1))
    assert abs(stream.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.03
    assert uniform_at(-1, 0) == uniform_at(2**64 - 1, 0)
    trials = [SamplingRow(SamplingParams(seed=9), [], VOCAB).random(trial) for trial in range(2000)]
    assert abs(np.mean(trials) - 0.5) < 0.03
    assert abs(np.corrcoef(trials[:-1], trials[1:])[0, 1]) < 0.07


def test_a_seed_gives_its_own_draws_and_the_same_ones_again() -> None:
    drawn = [draw(logits_of(1)[0], SamplingParams(seed=seed), 40).tolist() for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_equal_logits_are_ordered_by_id() -> None:
    logits = np.zeros(3000, np.float32)
    logits[[5, 2999]] = 1.0
    drawn = draw(logits, SamplingParams(top_k=2, seed=7), 40)
    assert set(drawn.tolist()) == {5, 2999}
    assert set(draw(np.zeros(3000, np.float32), SamplingParams(top_k=1), 3).tolist()) <= set(range(3000))


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-7])
def test_a_temperature_of_next_to_nothing_is_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32) * 10
    row = SamplingRow(SamplingParams(temperature=temperature, seed=3), [1, 2], 50)
    assert sample(logits.copy(), [row]) == logits.argmax(axis=1)
