"""Verification on demand, on a text of the user's choice, and with a limit of the user's choice; the report."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.artifact import MANIFEST, WEIGHTS, Artifact, open_artifact
from pilotlight.errors import ArtifactError
from pilotlight_export.cli import main
from pilotlight_export.errors import TextError, VerificationError
from pilotlight_export.export import export_model
from pilotlight_export.progress import Progress
from pilotlight_export.report import MEANINGS, report
from pilotlight_export.reverify import verify_artifact
from pilotlight_export.verify.consistency import Consistency, check_consistency
from pilotlight_export.verify.fidelity import Fidelity, check_fidelity
from pilotlight_export.verify.text import MAX_TEXT_BYTES, read_text, split_text
from tiny_models import write_model

SILENT = Progress(io.StringIO())
PROSE = "The lamp burns low tonight, and nobody goes out to trim it. " * 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(PROSE)
    return path


def copy_of(artifact: Artifact, path: Path) -> Path:
    return Path(shutil.copytree(artifact.path, path))


def seal_again(path: Path) -> None:
    """Make a manifest fit its weights, as somebody would who means to deceive."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][WEIGHTS]["sha256"] = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


def damage(path: Path) -> None:
    weights = bytearray((path / WEIGHTS).read_bytes())
    weights[4096:8192] = bytes(4096)
    (path / WEIGHTS).write_bytes(weights)


def fidelity(**changes: float) -> Fidelity:
    figures: dict[str, Any] = {"mean_kl": 0.01, "decode_mean_kl": 0.01}
    return Fidelity(top1_agreement=1.0, p99_kl=0.1, perplexity_ratio=1.0, num_positions=9, **figures | changes)


@pytest.mark.model
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_verifying_again_gives_the_figures_of_the_manifest(
    artifacts: dict[str, Artifact], tiny_llama: Path, precision: str
) -> None:
    artifact = artifacts[precision]
    confirmation = verify_artifact(artifact.path, str(tiny_llama), progress=SILENT)
    assert confirmation.figures == artifact.manifest.verification
    assert (confirmation.artifact, confirmation.source) == (artifact.digest, "tiny-llama")


@pytest.mark.model
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_weights_that_were_altered_and_sealed_again_are_found_out(
    artifacts: dict[str, Artifact], tiny_llama: Path, tmp_path: Path, precision: str
) -> None:
    path = copy_of(artifacts[precision], tmp_path / "copy")
    damage(path)
    with pytest.raises(ArtifactError, match="was altered"):
        verify_artifact(path, str(tiny_llama), progress=SILENT)
    seal_again(path)
    with pytest.raises(VerificationError, match=r"differ from PyTorch's by|diverge from fp32"):
        verify_artifact(path, str(tiny_llama), max_kl=0.1, progress=SILENT)


