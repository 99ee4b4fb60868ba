"""This node of the Ray cluster. Ray starts replacements of what runs on a node that it is told to drain."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path

from pilotlight.host.notice import Notice

logger = logging.getLogger("pilotlight.ray")

DRAIN_TIMEOUT_S = 60.0


def drain_this_node(notice: Notice) -> None:
    """Tell Ray that nothing new may come here. Ray has no public call for it in Python, only a command."""
    import ray

    context = ray.get_runtime_context()
    command = [
        *(str(Path(sys.executable).with_name("ray")), "drain-node", "--address", context.gcs_address),
        *("--node-id", context.get_node_id(), "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", f"{notice.kind} notice from {notice.source}"),
    ]
    if math.isfinite(notice.seconds_left):
        command += ["--deadline-remaining-seconds", str(max(1, int(notice.seconds_left)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_TIMEOUT_S)  # noqa: S603
    if done.returncode != 0:
        logger.warning("this node cannot be drained: %s", done.stderr.strip()[-500:])
