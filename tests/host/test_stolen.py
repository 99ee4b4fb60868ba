"""What other guests take of a machine is read from the kernel's count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pilotlight.host.stolen import StolenTime


def write(path: Path, stolen_s: float) -> Path:
    path.write_text(f"cpu  1 2 3 4 5 6 7 {round(stolen_s * os.sysconf('SC_CLK_TCK'))} 9 10\ncpu0 1 2 3\n")
    return path


def test_the_share_is_of_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instants = iter([1000.0, 1010.0])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    stat = write(tmp_path / "stat", 100.0)
    since = StolenTime(stat, lambda: next(instants))
    write(stat, 102.0)
    assert since.share() == pytest.approx(2.0 / (10 * 4))


@pytest.mark.parametrize("text", ["", "cpu  1 2 3 4\n", "cpu  1 2 3 4 5 6 7 none 9\n"])
def test_a_system_that_does_not_say(text: str, tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(text)
    assert StolenTime(tmp_path / "stat").share() == StolenTime(tmp_path / "missing").share() == 0.0
