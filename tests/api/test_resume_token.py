"""Resume tokens by themselves: what they carry, and who cannot use one."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.api.resume_token import Bound, ResumeTokens, continuation_id
from pilotlight.errors import ConfigError, InvalidRequest
from pilotlight.request import Continuation

SECRET = "sixteen characters and more"
ASKED = {"model": "toy", "prompt": "hi", "max_tokens": 9}
BOUND = Bound("toy", "sha256:1", "acme", "key-1", "/v1/completions", json.dumps(ASKED).encode())
CUT_OFF = Continuation("req-1", (5, 70_000, 3), 2**62, paid=True)

token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def sealed(cut_off: Continuation = CUT_OFF, bound: Bound = BOUND) -> str:
    return ResumeTokens(SECRET, 60).seal(bound, cut_off)


def refused(token: str, bound: Bound = BOUND, secret: str = SECRET) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        ResumeTokens(secret, 60).open(token, bound)
    assert raised.value.param == "resume_token"
    return raised.value


def with_body(**changes: Any) -> Bound:
    return dataclasses.replace(BOUND, body=json.dumps({**ASKED, **changes}).encode())


@given(token_ids, st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_another_host_with_the_secret_reads_what_was_sealed(emitted: list[int], seed: int, paid: bool) -> None:
    cut_off = Continuation("req-1", tuple(emitted), seed, paid)
    assert ResumeTokens(SECRET, 60).open(sealed(cut_off), BOUND) == cut_off
    assert ResumeTokens(SECRET, 60).artifact_digest(sealed(cut_off)) == "sha256:1"


@pytest.mark.parametrize(
    "delivery",
    [
        {"resume_token": "plr1"},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "me"},
        {"n": None},
    ],
)
def test_how_the_answer_is_delivered_may_change(delivery: dict[str, Any]) -> None:
    assert ResumeTokens(SECRET, 60).open(sealed(), with_body(**delivery)) == CUT_OFF


def test_the_spelling_of_the_body_may_change() -> None:
    spelled = dataclasses.replace(BOUND, body=b'{"max_tokens": 9,\n "prompt": "h\\u0069", "model": "toy"}')
    assert ResumeTokens(SECRET, 60).open(sealed(), spelled) == CUT_OFF


@pytest.mark.parametrize(
    ("bound", "why"),
    [
        (dataclasses.replace(BOUND, function="other"), "another function or another API key"),
        (dataclasses.replace(BOUND, tenant=None), "another function or another API key"),
        (dataclasses.replace(BOUND, key_id="key-2"), "another function or another API key"),
        (dataclasses.replace(BOUND, artifact_digest="sha256:2"), "another artifact"),
        (dataclasses.replace(BOUND, path="/v1/chat/completions"), "the body that it was given for"),
        (with_body(max_tokens=10), "the body that it was given for"),
        (with_body(temperature=0.5), "the body that it was given for"),
        (with_body(prompt="ho"), "the body that it was given for"),
    ],
)
def test_a_token_belongs_to_one_request(bound: Bound, why: str) -> None:
    refusal = refused(sealed(), bound)
    assert why in refusal.message
    assert refusal.code == "invalid_resume_token"


def test_an_altered_token_is_none() -> None:
    token = sealed()
    for _ in range(200):
        at = random.Random(token).randrange(len(token))
        other = "A" if token[at] != "A" else "B"
        token = token[:at] + other + token[at + 1 :]
        assert refused(token).code == "invalid_resume_token"


@pytest.mark.parametrize("token", ["", "plr1", "plr1..", "plr1.a.b.c", "plr1.ä.b", "plr2" + sealed()[4:], "x" * 10_000])
def test_anything_else_is_none(token: str) -> None:
    assert refused(token).code == "invalid_resume_token"


def test_another_secret_is_another_function() -> None:
    assert refused(sealed(), secret="another secret of length").code == "invalid_resume_token"


def test_a_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    token = sealed()
    now = time.time()
    monkeypatch.setattr("pilotlight.api.resume_token.time.time", lambda: now + 59)
    assert ResumeTokens(SECRET, 60).open(token, BOUND) == CUT_OFF
    monkeypatch.setattr("pilotlight.api.resume_token.time.time", lambda: now + 62)
    assert refused(token).code == "resume_token_expired"


def test_a_secret_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="at least 16 characters") as raised:
        ResumeTokens("hunter2", 60)
    assert "hunter2" not in raised.value.message


def test_a_token_is_small_enough_to_travel() -> None:
    ids = random.Random(1).choices(range(150_000), k=4096)
    assert len(sealed(Continuation("req-1", tuple(ids), 1, paid=True))) < 16_384


def test_the_request_ids_of_continuations_follow_from_the_token() -> None:
    token = sealed()
    assert continuation_id(token, 0) == continuation_id(token, 0)
    assert (
        len({continuation_id(token, 0), continuation_id(token, 1), continuation_id(sealed(bound=with_body(n=1)), 0)})
        == 3
    )