@pytest.mark.model
def test_another_source_is_found_out(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    wider = write_model(tmp_path / "wider", head_dim=32)
    with pytest.raises(VerificationError, match="wider is not the artifact's source: its shape is"):
        verify_artifact(artifacts["fp32"].path, str(wider), progress=SILENT)


@pytest.mark.model
def test_verify_on_the_command_line(artifacts: dict[str, Artifact], tiny_llama: Path, text: Path) -> None:
    command = ["verify", str(artifacts["int8"].path), "--source", str(tiny_llama), "--text", str(text)]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["artifact"] == artifacts["int8"].digest
    assert found["figures"]["text"] == f"sha256:{hashlib.sha256(PROSE.encode()).hexdigest()}"
    assert found["figures"]["num_positions"] > len(PROSE) - 10  # a token a byte, but for the first of each piece
    failed = CliRunner().invoke(main, [*command, "--max-kl", "0"])
    assert (failed.exit_code, failed.stdout) == (1, "")
    last_line = failed.stderr.splitlines()[-1]
    assert last_line.startswith("pilotlight verify: the predictions diverge from fp32 by a mean KL of 0.0")
    assert last_line.endswith("; allowed is 0")


@pytest.mark.model
def test_an_export_beyond_its_limit_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(VerificationError, match="allowed is 1e-06"):
        export_model(str(tiny_llama), out, precision="int4", max_kl=1e-6, progress=SILENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_an_export_on_a_text_says_which(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    manifest = export_model(str(tiny_llama), tmp_path / "out", precision="int8", text_path=text, progress=SILENT)
    assert manifest.verification["text"] == read_text(text).digest
    assert "--text FILE" in (tmp_path / "out" / "report.md").read_text()
    assert PROSE[:20] not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot be read"),
        (b"", "has no text in it"),
        (b" one \n", "has no text in it"),
        (b"two words \xff", r"is not UTF-8 text \(byte 10\)"),
    ],
)
def test_a_text_that_is_none(tmp_path: Path, content: bytes | None, line: str) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(TextError, match=line):
        read_text(tmp_path / "text")


def test_of_a_long_text_the_beginning_is_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x " + "ß" * MAX_TEXT_BYTES)
    assert len(read_text(tmp_path / "text").content.encode()) == MAX_TEXT_BYTES
    (tmp_path / "text").write_text("xx " + "ß" * MAX_TEXT_BYTES)
    assert len(read_text(tmp_path / "text").content.encode()) == MAX_TEXT_BYTES - 1


@given(st.text(), st.integers(4, 50))
def test_pieces_are_short_and_together_the_text(text: str, max_bytes: int) -> None:
    pieces = split_text(text, max_bytes)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)


def test_words_stay_whole_where_they_can() -> None:
    assert split_text("one two three", 9) == ["one two ", "three"]
    assert split_text("onetwothree", 6) == ["onetwo", "three"]


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_a_graph_that_contradicts_itself_is_refused(difference: float) -> None:
    check_consistency(Consistency(1e-4, 1e-4))
    with pytest.raises(VerificationError, match="step by step differ from its own"):
        check_consistency(Consistency(difference, 0.0))
    with pytest.raises(VerificationError, match="in a batch differ from its own"):
        check_consistency(Consistency(0.0, difference))


def test_a_limit_holds_in_one_pass_and_step_by_step() -> None:
    check_fidelity(fidelity(), None)
    check_fidelity(fidelity(), 0.01)
    with pytest.raises(VerificationError, match=r"the predictions diverge .* 0\.02; allowed is 0\.01"):
        check_fidelity(fidelity(mean_kl=0.02), 0.01)
    with pytest.raises(VerificationError, match=r"the predictions step by step diverge .* 0\.02; allowed is 0\.01"):
        check_fidelity(fidelity(decode_mean_kl=0.02), 0.01)


def test_a_model_that_says_something_else_is_refused_without_a_limit_too() -> None:
    with pytest.raises(VerificationError, match="allowed is 1"):
        check_fidelity(fidelity(mean_kl=3.0), None)


@pytest.mark.model
def test_the_report_tells_what_the_manifest_knows(artifacts: dict[str, Artifact]) -> None:
    for precision, artifact in artifacts.items():
        found = (artifact.path / "report.md").read_text()
        assert "report.md" in artifact.manifest.files
        assert found.startswith(f"# tiny-llama, {precision}\n")
        assert "apache-2.0" in found
        for name, value in artifact.manifest.verification.items():
            assert f"| `{name}` | {value} | {MEANINGS[name]} |" in found
        for name, entry in artifact.manifest.files.items():
            assert (entry.sha256 in found) == (name != "report.md")
        assert f"--precision {precision}" in found


@pytest.mark.model
def test_the_report_names_the_commit_and_nothing_of_the_machine(artifacts: dict[str, Artifact]) -> None:
    manifest = json.loads((artifacts["int4"].path / MANIFEST).read_text())
    manifest["source"]["revision"] = "0123abc"
    altered = artifacts["int4"].path.parent / "altered"
    shutil.copytree(artifacts["int4"].path, altered)
    (altered / MANIFEST).write_text(json.dumps(manifest))
    found = report(open_artifact(altered).manifest)
    assert "pilotlight export tiny-llama --revision 0123abc --precision int4" in found
    assert str(altered.parent) not in found
