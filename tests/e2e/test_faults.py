"""One record for every admission, whatever is killed and whoever leaves. ``make soak`` runs it for ten minutes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from faults import ENDS, MIN_HOST_KILLS, Run
from pilotlight.artifact import Artifact

pytestmark = [pytest.mark.e2e, pytest.mark.model]


def test_every_admission_has_one_record_under_faults(demo_int4: Artifact, tmp_path: Path) -> None:
    run = Run(demo_int4.path, tmp_path / "usage.db", duration_s=12, kill_every_s=2.5)
    asyncio.run(run.run())
    ends = run.check()
    assert run.kills["host"] >= MIN_HOST_KILLS
    assert ends.keys() >= ENDS, ends
    assert any(sent.finished for sent in run.sent.values())


@pytest.mark.soak
def test_every_admission_has_one_record_under_ten_minutes_of_faults(demo_int4: Artifact, tmp_path: Path) -> None:
    run = Run(demo_int4.path, tmp_path / "usage.db", duration_s=600, kill_every_s=8, seed=1)
    asyncio.run(run.run())
    ends = run.check()
    print(f"{len(run.sent)} requests, killed {dict(run.kills)}, records {dict(ends)}")
    assert ends.keys() >= ENDS, ends
