"""`make gpu-check` without a GPU: that it says so, and that all it measures can be measured, on the CPU provider."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_check
from gpu_measure import Figures, copies_of, copies_the_cache, step_bytes
from gpu_parity import Parity, compare
from gpu_report import Checked, Report
from pilotlight.artifact import Artifact
from pilotlight.engine.hbm import kv_bytes_per_token, weights_bytes
from support import DEMO_MODEL


def test_without_a_gpu_it_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "gpu-check: skipped, nvidia-ml-py is not installed\n"
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_cannot_be_used_is_no_missing_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "there seems to be a GPU, but nvidia-ml-py is not installed" in capsys.readouterr().err


@pytest.mark.model
def test_all_of_it_runs_on_the_cpu_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert DEMO_MODEL == gpu_check.DEMO_MODEL
    options = "--provider cpu --models demo --streams 1 2 4 --steps 6 --prompt-tokens 32 --threads 1".split()
    places = ["--artifacts", str(tmp_path / "artifacts"), "--out", str(tmp_path / "results")]
    assert gpu_check.main([*options, *places]) == 0
    found = json.loads((tmp_path / "results" / "gpu-check-cpu-provider.json").read_text())
    assert [(one["model"], one["precision"]) for one in found["checked"]] == [("demo", "fp16"), ("demo", "int4-fp16")]
    for one in found["checked"]:
        assert one["failure"] is None
        assert all(parity["num_positions"] == 36 for parity in one["parities"])
        assert one["parities"][0]["mean_kl"] < 1e-6, "the same kernels on the same numbers"
        figures = one["figures"]
        assert figures["decode_tokens_per_s"].keys() == {"1", "2", "4"}
        assert figures["start_ms"].keys() == {"open", "session", "first_prefill", "first_decode", "second_decode"}
        assert figures["copies_in_decode"] == {}
        assert figures["prefill_tokens_per_s"] > 0
    text = (tmp_path / "results" / "gpu-check-cpu-provider.md").read_text()
    assert "- holds: no copy of the cache between host and device" in text
    assert "| 4 |" in text


def test_a_copy_of_the_cache_is_found_in_a_profile() -> None:
    def node(name: str, op_type: str) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": op_type}}

    harmless: list[dict[str, Any]] = [
        node("Memcpy_token_1", "MemcpyFromHost"),
        node("/model/Gather", "Gather"),
        {"cat": "Session"},
    ]
    assert copies_of([*harmless, harmless[0]]) == {"Memcpy_token_1": 2}
    assert not copies_the_cache(copies_of(harmless))
    assert copies_the_cache(copies_of([node("Memcpy_past_key_values.3.key", "MemcpyFromHost")]))


def figures(**changes: object) -> Figures:
    found = Figures({"num_slots": 64, "max_context_tokens": 256}, True, {})
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    ("model", "changes", "holds"),
    [
        ("qwen2.5-0.5b", {"decode_tokens_per_s": {1: 100.0, 64: 2000.0}}, True),
        ("qwen2.5-0.5b", {"decode_tokens_per_s": {1: 100.0, 64: 1999.0}}, False),
        ("smollm2-135m", {"decode_tokens_per_s": {1: 100.0, 64: 300.0}}, True),
        ("demo", {"copies_in_decode": {"Memcpy_present.0.key": 4}}, False),
        ("demo", {"memory_used_bytes": 101, "memory_bound_bytes": 100}, False),
        ("demo", {"memory_used_bytes": 100, "memory_bound_bytes": 100}, True),
    ],
)
def test_what_was_asked_is_judged(model: str, changes: dict[str, object], holds: bool) -> None:
    assert Report("a GPU", {}, [Checked(model, "fp16", figures=figures(**changes))]).holds is holds


def test_a_failure_and_a_divergence_are_no_success(tmp_path: Path) -> None:
    far = Parity("PyTorch", 10, 0.5, 0.4, 9.0, limit=0.02)
    for checked in (Checked("demo", "fp16", failure="RuntimeError: no kernel"), Checked("demo", "fp16", [far])):
        report = Report("NVIDIA L4", {"processor": "one"}, [checked])
        assert not report.holds
        as_json, as_text = report.write(tmp_path)
        assert as_json.name == "gpu-check-nvidia-l4.json"
        assert "**fails**" in as_text.read_text()


def test_predictions_are_compared_position_by_position() -> None:
    logits = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], np.float32)
    same = compare("itself", logits, logits, 0.01)
    assert (same.mean_kl, same.top1_agreement, same.holds) == (0.0, 1.0, True)
    other = compare("another", logits, logits[::-1].copy(), 0.01)
    assert (other.top1_agreement, other.holds) == (0.0, False)


@pytest.mark.model
def test_a_step_reads_every_weight_and_each_streams_tokens(demo_fp32: Artifact) -> None:
    once = step_bytes(demo_fp32, 1, 100)
    assert step_bytes(demo_fp32, 8, 100) - once == 7 * 100 * kv_bytes_per_token(demo_fp32)
    assert once > weights_bytes(demo_fp32)
