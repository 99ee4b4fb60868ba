"""Marks: what a killed process had delivered, token by token."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admissions import PROMPT, admission, ended
from pilotlight.errors import LedgerUnavailable, RequestIdInUse
from pilotlight.metering.ledger import Ledger
from pilotlight.metering.marks import LeftMarks, Mark, Marks
from pilotlight.metering.usage import Usage
from pilotlight.request import FinishReason

DIE = """
import os, signal, sys
from pathlib import Path
from pilotlight.metering.marks import Mark, Marks
marks = Marks(Path(sys.argv[1]))
for request_id in "abc":
    marks.open(request_id)
for number in range(1000):
    marks.note({"a": Mark(4, 1, number, number)})
marks.note({"b": Mark(4, 0, 7, 7)})
marks.close("b")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_last_note_outlives_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    done = subprocess.run([sys.executable, "-c", DIE, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = LeftMarks(path)
    assert [left.get(request_id) for request_id in "abc"] == [Mark(4, 1, 999, 999), Mark(), Mark()]
    left.remove()
    assert [*tmp_path.iterdir()] == []


def test_a_crashed_record_holds_what_was_noted_after_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with Ledger(path) as ledger:
        for request_id in "ab":
            asyncio.run(ledger.admit(admission(request_id, None)))
            asyncio.run(ledger.checkpoint(request_id, Usage(PROMPT, cached_tokens=2, completion_tokens=2)))
        ledger.note({"a": Mark(PROMPT, 2, 5, 40)})
        ledger.note({"b": Mark(PROMPT, 2, 1, 10)})
    with Ledger(path) as ledger:
        a, b = ledger.get("a"), ledger.get("b")
    assert a is not None
    assert b is not None
    assert (a.finish_reason, a.prompt_tokens, a.cached_tokens, a.busy_ms) == (FinishReason.CRASHED, PROMPT, 2, 40)
    assert (a.completion_tokens, a.delivered_tokens, b.completion_tokens) == (5, 5, 2)
    assert [file.name for file in tmp_path.iterdir() if ".marks-" in file.name] == []


def test_marks_of_a_process_that_lives_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with Ledger(path) as one:
        asyncio.run(one.admit(admission("a", None)))
        one.note({"a": Mark(PROMPT, 0, 3, 0)})
        with Ledger(path) as two:
            asyncio.run(two.admit(admission("b", None)))
            with pytest.raises(RequestIdInUse):
                asyncio.run(two.admit(admission("a", None)))
    with Ledger(path) as ledger:
        a = ledger.get("a")
    assert a is not None
    assert a.completion_tokens == 3


def test_slots_are_used_again_and_a_clean_end_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with Ledger(path) as ledger:
        for number in range(100):
            asyncio.run(ledger.admit(admission(f"{number}", None)))
            ledger.note({f"{number}": Mark(PROMPT, 0, 1, 0)})
            asyncio.run(ledger.finish(ended(admission(f"{number}", None), 1)))
        (file,) = tmp_path.glob("usage.db.marks-*")
        assert file.stat().st_size == 48
    assert [*tmp_path.glob("usage.db.marks-*")] == []


def test_after_the_end_nothing_is_written_into_another_file(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "usage.db")
    marks.open("a")
    marks.end()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    with pytest.raises(LedgerUnavailable, match="closed"):
        marks.note({"a": Mark(1, 1, 1, 1)})
    marks.close("a")
    assert os.fstat(other).st_size == 0
    os.close(other)


def test_what_a_step_emitted_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks(tmp_path / "usage.db")
    for request_id in "abcd":
        marks.open(request_id)
    writes: list[int] = []
    pwrite = os.pwrite

    def count(file: int, content: bytes, offset: int) -> int:
        writes.append(len(content))
        return pwrite(file, content, offset)

    monkeypatch.setattr(os, "pwrite", count)
    marks.note({"b": Mark(1, 1, 1, 1), "d": Mark(2, 2, 2, 2)})
    assert writes == [3 * 48]
    marks.end()
    left = LeftMarks(tmp_path / "usage.db")
    assert [left.get(each).completion_tokens for each in "abcd"] == [0, 1, 0, 2]


def test_what_is_not_open_cannot_be_noted(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "usage.db")
    with pytest.raises(LedgerUnavailable, match="'a'"):
        marks.note({"a": Mark(1, 1, 1, 1)})
    marks.end()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "note", "close"]),
            st.sets(st.sampled_from("abcd"), min_size=1),
            st.integers(1, 2**40),
        ),
        max_size=40,
    ),
    st.integers(0, 47),
)
def test_any_order_of_steps_leaves_the_last_note_of_what_is_open(
    steps: list[tuple[str, set[str], int]], num_torn_bytes: int
) -> None:
    """A slot that was being added when the process was killed may be torn; the others are not."""
    expected: dict[str, Mark] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "usage.db"
        marks = Marks(path)
        for step, request_ids, count in steps:
            if step == "open":
                for request_id in sorted(request_ids):
                    assert marks.open(request_id) == (request_id not in expected)
                    expected.setdefault(request_id, Mark())
            elif step == "note" and (noted := request_ids & expected.keys()):
                of_step = dict.fromkeys(noted, Mark(count, count, count, count))
                marks.note(of_step)
                expected |= of_step
            elif step == "close":
                for request_id in request_ids:
                    marks.close(request_id)
                    expected.pop(request_id, None)
        (file,) = path.parent.glob("usage.db.marks-*")
        with file.open("ab") as torn:
            torn.write(b"x" * num_torn_bytes)
        marks.end()
        left = LeftMarks(path)
        assert [left.get(request_id) for request_id in "abcd"] == [expected.get(each, Mark()) for each in "abcd"]
