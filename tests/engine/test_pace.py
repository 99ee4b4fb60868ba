"""What follows from measured speeds: chunks within the inter-token limit, and the crossing of two graphs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotlight.engine.pace import CHUNK_QUANTUM_TOKENS, PROBE_EVERY, DecodeGraph, Pace


@given(st.floats(1e-4, 0.05), st.floats(1e-3, 0.5), st.integers(1, 32), st.integers(20, 2000))
def test_a_chunk_keeps_the_limit_or_is_the_smallest(
    per_token_s: float, step_s: float, num_rows: int, limit_ms: int
) -> None:
    pace = Pace(max_inter_token_ms=limit_ms)
    pace.observe_prefill(128, 128 * per_token_s)
    pace.observe_decode(DecodeGraph.MAIN, num_rows, step_s)
    chunk = pace.chunk_tokens(num_rows, 256)
    assert chunk % CHUNK_QUANTUM_TOKENS == 0
    assert CHUNK_QUANTUM_TOKENS <= chunk <= 256
    assert chunk == CHUNK_QUANTUM_TOKENS or step_s + chunk * per_token_s <= limit_ms / 1000 + 1e-9
    if chunk < 256:
        assert step_s + (chunk + CHUNK_QUANTUM_TOKENS) * per_token_s > limit_ms / 1000 - 1e-9


def test_without_running_streams_or_figures_a_chunk_is_whole() -> None:
    pace = Pace(max_inter_token_ms=1)
    assert pace.chunk_tokens(4, 200) == 200
    pace.observe_prefill(128, 1.0)
    pace.observe_decode(DecodeGraph.MAIN, 4, 0.1)
    assert pace.chunk_tokens(0, 200) == 200
    assert pace.chunk_tokens(4, 200) == CHUNK_QUANTUM_TOKENS


def run(pace: Pace, num_rows: int, seconds: dict[DecodeGraph, float], num_steps: int) -> set[DecodeGraph]:
    used = set()
    for _ in range(num_steps):
        graph = pace.graph_for(num_rows)
        used.add(graph)
        pace.observe_decode(graph, num_rows, seconds[graph])
    return used


def test_the_crossing_moves_to_where_the_graphs_cross() -> None:
    pace = Pace(has_batch_graph=True)
    fast_batches = {DecodeGraph.MAIN: 0.02, DecodeGraph.BATCH: 0.01}
    run(pace, 3, fast_batches, 5 * PROBE_EVERY)
    assert pace.min_batch_rows == 3
    run(pace, 2, fast_batches, 5 * PROBE_EVERY)
    assert pace.min_batch_rows == 2
    slow_batches = {DecodeGraph.MAIN: 0.01, DecodeGraph.BATCH: 0.03}
    for rows in (2, 3, 4, 5):
        run(pace, rows, slow_batches, 30 * PROBE_EVERY)
    assert pace.min_batch_rows == 6


def test_a_lone_stream_is_not_tried_on() -> None:
    pace = Pace(has_batch_graph=True, min_batch_rows=2)
    fast_batches = {DecodeGraph.MAIN: 0.02, DecodeGraph.BATCH: 0.01}
    assert run(pace, 1, fast_batches, 10 * PROBE_EVERY) == {DecodeGraph.MAIN}


def test_without_a_batch_graph_there_is_no_choice() -> None:
    assert run(Pace(), 32, {DecodeGraph.MAIN: 1.0}, 3 * PROBE_EVERY) == {DecodeGraph.MAIN}
