"""The texts beside the graph, and the progress that a person sees."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pilotlight_export.pack import read_chat_template
from pilotlight_export.progress import Progress


def write_config(directory: Path, chat_template: object) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))


def test_a_template_in_its_own_file_comes_first(tmp_path: Path) -> None:
    write_config(tmp_path, "from the config")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert read_chat_template(tmp_path) == "from the file"


def test_of_several_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    write_config(tmp_path, [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}])
    assert read_chat_template(tmp_path) == "yes"


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_progress_is_one_plain_line_a_stage() -> None:
    stream = io.StringIO()
    with Progress(stream).stage("Fuse") as stage:
        stage.show_count(1, 2)
        stage.outcome = "57 nodes"
    assert stream.getvalue() == "  Fuse: 57 nodes (0.0 s)\n"


def test_on_a_terminal_progress_is_one_live_line() -> None:
    stream = Terminal()
    with Progress(stream).stage("Quantize") as stage:
        stage.show_count(1, 2)
    shown = stream.getvalue().split("\r\x1b[2K")
    assert shown == ["", "  Quantize …", "  Quantize … 1 of 2", "  Quantize (0.0 s)\n"]


def test_a_failing_stage_clears_its_line() -> None:
    stream = Terminal()
    with pytest.raises(ValueError, match="no"), Progress(stream).stage("Fuse"):
        raise ValueError("no")
    assert stream.getvalue().endswith("\r\x1b[2K")
