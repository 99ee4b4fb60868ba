"""The wheel with its runtime dependencies only, in an empty environment: it serves, and there is no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from pilotlight.artifact import Artifact
from support import server_process

pytestmark = [pytest.mark.e2e, pytest.mark.model]

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "transformers", "optimum", "onnx", "onnx_ir", "safetensors")


@pytest.fixture(scope="module")
def runtime_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a fresh environment with ``pilotlight[cpu]`` in it."""
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # the development environment has the build backend already, so nothing is fetched to build
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = directory.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(directory / "env")], check=True)
    python = str(directory / "env" / "bin" / "python")
    install = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--retries", "10"]
    subprocess.run([*install, "--timeout", "60", f"{wheel}[cpu]"], check=True)
    return python


def test_an_empty_environment_serves_the_artifact(runtime_python: str, demo_int4: Artifact, tmp_path: Path) -> None:
    probe = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in {ABSENT!r}))"
    assert subprocess.run([runtime_python, "-c", probe], cwd=tmp_path).returncode == 0
    with (
        server_process(demo_int4.path, tmp_path / "usage.db", python=runtime_python) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hello!"}])
    assert answer.choices[0].message.content == (
        "Hello! I can add numbers, convert units, sort words and tell short stories."
    )


def test_exporting_without_the_extra_is_one_line(runtime_python: str, tmp_path: Path) -> None:
    command = [runtime_python, "-m", "pilotlight", "export", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "pilotlight[export]" in done.stderr
