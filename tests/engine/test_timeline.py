"""Where a step's time goes: stages that add up, and operators that add up to the run."""

from __future__ import annotations

import json

import msgspec
import pytest
from click.testing import CliRunner

from pilotlight.artifact import Artifact
from pilotlight.cli import main
from pilotlight.engine.timeline import StageTimes
from pilotlight.host import service_bench
from pilotlight.host.bench import Bench
from pilotlight.host.rates import Rates


def test_stages_add_up_to_the_wall_time() -> None:
    times = StageTimes()
    times.enter("before")
    times.start()
    for stage in ("a", "b", "a"):
        times.enter(stage)
        sum(range(2000))
    times.attribute("c", 1e-6)
    times.stop()
    times.enter("after")
    assert sum(times.seconds.values()) == pytest.approx(times.wall_s)
    assert times.seconds["c"] == 1e-6
    assert {"before", "after"} & set(times.seconds) <= {"before"}


@pytest.mark.model
def test_a_profile_names_nearly_all_of_a_step(demo_int4: Artifact) -> None:
    options = ["--profile", "--streams", "1,3", "--steps", "20", "--threads", "1"]
    done = CliRunner().invoke(main, ["bench", str(demo_int4.path), *options, "--json"])
    assert done.exit_code == 0, done.output
    one, three = json.loads(done.stdout)
    assert (one["num_streams"], three["num_streams"]) == (1, 3)
    for profile in (one, three):
        stages = profile["stages_ms"]
        assert {"receive", "schedule", "bind", "run", "sample", "commit", "emit"} <= set(stages)
        assert all(ms >= 0 for ms in stages.values())
        assert sum(stages.values()) >= 0.97 * profile["step_ms"]
        shares = profile["run_shares"]
        assert shares["MatMulNBits"] > 0
        assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    text = CliRunner().invoke(main, ["bench", str(demo_int4.path), *options])
    assert "3 streams: " in text.stdout
    assert "  MatMulNBits" in text.stdout


@pytest.mark.model
def test_rates_are_printed_for_a_planner(demo_int4: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUNDS", "WAKINGS", "NUM_BUSY", "STREAM_ROUNDS"):  # once is enough to see that it works
        monkeypatch.setattr(service_bench, name, 1)
    done = CliRunner().invoke(main, ["bench", str(demo_int4.path), "--rates", "--threads", "1"])
    assert done.exit_code == 0, done.output
    rates = json.loads(done.stdout)
    assert rates["min_batch_rows"] is None
    assert list(rates["prefill_tokens_per_s"]) == ["16", "32", "64", "128", "256", "512"]
    assert list(rates["decode_tokens_per_s"]["main"]) == ["1", "2", "3", "4", "6", "8", "16", "32"]
    assert all(
        rate > 0 for rate in (*rates["prefill_tokens_per_s"].values(), *rates["decode_tokens_per_s"]["main"].values())
    )
    read = msgspec.json.decode(done.stdout, type=Rates)
    assert read.artifact.kv_bytes_per_token > 0
    assert read.artifact.replica_bytes is not None
    assert read.artifact.replica_bytes > 1_000_000
    assert read.starts.deep_ms > 0 < read.starts.light_ms
    assert (read.starts.grow_ms, read.starts.growing_factor) == (0.0, 1.0)
    assert read.host.request_ms > 0 < read.host.prefill_factor


@pytest.mark.parametrize(("share", "told"), [(0.004, ""), (0.04, "for others 4.0% of the time")])
def test_a_machine_that_others_took_is_told(
    share: float, told: str, toy_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "rates", lambda _: {"stolen_share": share})
    done = CliRunner().invoke(main, ["bench", str(toy_artifact.path), "--rates"])
    assert json.loads(done.stdout) == {"stolen_share": share}
    assert told in done.stderr
    assert bool(told) is bool(done.stderr)


@pytest.mark.parametrize("options", [[], ["--profile", "--rates"], ["--profile", "--streams", "1,x"]])
def test_wrong_usage(options: list[str], toy_artifact: Artifact) -> None:
    assert CliRunner().invoke(main, ["bench", str(toy_artifact.path), *options]).exit_code == 2
