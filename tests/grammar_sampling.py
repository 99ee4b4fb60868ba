"""Answers that a grammar allows, drawn at random: what a model without any sense would say."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from pilotlight.engine.grammar import Grammars
from support import EOS_ID, VOCAB_SIZE, toy_tokenizer

MAX_TOKENS = 300
CLOSING = frozenset(toy_tokenizer().encode('"}],').ids)


def make_grammars(directory: Path) -> Grammars:
    """Return grammars over the toy tokenizer, one byte a token."""
    path = directory / "tokenizer.json"
    toy_tokenizer().save(str(path))
    return Grammars(path, VOCAB_SIZE, [EOS_ID])


def sampled(grammars: Grammars, grammar: str, seed: int) -> str | None:
    """Return one answer, in haste to come to an end; None for one that found none."""
    choose = random.Random(seed)
    state = grammars.compile(grammar, [], frozenset({EOS_ID})).result(60)
    token_ids: list[int] = []
    while not state.complete:
        state.find_banned()
        assert state.failure is None
        allowed = np.flatnonzero(~state.banned).tolist()
        if EOS_ID in allowed and (len(allowed) == 1 or choose.random() < 0.5):
            break
        if len(token_ids) == MAX_TOKENS:
            return None
        closing = [token_id for token_id in allowed if token_id in CLOSING]
        others = [token_id for token_id in allowed if token_id != EOS_ID]
        token_ids.append(choose.choice(closing if closing and choose.random() < 0.4 else others))
        state.commit(token_ids[-1])
    text: str = toy_tokenizer().decode(token_ids)
    return text
