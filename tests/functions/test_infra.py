"""The templates, as far as that goes without an account, and the image's context, as far as without an image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fake_runtime_api import fake_runtime_api
from pilotlight.artifact import Artifact
from pilotlight.metering.dynamodb_ledger import OPEN_INDEX

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra" / "lambda"
TERRAFORM = shutil.which("terraform")
SAM = shutil.which("sam") or shutil.which("sam", path=str(ROOT / ".venv-sam" / "bin"))


def run(*command: str, cwd: Path = ROOT, timeout_s: int = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)


def test_cfn_lint_accepts_the_sam_template() -> None:
    done = run(str(Path(sys.executable).with_name("cfn-lint")), str(INFRA / "template.yaml"))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(SAM is None, reason="there is no sam; make sam-validate installs it into .venv-sam")
def test_sam_accepts_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SAM is not None
    monkeypatch.setenv("SAM_CLI_TELEMETRY", "0")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    done = run(SAM, "validate", "--lint", "--template", str(INFRA / "template.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is a valid SAM Template" in done.stdout


def test_both_templates_set_what_the_function_reads() -> None:
    for template in (INFRA / "template.yaml", INFRA / "terraform" / "main.tf"):
        named = set(re.findall(r"PILOTLIGHT_\w+", template.read_text()))
        read = {"ARTIFACT", "LEDGER_TABLE", "REQUIRE_KEYS", "RESUME_SECRET"}
        assert named == {f"PILOTLIGHT_{name}" for name in read}


def test_both_templates_make_the_index_that_the_ledger_reads() -> None:
    for template in (INFRA / "template.yaml", INFRA / "terraform" / "main.tf"):
        text = template.read_text()
        assert OPEN_INDEX in text
        assert {"request_id", "open_in", "lease_until", "environment"} <= set(re.findall(r"\w+", text))


@pytest.mark.skipif(TERRAFORM is None, reason="terraform is not installed")
def test_terraform_accepts_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_DISABLE", "1")  # or it asks for news, and leaves a file in the home directory
    assert TERRAFORM is not None
    module = tmp_path / "module"
    shutil.copytree(INFRA / "terraform", module)
    formatted = run(TERRAFORM, "fmt", "-check", "-diff", cwd=module)
    assert (formatted.returncode, formatted.stdout) == (0, "")
    prepared = run(TERRAFORM, "init", "-backend=false", "-input=false", "-no-color", cwd=module)
    if prepared.returncode != 0:
        pytest.skip("terraform validate needs the AWS provider, which cannot be had here")
    validated = run(TERRAFORM, "validate", "-no-color", cwd=module)
    assert validated.returncode == 0, validated.stdout + validated.stderr


@pytest.mark.e2e
@pytest.mark.model
def test_the_images_context_serves(demo_int4: Artifact, tmp_path: Path) -> None:
    context = tmp_path / "context"
    assume_ready = ["-o", str(Path(".venv", "ready")), f"BIN={Path(sys.executable).parent}"]
    target = ["package", "TARGET=lambda", f"ARTIFACT={demo_int4.path}", f"LAMBDA_CONTEXT={context}"]
    packaged = run("make", *assume_ready, *target)
    assert packaged.returncode == 0, packaged.stderr
    assert re.search(rf"\d\S*\s+{re.escape(str(context))}$", packaged.stdout, re.MULTILINE), "no size"
    assert {path.name for path in context.iterdir()} >= {"Containerfile", "artifact", "aws_lambda", "pilotlight.toml"}
    with fake_runtime_api() as platform:
        variables = {
            **os.environ,
            "AWS_LAMBDA_RUNTIME_API": platform.address,
            "PILOTLIGHT_CONFIG": str(context / "pilotlight.toml"),
            "PILOTLIGHT_ARTIFACT": str(context / "artifact"),
            "PILOTLIGHT_LEDGER": str(tmp_path / "usage.db"),
        }
        command = [sys.executable, "bootstrap.py"]
        with subprocess.Popen(command, cwd=context / "aws_lambda", env=variables, stdout=subprocess.DEVNULL) as process:
            answer = json.loads(platform.invoke({"model": demo_int4.path.name, "prompt": "Once"}).body())
            process.kill()
    assert answer["usage"]["completion_tokens"] >= 1
