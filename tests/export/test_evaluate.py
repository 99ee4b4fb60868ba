"""Artifacts side by side: what is measured, what is compared, and which one the limits leave."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from pilotlight.artifact import Artifact, open_artifact
from pilotlight_export.cli import main
from pilotlight_export.errors import EvaluationError
from pilotlight_export.evaluate.budget import FIGURES, Limit, judge, limits_of
from pilotlight_export.evaluate.evaluation import built_in_text
from pilotlight_export.evaluate.figures import Row, Spread, spread_of
from pilotlight_export.evaluate.plot import plot
from pilotlight_export.evaluate.quality import measure_qualities
from pilotlight_export.evaluate.speed import measure_speeds
from pilotlight_export.evaluate.table import HEAD, table, verdict_lines
from pilotlight_export.verify.reference import Reference

TEXT = "The ferry left at noon, and the island was quiet again."
SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, size_mb: float, **changes: object) -> Row:
    base = Row(
        name=name,
        model="model",
        precision="int4",
        size_mb=size_mb,
        memory_mb=100.0,
        prefill_tps=Spread(400.0, 300.0, 500.0),
        decode_tps=Spread(50.0, 40.0, 60.0),
        bits_per_byte=1.5,
        perplexity=20.0,
        top1_agreement=0.95,
        mean_kl=0.02,
        p99_kl=0.2,
        compared_with="large",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


LARGE = row("large", 400.0, mean_kl=0.0, top1_agreement=1.0, decode_tps=Spread(20.0, 18.0, 22.0))
MIDDLE = row("middle", 200.0, mean_kl=0.001, top1_agreement=0.99)
SMALL = row("small", 100.0)


def ignore(*_: int) -> None:
    """Take no notice of progress."""


def test_the_smallest_that_meets_every_limit_is_chosen() -> None:
    assert judge([LARGE, SMALL, MIDDLE], limits_of({"max_kl": 0.01})).chosen == "middle"
    assert judge([LARGE, SMALL, MIDDLE], limits_of({"max_kl": 0.01, "min_decode_tps": None})).chosen == "middle"
    assert judge([LARGE, SMALL, MIDDLE], limits_of({"min_top1": 0.9})).chosen == "small"


def test_where_none_does_every_artifact_says_why() -> None:
    verdict = judge([LARGE, SMALL], limits_of({"max_kl": 0.01, "min_decode_tps": 30.0}))
    assert verdict.chosen is None
    assert verdict.complaints == {
        "large": ["decode_tps is 20, not at least 30"],
        "small": ["mean_kl is 0.02, not at most 0.01"],
    }
    assert verdict_lines(verdict) == (
        "no artifact meets every limit:\n"
        "  large: decode_tps is 20, not at least 30\n"
        "  small: mean_kl is 0.02, not at most 0.01"
    )


def test_a_limit_is_met_at_its_bound_and_never_by_what_is_no_number() -> None:
    assert Limit("mean_kl", 0.02, "at most").is_met_by(SMALL)
    assert Limit("top1_agreement", 0.95, "at least").is_met_by(SMALL)
    assert not Limit("mean_kl", 0.02, "at most").is_met_by(row("broken", 1.0, mean_kl=float("nan")))


def test_every_limit_is_an_option_and_bounds_a_figure() -> None:
    options = {parameter.name for parameter in main.commands["evaluate"].params}
    assert FIGURES.keys() <= options
    assert all(hasattr(SMALL, figure) for figure in FIGURES.values())


def test_a_spread_is_a_median_between_extremes() -> None:
    assert spread_of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)


def test_the_table_has_a_line_for_each_artifact() -> None:
    head, *lines = table([LARGE, SMALL]).splitlines()
    assert [part for part in HEAD if part not in head] == []
    assert lines[0].split()[:2] == ["large", "400.0"]
    assert "50 (40–60)" in lines[1]
    assert len({len(line) for line in (head, *lines)}) == 1


def test_the_plot_shows_every_artifact_in_three_panels() -> None:
    root = ElementTree.fromstring(plot([LARGE, row("a <b>", 50.0)]))
    labels = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert labels.count("large") == labels.count("a <b>") == 3
    assert any("Mean KL from large" in label for label in labels)
    places = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert len(places) == 6
    assert all(0 < x < width and 0 < y < height for x, y in places)


def test_between_models_the_plot_shows_what_can_be_compared() -> None:
    drawn = plot([LARGE, row("other", 50.0, model="other")])
    assert "Bits per byte" in drawn
    assert "Mean KL" not in drawn


def test_one_artifact_alone_can_be_plotted() -> None:
    ElementTree.fromstring(plot([row("alone", 10.0, mean_kl=0.0, memory_mb=0.0)]))


@pytest.mark.model
def test_quality_is_the_loss_of_every_byte(artifacts: dict[str, Artifact], tiny_llama: Path) -> None:
    (quality,) = measure_qualities([artifacts["fp32"]], TEXT, ignore)
    tokens = [0, *(token for token in _bytes_as_tokens(artifacts["fp32"], TEXT))]
    logits = Reference(tiny_llama).logits(tokens, range(len(tokens) - 1)).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    nats = -np.log(probabilities[np.arange(len(logits)), tokens[1:]])
    assert len(nats) == len(TEXT.encode())
    assert quality.bits_per_byte == pytest.approx(nats.mean() / np.log(2), rel=1e-3)
    assert quality.perplexity == pytest.approx(np.exp(nats.mean()), rel=1e-3)


def _bytes_as_tokens(artifact: Artifact, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(artifact.tokenizer_path)).encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.model
def test_artifacts_are_compared_with_the_most_precise_one(artifacts: dict[str, Artifact]) -> None:
    given = [artifacts[precision] for precision in ("int4", "fp32", "int8")]
    int4, fp32, int8 = measure_qualities(given, built_in_text()[:500], ignore)
    assert (fp32.mean_kl, fp32.top1_agreement) == (0.0, 1.0)
    assert 0 < int8.mean_kl < int4.mean_kl
    assert {quality.compared_with for quality in (int4, fp32, int8)} == {"fp32"}
    (alone,) = measure_qualities([artifacts["int4"]], TEXT, ignore)
    assert (alone.compared_with, alone.mean_kl) == ("int4", 0.0)


@pytest.mark.model
def test_another_model_is_compared_with_its_own(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    other = shutil.copytree(artifacts["int4"].path, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["model"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    fp32, another = measure_qualities([artifacts["fp32"], open_artifact(other)], TEXT, ignore)
    assert (fp32.compared_with, another.compared_with) == ("fp32", "other")


@pytest.mark.model
def test_evaluate_on_the_command_line(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    paths = [str(artifacts[precision].path) for precision in ("fp32", "int8", "int4")]
    (tmp_path / "text").write_text(TEXT)
    command = ["evaluate", *paths, "--text", str(tmp_path / "text"), "--plot", str(tmp_path / "plot.svg")]
    done = CliRunner().invoke(main, [*command, "--max-kl", "1e-9", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["artifacts"]] == ["fp32", "int8", "int4"]
    assert found["verdict"]["chosen"] == "fp32"
    sizes = [row["size_mb"] for row in found["artifacts"]]
    assert sizes == sorted(sizes, reverse=True)
    for measured in found["artifacts"]:
        assert 0 < measured["decode_tps"]["least"] <= measured["decode_tps"]["median"] <= measured["decode_tps"]["most"]
        assert 20 < measured["memory_mb"] < 1000
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


@pytest.mark.model
def test_without_an_artifact_that_will_do_the_status_is_1(artifacts: dict[str, Artifact]) -> None:
    done = CliRunner().invoke(main, ["evaluate", str(artifacts["int4"].path), "--max-size-mb", "0.001"])
    assert done.exit_code == 1
    assert "no artifact meets every limit:\n  int4: size_mb is " in done.stdout


@pytest.mark.model
def test_an_artifact_that_cannot_be_run_is_one_line(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(artifacts["fp32"].path, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(bytes((broken / "model.onnx").stat().st_size))
    with pytest.raises(EvaluationError, match=r"broken: cannot be run \(") as caught:
        measure_speeds([broken], ignore)
    assert len(caught.value.message.splitlines()) == 1


def test_wrong_usage(tmp_path: Path, toy_artifact: Artifact) -> None:
    assert CliRunner().invoke(main, ["evaluate"]).exit_code == 2
    assert CliRunner().invoke(main, ["evaluate", "a", "--plot", "picture.bmp"]).exit_code == 2
    assert CliRunner().invoke(main, ["evaluate", "a", "--min-top1", "97"]).exit_code == 2
    missing = CliRunner().invoke(main, ["evaluate", str(tmp_path / "nowhere")])
    assert (missing.exit_code, missing.stderr) == (1, f"pilotlight evaluate: {tmp_path}/nowhere: does not exist\n")
    twice = CliRunner().invoke(main, ["evaluate", str(toy_artifact.path), str(toy_artifact.path)])
    assert twice.exit_code == 1
    assert "is named twice" in twice.stderr
