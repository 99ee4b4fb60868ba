"""Reusing the beginnings of prompts: what is found is right, nothing crosses scopes, memory is bounded."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine_support import engine_on
from pilotlight.engine.fake import FakeSession, next_token
from pilotlight.engine.policy import Policy
from pilotlight.engine.prefix_cache import PrefixCache
from pilotlight.engine.prefix_keys import Scope
from pilotlight.request import SamplingParams, Sequence

BLOCK = 4
OWN: Scope = ("me", None)
SCOPES: tuple[Scope, ...] = (OWN, ("you", None), ("me", "key"), (None, None))
PROMPTS = st.lists(st.integers(0, 1), max_size=20)


def keep(cache: PrefixCache, scope: Scope, tokens: list[int]) -> None:
    keys = cache.keys(scope, tokens)
    for index in range(len(keys)):
        if cache.lacks(keys, index):
            held = np.array(tokens[index * BLOCK : (index + 1) * BLOCK], np.int64)
            cache.add(keys, index, held)


def found(cache: PrefixCache, scope: Scope, tokens: list[int]) -> list[int]:
    blocks = cache.find(cache.keys(scope, tokens))
    assert [block.start for block in blocks] == [BLOCK * index for index in range(len(blocks))]
    return [token for block in blocks for token in block.held.tolist()]  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.sampled_from(SCOPES), PROMPTS)), st.integers(0, 12))
def test_what_is_found_is_the_prompt_and_within_the_scope(
    asked: list[tuple[Scope, list[int]]], num_blocks: int
) -> None:
    cache = PrefixCache(BLOCK, num_blocks * BLOCK * 8)
    seen: dict[Scope, list[list[int]]] = {scope: [] for scope in SCOPES}
    for scope, tokens in asked:
        held = found(cache, scope, tokens)
        assert held == tokens[: len(held)]
        assert len(held) < max(1, len(tokens))  # one is left to be computed: it gives the logits
        if held:
            assert any(known[: len(held)] == held for known in seen[scope])
        keep(cache, scope, tokens)
        seen[scope].append(tokens)
        assert cache.num_bytes <= cache.max_bytes


def test_a_block_goes_before_those_that_it_continues_and_the_useful_stay() -> None:
    cache = PrefixCache(BLOCK, 4 * BLOCK * 8)
    popular, once = [1] * 9, [2] * 9
    keep(cache, OWN, popular)
    keep(cache, OWN, once)
    for _ in range(3):
        assert found(cache, OWN, popular) == popular[:8]
    keep(cache, OWN, [3] * 9)
    assert found(cache, OWN, popular) == popular[:8]
    assert len(found(cache, OWN, once)) <= BLOCK
    for other in range(4, 60):  # what was popular once does not stay for ever
        keep(cache, OWN, [other] * 9)
    assert found(cache, OWN, popular) == []


def test_without_memory_nothing_is_even_looked_up() -> None:
    assert PrefixCache(BLOCK, 0).keys(OWN, [1] * 50) == []


def ask(name: str, prompt: tuple[int, ...], tenant: str = "t", cache_key: str | None = None) -> Sequence:
    sampling = SamplingParams(temperature=0.0)
    return Sequence(name, prompt, 3, sampling=sampling, tenant=tenant, cache_key=cache_key)


def test_the_engine_says_how_many_tokens_it_did_not_compute() -> None:
    shared = tuple(range(20))
    session = FakeSession(100, num_slots=3)
    with engine_on(session, Policy(BLOCK, prefix_cache_bytes=1 << 20)) as (engine, log):
        asked = [
            (ask("first", (*shared, 1)), 0),
            (ask("same", (*shared, 1)), 20),
            (ask("longer", (*shared, 5, 6, 7, 8, 9)), 20),
            (ask("shorter", shared), 16),
            (ask("other tenant", (*shared, 1), "u"), 0),
            (ask("other key", (*shared, 1), cache_key="k"), 0),
            (ask("same key", (*shared, 2), cache_key="k"), 20),
        ]
        for sequence, num_cached in asked:
            engine.submit(sequence)
            log.wait_for_end(sequence.id)
            tokens = list(sequence.prompt_ids)
            for token in log.tokens(sequence.id):
                assert token == next_token(tokens, 100)
                tokens.append(token)
            counts = [event.num_cached_tokens for event in log.by_sequence[sequence.id]]
            assert counts == [num_cached, 0, 0], sequence.id
        signals = engine.signals()
        assert signals.num_prefix_hit_tokens == sum(num_cached for _, num_cached in asked)
        assert signals.num_prefix_query_tokens == sum(len(sequence.prompt_ids) for sequence, _ in asked)
        assert signals.prefix_cache_bytes == (5 + 1 + 5 + 5) * BLOCK * 8  # shared, longer, other tenant, other key


def test_tenants_share_where_that_is_configured() -> None:
    policy = Policy(BLOCK, prefix_cache_bytes=1 << 20, share_prefixes=True)
    with engine_on(FakeSession(100), policy) as (engine, log):
        for name in ("a", "b"):
            engine.submit(ask(name, tuple(range(10)), tenant=name))
            log.wait_for_end(name)
        assert [log.by_sequence[name][0].num_cached_tokens for name in "ab"] == [0, 8]


def test_random_traffic_with_shared_prefixes_and_a_tight_cache() -> None:
    rng = random.Random(9)
    policies = [Policy(BLOCK, None, 50, prefix_cache_bytes=700), Policy(BLOCK, None, 50, True, 700)]
    for policy in policies:
        with engine_on(FakeSession(100, num_slots=3, max_context_tokens=45), policy) as (engine, log):
            asked = [
                ask(f"s{n}", tuple(rng.choices((1, 2), k=rng.randint(1, 25))), rng.choice("tu")) for n in range(120)
            ]
            for one in asked:
                engine.submit(one)
            log.wait_for_end(*(one.id for one in asked))
            for one in asked:
                tokens = list(one.prompt_ids)
                for _ in range(3):
                    tokens.append(next_token(tokens, 100))
                assert log.tokens(one.id) == tokens[len(one.prompt_ids) :]
            assert engine.signals().prefix_cache_bytes <= 700
            assert engine.signals().num_prefix_hit_tokens > 0
