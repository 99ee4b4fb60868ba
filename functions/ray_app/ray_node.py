"""This node of the Ray cluster. Ray starts replacements of what runs on a node that it is told to drain."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

from pilotlight.host.notice import Notice

logger = logging.getLogger("pilotlight.ray")


def drain_this_node(notice: Notice) -> None:
    """Tell Ray that nothing new may come here, and that what is here has to be somewhere else.

    Ray has no public call for it. This is the one under its command `ray drain-node`, whose start alone would take some
    seconds of the time that is left.
    """
    why = f"{notice.kind} notice from {notice.source}"
    try:
        import ray
        from ray.core.generated import autoscaler_pb2

        context = ray.get_runtime_context()
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._raylet.GcsClient(address=context.gcs_address)
        accepted, problem = client.drain_node(context.get_node_id(), reason, why, deadline_ms(notice, time.time()))
    except Exception as error:  # noqa: BLE001 - whatever Ray raises: the replica leaves all the same
        accepted, problem = False, str(error)
    if not accepted:
        logger.warning("this node cannot be drained: %s", problem)


def deadline_ms(notice: Notice, now: float) -> int:
    """Return when the node will be gone, in milliseconds since 1970 as ``now`` is in seconds; 0 where nobody knows."""
    return round((now + notice.seconds_left) * 1000) if math.isfinite(notice.seconds_left) else 0


def is_replaced() -> bool:
    """Say whether another replica runs in the place of this process's, which was told to leave. May block."""
    from ray import serve

    context = serve.get_replica_context()
    deployments = serve.status().applications[context.app_name].deployments
    return replaced(
        {str(state.value): number for state, number in deployments[context.deployment].replica_states.items()}
    )


def replaced(states: Mapping[str, int]) -> bool:
    """Say the same of a deployment's replicas by state: some leave, some run, and none is on its way any more."""
    leaving = states.get("PENDING_MIGRATION", 0) + states.get("STOPPING", 0)
    return leaving > 0 and states.get("RUNNING", 0) > 0 and states.get("STARTING", 0) == 0
