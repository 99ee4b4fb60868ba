"""Which tokens of an answer count as reasoning."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from pilotlight.text.reasoning import ReasoningCount, ThinkMarkers
from pilotlight.text.tokenizer import Tokenizer
from support import EOS_ID, toy_tokenizer

OPENS, CLOSES, ENDS = 1, 2, 3
MARKERS = ThinkMarkers(OPENS, CLOSES, frozenset({ENDS}))


def counted(known_ids: list[int], answer: list[int]) -> int:
    count = ReasoningCount(MARKERS, known_ids)
    for token_id in answer:
        count.push(token_id)
    return count.num_tokens


@pytest.mark.parametrize(
    ("known_ids", "answer", "expected"),
    [
        ([9], [9, 9], 0),
        ([9], [OPENS, 9, 9, CLOSES, 9], 2),
        ([9], [OPENS, 9, 9], 2),
        ([9, OPENS, 9], [9, 9, CLOSES, 9], 2),  # the template opens the block
        ([9, OPENS, 9, CLOSES], [9, 9], 0),  # the template closes it, too: the model was told not to think
        ([OPENS, 9, ENDS, 9], [9, 9], 0),  # somebody wrote the marker into an earlier turn
        ([9], [OPENS, 9, ENDS], 1),
        ([9], [CLOSES, 9], 0),
        ([9], [OPENS, OPENS, 9, CLOSES, 9, OPENS, 9, CLOSES], 2),
        ([], [], 0),
    ],
)
def test_what_lies_between_the_markers_counts(known_ids: list[int], answer: list[int], expected: int) -> None:
    assert counted(known_ids, answer) == expected


@given(st.lists(st.integers(1, 5)), st.lists(st.integers(1, 5)), st.integers(0))
def test_an_answer_in_two_parts_counts_like_one(prompt_ids: list[int], answer: list[int], cut: int) -> None:
    at = cut % (len(answer) + 1)
    parts = counted(prompt_ids, answer[:at]) + counted(prompt_ids + answer[:at], answer[at:])
    assert parts == counted(prompt_ids, answer) <= len(answer)


@pytest.mark.parametrize(("texts", "expected"), [(["<think>", "</think>"], True), (["<think>"], False), ([], False)])
def test_only_markers_that_are_one_token_each_are_counted_between(
    texts: list[str], expected: bool, tmp_path: Path
) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in texts])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = ThinkMarkers.of(Tokenizer(tmp_path / "tokenizer.json"), frozenset({EOS_ID}))
    assert (found is not None) == expected
    if found is not None:
        assert found == ThinkMarkers(EOS_ID + 1, EOS_ID + 2, frozenset({EOS_ID}))
