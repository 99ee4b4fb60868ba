"""The planner's validation keeps what it has found when it is interrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import plan_validation
from pilotlight.host.bench import Bench
from pilotlight.plan.outcomes import STAGES
from plan_validation import SEGMENTS, Figures, Replayed, batched
from planning import RATES


class Interrupted(Exception):
    """Somebody ends the run."""


def replayed() -> Replayed:
    stages = dict.fromkeys(STAGES, 0.01)
    return Replayed(Figures(1, 1, 0, 1, 0.02, 0.02, 0.02, 0.02, stages), 0.0, [{"ttft": 20.0}])


def test_an_interrupted_run_keeps_its_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces, out = tmp_path / "traces", tmp_path / "found.json"
    traces.mkdir()
    for name in (plan_validation.CODE, plan_validation.CHAT):
        (traces / name).write_text("at_s,prompt_tokens,new_tokens\n" + "".join(f"{at},64,8\n" for at in range(2000)))
    replays = iter([replayed(), replayed()])

    def measured(*_: Any) -> Replayed:
        found = next(replays, None)
        if found is None:
            raise Interrupted
        return found

    monkeypatch.setattr(plan_validation, "measured", measured)
    monkeypatch.setattr(Bench, "rates", lambda _: msgspec.to_builtins(RATES))
    asked = ["artifact", "--traces", str(traces), "--segments", "code-a", "chat", "--repeats", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["plan_validation.py", *asked])
    with pytest.raises(Interrupted):
        plan_validation.main()
    kept = json.loads(out.read_text())
    assert [one["segment"] for one in kept["pairs"]] == ["code-a", "chat"]
    assert len(kept["rates"]) == 3
    assert "code-a" in out.with_suffix(".md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.md", "traces"]


def test_replays_share_rates_in_their_order() -> None:
    some = [SEGMENTS[name] for name in ("code-a", "chat", "code-b")]
    assert list(batched(some, 2)) == [some[:2], some[2:]]
