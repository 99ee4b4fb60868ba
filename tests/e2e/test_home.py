"""What a run leaves in the home directory of whoever runs it: the cache, and nothing of anybody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pilotlight.artifact import Artifact

FREE = ("PILOTLIGHT_CACHE_DIR", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")


def test_only_the_cache_is_left(demo_int4: Artifact, tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    kept = {key: value for key, value in os.environ.items() if key not in FREE}
    environment = {**kept, "HOME": str(home), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "pilotlight", "invoke", str(demo_int4.path), "Hello!"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    files = [path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()]
    assert set(files) == {(".cache", "pilotlight")}
    assert list(temporary.iterdir()) == []
