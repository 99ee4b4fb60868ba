"""What a result depends on: the processor, its threads, and the code that was measured."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe_machine(num_threads: int) -> dict[str, object]:
    """Return processor, cache, memory and threads; nothing that names the machine."""
    return {
        "processor": _cpuinfo("model name") or platform.processor(),
        "instructions": [flag for flag in FLAGS if flag in _cpuinfo("flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "threads_of_each_peer": num_threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of this project, marked where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
