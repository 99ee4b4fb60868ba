"""Which replica an attempt goes to: Serve asks, and our own routing answers, by tokens and by known prefixes.

Serve takes this module by value: nothing that changes may lie in its globals (see ``ray_replicas``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import takewhile
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

import ray_replicas
from pilotlight.host.routing import Choice, route


class PrefixRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Prefers the replica with the least work, unless another one has computed the prompt's beginning."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:  # without it, Serve asks again and again, and does nothing else meanwhile
            pending_request.routing_context.should_backoff = True
        await asyncio.sleep(0)  # what was given a place is sent now, and counted
        staying = [one for one in candidate_replicas if not ray_replicas.is_spared(self._pool, _key(one.replica_id))]
        if pending_request is None or not staying:
            return [staying] if staying else []
        if pending_request.metadata.multiplexed_model_id:
            preferred = self.apply_multiplex_routing(pending_request=pending_request)
            having = [one for one in staying if one.replica_id in preferred]
            staying = having or staying
        choices = [self._choice(one, pending_request) for one in staying]
        best = staying[route(choices)]
        return [[best], [one for one in staying if one is not best]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        ray_replicas.present(self._pool, {_key(one.replica_id): one.max_ongoing_requests for one in replicas})
        super().update_replicas(replicas)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        if (known := ray_replicas.known(self._pool, _key(replica_id))) is not None:
            known.prefixes.add(pending_request.kwargs.get("blocks", ()))
            known.work[pending_request.metadata.internal_request_id] = int(pending_request.kwargs.get("num_tokens", 1))

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        if (known := ray_replicas.known(self._pool, _key(replica_id))) is not None:
            known.work.pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        ray_replicas.forget(self._pool, _key(replica_id))

    def on_replica_actor_unavailable(self, replica_id: Any) -> None:
        super().on_replica_actor_unavailable(replica_id)
        ray_replicas.suspect(self._pool, _key(replica_id))

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Put what was moved before all that waits: its client has seen a part of the answer, or waited before.

        Serve gives what it tries again another place than the last one; there is no public way to ask for that.
        """
        is_retry = is_retry or _is_moved(pending_request)
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Give a place away, not always to the request that it was sought for: then the next is sought without a pause.

        Serve takes such a try for a failed one, and pauses longer after each.
        """
        super()._fulfill_next_pending_request(replica, request_metadata)
        if (waiting := self._get_pending_request_matching_internal_request_id(request_metadata)) is not None:
            waiting.routing_context.should_backoff = False

    def _insert_pending_request_sorted(self, queue: deque[PendingRequest], pending_request: PendingRequest) -> None:
        if _is_moved(pending_request):
            queue.insert(sum(1 for _ in takewhile(_is_moved, queue)), pending_request)
        else:
            super()._insert_pending_request_sorted(queue, pending_request)

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        super()._add_pending_request_to_indices(pending_request)
        of_function = self._pending_requests_by_model_id.get(pending_request.metadata.multiplexed_model_id)
        if of_function and _is_moved(pending_request) and of_function[-1] is pending_request:
            of_function.appendleft(of_function.pop())

    @property
    def _pool(self) -> str:
        return str(self._deployment_id.name)

    def _choice(self, replica: RunningReplica, request: PendingRequest) -> Choice:
        known = ray_replicas.known(self._pool, _key(replica.replica_id))
        if known is None:
            return Choice(0, 0)
        return known.choice(request.kwargs.get("blocks", ()), int(request.kwargs.get("block_tokens", 0)))


def _is_moved(request: PendingRequest) -> bool:
    return bool(request.kwargs.get("moved"))


def _key(replica_id: Any) -> str:
    return str(replica_id.unique_id)
