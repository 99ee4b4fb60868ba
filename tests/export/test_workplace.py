"""Where artifacts are built: cleaned up after every end, also after a kill; refused early where nothing can end."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from pilotlight.scratch import LOCK
from pilotlight_export.errors import TargetError
from pilotlight_export.workplace import ARTIFACT, REPLACED, check_space, check_target, move_into_place, workplace
from tiny_models import HELD_EXPORT

DiskUsage = namedtuple("DiskUsage", "total used free")


def leftover(target: Path) -> Path:
    """What a killed export to this target leaves: its directory, and a lock that nobody holds."""
    directory = target.parent / f".{target.name}.export-abcd_123"
    directory.mkdir()
    (directory / LOCK).touch()
    (directory / "weights").write_text("half of them")
    return directory


def old_artifact(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("old")
    return path


def test_leftovers_of_killed_exports_are_removed(tmp_path: Path) -> None:
    directory = leftover(tmp_path / "out")
    with workplace(tmp_path / "out"):
        assert not directory.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_another_export_is_working_in_stays(tmp_path: Path) -> None:
    directory = leftover(tmp_path / "out")
    with (directory / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with workplace(tmp_path / "out") as ours:
            assert ours != directory
        assert (directory / "weights").exists()


def test_only_our_own_directories_for_the_same_target_are_removed(tmp_path: Path) -> None:
    kept = [leftover(tmp_path / "other"), tmp_path / ".out.export-notes-of-mine", tmp_path / ".out.export-12345678"]
    for directory in kept[1:]:
        directory.mkdir()
    with workplace(tmp_path / "out"):
        assert all(directory.exists() for directory in kept)


def test_an_artifact_that_a_killed_export_had_put_aside_comes_back(tmp_path: Path) -> None:
    old_artifact(leftover(tmp_path / "out") / REPLACED)
    with workplace(tmp_path / "out"):
        assert (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_a_new_artifact_is_never_replaced_by_one_that_was_put_aside(tmp_path: Path) -> None:
    old_artifact(leftover(tmp_path / "out") / REPLACED)
    (old_artifact(tmp_path / "out") / "manifest.json").write_text("new")
    with workplace(tmp_path / "out"):
        assert (tmp_path / "out" / "manifest.json").read_text() == "new"


def test_moving_into_place_replaces_or_changes_nothing(tmp_path: Path) -> None:
    target = old_artifact(tmp_path / "out")
    with workplace(target) as directory:
        with pytest.raises(FileNotFoundError):
            move_into_place(directory, target)
        assert (target / "manifest.json").read_text() == "old"
        (directory / ARTIFACT).mkdir()
        move_into_place(directory, target)
        assert list(target.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]


def test_parents_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), workplace(tmp_path / "a" / "b" / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"/out: No space left on device$"), workplace(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: DiskUsage(10**9, 10**9 - 5_000_000, 5_000_000))
    check_space(tmp_path, 5_000_000)
    with pytest.raises(TargetError, match="has 5 MB free; the export needs 6 MB there while it works"):
        check_space(tmp_path, 6_000_000)


def test_a_read_only_place_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)
    with pytest.raises(TargetError, match=f"cannot be written, because {tmp_path} is read-only"):
        check_target(tmp_path / "new" / "out")


def test_a_place_that_turns_out_to_be_read_only_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(TargetError, match="Read-only file system"), workplace(tmp_path / "out"):
        raise AssertionError("it cannot be entered")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(TargetError, match="is read-only"):
            check_target(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


def export_command(model: object, target: Path) -> list[str]:
    return [sys.executable, "-m", "pilotlight_export", "export", str(model), "--out", str(target)]


@pytest.mark.model
def test_a_killed_export_is_swept_by_the_next_one(tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", HELD_EXPORT, *export_command(tiny_llama, target)[3:]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as export:
        assert export.stderr is not None
        while export.stderr.readline() != "in the middle\n":
            assert export.poll() is None
        export.send_signal(signal.SIGKILL)
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == [".out.export"]
    subprocess.run(export_command("no model", target), capture_output=True, check=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_a_disk_that_fills_up_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    run = "from pilotlight_export.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", limit + run, *export_command(tiny_llama, tmp_path / "out")[3:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pilotlight export: ")
    assert done.stderr.splitlines()[-1].endswith(": File too large")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
