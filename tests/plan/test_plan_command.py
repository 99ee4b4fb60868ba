"""`pilotlight plan` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from pilotlight.cli import main
from pilotlight.host.rates import read_rates
from pilotlight.plan.prices import read_prices
from planning import RATES, bursts

PRICES = "[own]\nmachine_per_hour = 2.0\n[modal]\nscaledown_window_s = 5.0\n"
CONFIG = "[functions.demo]\nartifact = 'a'\nidle_timeout_s = 10\nmax_replicas = 2\n[functions.other]\nartifact = 'b'\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    lines = ["at_s,prompt_tokens,new_tokens"]
    lines += [f"{one.at_s},{one.num_prompt_tokens},{one.num_new_tokens}" for one in bursts(60)]
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "rates.json").write_bytes(msgspec.json.encode(RATES))
    (tmp_path / "prices.toml").write_text(PRICES)
    (tmp_path / "pilotlight.toml").write_text(CONFIG)
    return tmp_path


def plan(files: Path, *options: str) -> Result:
    arguments = ["plan", "--trace", str(files / "trace.csv"), "--rates", str(files / "rates.json"), "--processes", "1"]
    return CliRunner().invoke(main, [*arguments, *options])


def test_a_table_and_the_cheapest(files: Path) -> None:
    done = plan(files, "--place", "own", "--max-cold-starts", "0", "--series", "--plot", str(files / "plan.svg"))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("trace.csv: 60 requests in ")
    assert [line.split()[0] for line in lines[2:6]] == ["plan", "own-cold", "own-light", "own-warm"]
    assert lines[3].rstrip().endswith("max_cold_starts")
    assert "The cheapest plan that keeps the limits: own-warm" in done.stdout
    assert "kv_used_bytes" in done.stdout
    assert (files / "plan.svg").read_text().startswith("<svg ")


def test_json_has_everything(files: Path) -> None:
    config = ["--config", str(files / "pilotlight.toml"), "--function", "demo"]
    done = plan(files, *config, "--place", "machines", "--place", "spot", "--warmth", "warm", "--json")
    found = json.loads(done.stdout)
    assert [one["plan"] for one in found["results"]] == ["machines-warm", "spot-warm"]
    assert found["cheapest"] == "spot-warm"
    assert found["results"][1]["spot"]["saving"] == pytest.approx(0.47, abs=0.02)
    assert len(found["results"][0]["series"]["at_s"]) == len(found["results"][0]["series"]["num_queued"]) > 100


def test_prices_of_ones_own(files: Path) -> None:
    usual, dear = (
        json.loads(plan(files, "--place", "own", "--warmth", "cold", "--json", *more).stdout)["results"][0]["cost"]
        for more in ((), ("--prices", str(files / "prices.toml")))
    )
    assert dear == pytest.approx(usual * 2.0 / read_prices().own.machine_per_hour)


def test_savings_show_their_formula(files: Path) -> None:
    done = plan(files, "--place", "machines", "--place", "spot", "--warmth", "warm")
    assert "saves 47" in done.stdout
    assert "1 - (1.000 × (1 - 0.471) × (1 + 0.000) + (1 - 1.000)) = 47.1%" in done.stdout


def test_no_plan_keeps_the_limits(files: Path) -> None:
    done = plan(files, "--place", "own", "--max-ttft-p95", "0.001")
    assert done.exit_code == 0
    assert "No plan keeps the limits." in done.stdout


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        (["--trace", "nowhere.csv"], 1, "nowhere.csv: cannot be read"),
        (["--rates", "{files}/trace.csv"], 1, "is not what `pilotlight bench ARTIFACT --rates` prints"),
        (["--prices", "{files}/pilotlight.toml"], 1, "unknown field `functions`"),
        (["--config", "{files}/pilotlight.toml"], 1, "choose a function with --function; there are: demo, other"),
        (["--place", "modal", "--warmth", "light"], 2, "only own machines can sleep lightly"),
        (["--place", "moon"], 2, "'moon' is not one of"),
        (["--from", "100000"], 1, "has no request within the cut"),
        (["--plot", "{files}/none/plan.svg", "--place", "own"], 1, "cannot be written"),
    ],
)
def test_what_goes_wrong_is_one_line(files: Path, options: list[str], status: int, problem: str) -> None:
    done = plan(files, *(option.format(files=files) for option in options))
    assert done.exit_code == status
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_the_default_prices_are_dated_and_have_a_source() -> None:
    for name in ("own", "machines", "aws_lambda", "modal"):
        table = getattr(read_prices(), name)
        assert table.checked == "2026-11"
        assert table.source
    assert 0 < read_prices().machines.discount < 1


def test_rates_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text('{"num_threads": 2}')
    from pilotlight.errors import ConfigError

    with pytest.raises(ConfigError, match="missing required field"):
        read_rates(path)
