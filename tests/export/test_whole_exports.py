"""What only whole exports in processes of their own can show: the same bytes each time, and bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import write_model

pytestmark = pytest.mark.model

WORKING_BYTES = 200_000_000
"""What activations and the quantization of one weight take, however small the model is."""

PEAK = """
import io, json, sys
from pathlib import Path
from pilotlight_export.export import export_model
from pilotlight_export.progress import Progress

def memory_bytes(name):
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024

small, large, out = sys.argv[1:]
export_model(small, Path(out) / "small-int4", precision="int4", progress=Progress(io.StringIO()))
before = memory_bytes("VmRSS:")
export_model(large, Path(out) / "large-int4", precision="int4", progress=Progress(io.StringIO()))
print(json.dumps({"before": before, "peak": memory_bytes("VmHWM:")}))
"""


def test_an_export_gives_the_same_bytes_whatever_the_process(tiny_llama: Path, tmp_path: Path) -> None:
    outs = [tmp_path / seed / "out" for seed in ("1", "2")]
    for out in outs:
        command = [sys.executable, "-m", "pilotlight_export", "export", str(tiny_llama), "--out", str(out)]
        env = {**os.environ, "PYTHONHASHSEED": out.parent.name}
        subprocess.run(command, check=True, capture_output=True, env=env)
    files = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_within_three_times_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    large = write_model(
        tmp_path / "large",
        vocab_size=8192,
        hidden_size=896,
        initializer_range=0.02,
        intermediate_size=3584,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=7,
    )
    size_bytes = (large / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, str(tiny_llama), str(large), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert size_bytes > 120_000_000
    assert found["peak"] - found["before"] <= 3 * size_bytes + WORKING_BYTES
