"""AWS's own Runtime Interface Emulator, from the wheel that it is shipped in."""

from __future__ import annotations

import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator's binary; its wheel is downloaded, not installed, and nothing else of it is used."""
    directory = tmp_path_factory.mktemp("emulator")
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, "aws-sam-cli"]
    downloaded = subprocess.run(command, capture_output=True, text=True, timeout=120)
    wheel = next(directory.glob("aws_sam_cli-*.whl"), None)
    if wheel is None:
        pytest.skip(f"aws-sam-cli cannot be downloaded: {downloaded.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheel) as archive:
        member = f"samcli/local/rapid/aws-lambda-rie-{MACHINES[platform.machine()]}"
        binary = Path(archive.extract(member, directory))
    binary.chmod(0o755)
    return binary
