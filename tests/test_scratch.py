"""Directories to work in: gone after every end of the work, also after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pilotlight.scratch import scratch

WORKER = """
import signal
import sys
from pathlib import Path

import click

from pilotlight import cli
from pilotlight.scratch import scratch


@click.command()
def work():
    with scratch("work-", Path(sys.argv[1])) as directory:
        (directory / "half").write_text("of it")
        print("at work", flush=True)
        sys.stdin.read()


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so did this one
cli._Commands.get_command = lambda *_: work
cli.main(["work"])
"""


def end_by(number: signal.Signals, folder: Path) -> int:
    """Have a command work in ``folder``, send it a signal in the middle, and return its exit status."""
    command = [sys.executable, "-c", WORKER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        process.send_signal(number)
        return process.wait(timeout=300)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    assert end_by(number, tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_leaves_is_removed_by_the_next_one(tmp_path: Path) -> None:
    assert end_by(signal.SIGKILL, tmp_path) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with scratch("work-", tmp_path) as directory:
        assert not left.exists()
        with scratch("work-", tmp_path):
            assert directory.exists(), "its process lives"
    assert list(tmp_path.iterdir()) == []


def test_what_others_have_there_stays(tmp_path: Path) -> None:
    kept = [tmp_path / "work-notes-of-mine", tmp_path / "work-12345678", tmp_path / "other-12345678"]
    for path in kept:
        path.mkdir()
    (tmp_path / "work-abcdefgh").symlink_to(kept[0])
    with scratch("work-", tmp_path):
        assert all(path.is_dir() for path in kept)


def test_an_error_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch("work-", tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
