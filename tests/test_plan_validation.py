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
from pilotlight.host.rates import Rates
from pilotlight.plan.outcomes import STAGES
from plan_validation import SEGMENTS, Figures, Replayed, batched
from planning import RATES


class Interrupted(Exception):
    """Somebody ends the run."""


def replayed(stolen_share: float = 0.0) -> Replayed:
    stages = dict.fromkeys(STAGES, 0.01)
    return Replayed(Figures(1, 1, 0, 1, 0.02, 0.02, 0.02, 0.02, stages), 0.0, [{"ttft": 20.0}], stolen_share)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    traces = tmp_path / "traces"
    traces.mkdir()
    for name in (plan_validation.CODE, plan_validation.CHAT):
        (traces / name).write_text("at_s,prompt_tokens,new_tokens\n" + "".join(f"{at},64,8\n" for at in range(2000)))
    return traces


def validate(
    traces: Path,
    out: Path,
    replays: list[Replayed],
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    rates_stolen: tuple[float, ...] = (),
) -> None:
    """Run the validation with these replays, and be interrupted where there are no more of them."""
    left, stolen = iter(replays), iter(rates_stolen)

    def measured(*_: Any) -> Replayed:
        found = next(left, None)
        if found is None:
            raise Interrupted
        return found

    monkeypatch.setattr(plan_validation, "measured", measured)
    rates = msgspec.to_builtins(RATES)
    monkeypatch.setattr(Bench, "rates", lambda _: {**rates, "stolen_share": next(stolen, 0.0)})
    asked = ["artifact", "--traces", str(traces), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", ["plan_validation.py", *asked])
    plan_validation.main()


def test_an_interrupted_run_keeps_its_pairs(tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, options = tmp_path / "found.json", ("--segments", "code-a", "chat", "--repeats", "2")
    with pytest.raises(Interrupted):
        validate(traces, out, [replayed(), replayed()], monkeypatch, *options)
    kept = json.loads(out.read_text())
    assert [one["segment"] for one in kept["pairs"]] == ["code-a", "chat"]
    assert len(kept["rates"]) == 3
    assert "code-a" in out.with_suffix(".md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.md", "traces"]


def test_replays_share_rates_in_their_order() -> None:
    some = [SEGMENTS[name] for name in ("code-a", "chat", "code-b")]
    assert list(batched(some, 2)) == [some[:2], some[2:]]


def test_what_others_disturbed_is_set_aside_and_replayed_again(
    tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replays = tmp_path / "found.json", [replayed(0.05), replayed(0.005), replayed()]
    validate(traces, out, replays, monkeypatch, "--segments", "code-a", "chat")
    kept = json.loads(out.read_text())
    found = [(one["segment"], one["is_disturbed"]) for one in kept["pairs"]]
    assert found == [("code-a", True), ("chat", False), ("code-a", False)]
    counts = {one["segment"]: (one["num_pairs"], one["num_set_aside"]) for one in kept["summary"]}
    assert counts == {"code-a": (1, 1), "chat": (1, 0)}
    assert "1 pairs, 1 set aside" in out.with_suffix(".md").read_text()


def test_a_machine_that_is_never_its_own_ends_the_run(
    tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    validate(traces, out, [replayed(0.05)] * 4, monkeypatch, "--segments", "code-a", "--repeats", "2")
    kept = json.loads(out.read_text())
    assert (len(kept["pairs"]), kept["summary"]) == (4, [])


def test_rates_that_others_disturbed_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.03, 0.002, 0.04, 0.05])
    monkeypatch.setattr(Bench, "rates", lambda _: {"stolen_share": next(shares)})
    bench = Bench(Path("artifact"), 1)
    assert [plan_validation.steady_rates(bench)["stolen_share"] for _ in range(2)] == [0.002, 0.05]


def test_rates_that_were_disturbed_are_left_out(tmp_path: Path, traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[list[float]] = []

    def simulated(_segment: Any, _arrivals: Any, beside: list[Rates]) -> Figures:
        used.append([one.stolen_share for one in beside])
        return replayed().figures

    monkeypatch.setattr(plan_validation, "simulated", simulated)
    out, shares = tmp_path / "found.json", (0.0, 0.04, 0.03, 0.02, 0.05, 0.001)
    options = ("--segments", "code-a", "--repeats", "2")
    validate(traces, out, [replayed()] * 3, monkeypatch, *options, rates_stolen=shares)
    assert used == [[0.0], [0.03, 0.05], [0.001]]
    assert [one["is_disturbed"] for one in json.loads(out.read_text())["pairs"]] == [False, True, False]
