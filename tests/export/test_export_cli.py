"""``python -m pilotlight_export``: options, exit statuses, and one line for each failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pilotlight_export.cli import default_target, main
from pilotlight_export.errors import VerificationError
from pilotlight_export.recipes import PRECISIONS
from tiny_models import HELD_EXPORT


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, pilotlight_export.cli; print(sorted({'torch', 'onnx_ir', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_help_names_every_option() -> None:
    result = CliRunner().invoke(main, ["export", "--help"])
    assert result.exit_code == 0
    assert "Usage: pilotlight export [OPTIONS] MODEL" in result.output
    options = "--precision --recipe --out --revision --text --max-kl --allow-pickle".split()
    assert all(option in result.output for option in [*options, f"[{'|'.join(PRECISIONS)}]"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["export", "model", "--precision", "int2"],
        ["export", "model", "--trust-remote-code"],
        ["export", "model", "--max-kl", "-1"],
        ["verify", "artifact"],
        ["prune", "artifact"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_a_bad_model_is_status_1_and_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pilotlight_export", "export", str(tmp_path / "nowhere"), "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    problem = "no such directory, and not the id of a model on the hub"
    assert run.stderr == f"pilotlight export: {tmp_path}/nowhere: {problem}\n"
    assert not out.exists()


def test_a_failure_late_in_the_export_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationError("the logits differ")

    monkeypatch.setattr("pilotlight_export.export.export_model", fail)
    result = CliRunner().invoke(main, ["export", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr == "pilotlight export: the logits differ\n"


def test_an_interrupt_is_status_1_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pilotlight_export.export.export_model", interrupt)
    result = CliRunner().invoke(main, ["export", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == "pilotlight export: interrupted; nothing was written\n"


def test_artifacts_are_named_after_the_model(tmp_path: Path) -> None:
    assert default_target("HuggingFaceTB/SmolLM2-135M", "int4") == Path("artifacts/SmolLM2-135M-int4")
    (tmp_path / "mine").mkdir()
    assert default_target(f"{tmp_path}/mine/", "fp32") == Path("artifacts/mine-fp32")


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("pilotlight_export.export.export_model", fail)
    result = CliRunner().invoke(main, ["export", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("pilotlight export: torch is not installed")


@pytest.mark.model
def test_a_terminated_export_removes_its_traces(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HELD_EXPORT, "export", str(tiny_llama), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as export:
        assert export.stderr is not None
        while export.stderr.readline() != "in the middle\n":
            assert export.poll() is None
        export.terminate()
        last_line = export.stderr.read().splitlines()[-1]
    assert export.returncode == 1
    assert last_line == "pilotlight export: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []
