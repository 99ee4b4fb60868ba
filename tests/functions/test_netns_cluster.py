"""The machines of the cluster demo: what is left of them when the program is ended, or killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netns_cluster import LOCK, namespaces
from processes import wait_for
from support import PATIENCE_S

PROGRAM = """
import signal, sys
from netns_cluster import Unable, cluster
try:
    with cluster(sys.executable) as found:
        node = found.add("test")
        node.popen("sleep", "600")
        while not node.pids():
            pass
        print(found.folder, *node.pids(), flush=True)
        signal.pause()
except Unable as error:
    print("unable:", error, flush=True)
"""


def started() -> tuple[subprocess.Popen[str], Path, int]:
    """Start a program with one machine, on which one process runs; return its folder and that process."""
    paths = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if line.startswith("unable"):
        process.communicate()
        pytest.skip(line)
    folder, pid = line.split()[:2]
    return process, Path(folder), int(pid)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_sigterm_takes_the_machines_and_their_network_away() -> None:
    process, folder, pid = started()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM
    wait_for(lambda: not is_running(pid))
    assert not namespaces()
    assert not folder.exists()
    assert "plbr0" not in subprocess.run(["ip", "link"], capture_output=True, text=True).stdout


def test_what_a_killed_program_left_goes_with_the_next_one() -> None:
    process, folder, pid = started()
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert namespaces() == ["pl-test"]
    again, _, _ = started()
    wait_for(lambda: not is_running(pid))
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=PATIENCE_S)
    assert not namespaces()
    shutil.rmtree(folder)


def test_there_is_one_such_network_on_a_machine() -> None:
    process, _, _ = started()
    try:
        with pytest.raises(pytest.skip.Exception, match="another cluster"):
            started()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert LOCK.exists()
