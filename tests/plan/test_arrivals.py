"""Traces: every format, and what cutting and scaling make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotlight.errors import ConfigError
from pilotlight.plan.trace import Arrival, Scaling, read_trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,318,8\n"
)
MOONCAKE = '{"timestamp": 1000, "input_length": 1030, "output_length": 5, "hash_ids": [4, 5, 6]}\n'
OWN_CSV = "at_s,prompt_tokens,new_tokens,tenant\n5,10,3,a\n2.5,20,4,\n"
OWN_JSON = [
    {"at_s": 1.0, "prompt_tokens": 30, "new_tokens": 2, "tenant": "t"},
    {"at_s": 3.0, "prompt_tokens": 40, "new_tokens": 2, "block_ids": [1, 2], "block_tokens": 16},
]


def read(tmp_path: Path, text: str, scaling: Scaling | None = None) -> list[Arrival]:
    path = tmp_path / "trace"
    path.write_text(text)
    return read_trace(path, scaling or Scaling())


def test_azure(tmp_path: Path) -> None:
    assert read(tmp_path, AZURE) == [Arrival(0.0, 4808, 10), Arrival(1.5, 318, 8)]


def test_mooncake(tmp_path: Path) -> None:
    assert read(tmp_path, MOONCAKE) == [Arrival(0.0, 1030, 5, None, (4, 5, 6), 512)]


def test_own_csv_is_put_in_order(tmp_path: Path) -> None:
    assert read(tmp_path, OWN_CSV) == [Arrival(0.0, 20, 4), Arrival(2.5, 10, 3, "a")]


def test_own_json_lines(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in OWN_JSON)
    assert read(tmp_path, text) == [Arrival(0.0, 30, 2, "t"), Arrival(2.0, 40, 2, None, (1, 2), 16)]


def test_cut_scale_and_repeat(tmp_path: Path) -> None:
    text = "at_s,prompt_tokens,new_tokens\n" + "".join(f"{at},1000,100\n" for at in range(10))
    scaling = Scaling(2, 5, 3, 2.0, 0.5, 0.1, 400, 8, 2)
    found = read(tmp_path, text, scaling)
    assert [one.at_s for one in found] == pytest.approx([0, 0.5, 1.0, 4 / 3, 4 / 3 + 0.5, 4 / 3 + 1.0])
    assert {(one.num_prompt_tokens, one.num_new_tokens) for one in found} == {(392, 8)}


def test_blocks_shrink_with_their_prompts(tmp_path: Path) -> None:
    (arrival,) = read(tmp_path, MOONCAKE, Scaling(prompt_scale=1 / 64))
    assert (arrival.num_prompt_tokens, arrival.block_tokens) == (16, 8)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not a trace; expected CSV or JSON lines"),
        ("time,length\n1,2\n", "is not a trace; expected"),
        ('{"when": 1}\n', "is not a trace; expected"),
        ("at_s,prompt_tokens,new_tokens\n1,x,2\n", "is not a trace"),
        ('{"at_s": 1, "prompt_tokens": 3}\n', "is not a trace"),
        ("at_s,prompt_tokens,new_tokens\n", "has no request within the cut"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, text)


def test_a_missing_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none", Scaling())
