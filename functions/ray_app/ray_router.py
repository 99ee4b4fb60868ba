"""Which replica an attempt goes to: Serve asks, and our own routing answers, by tokens and by known prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from pilotlight.host.routing import Choice, route

CROWDED_TOKENS = 1_000_000
"""A replica without a free slot comes after all others, whatever it knows."""

MAX_REMEMBERED_BLOCKS = 4096

_leaving: set[str] = set()


def leave_out(replica_id: str) -> None:
    """Send nothing more to a replica that hands over. All routers of a process heed it."""
    _leaving.add(replica_id.rpartition("-")[2])


class PrefixRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Prefers the replica with the least work, unless another one has computed the prompt's beginning."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._prefixes: dict[str, _SentPrefixes] = {}
        self._work: dict[str, dict[str, int]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        staying = [one for one in candidate_replicas if _key(one.replica_id) not in _leaving]
        if pending_request is None or not staying:
            return [staying] if staying else []
        if pending_request.metadata.multiplexed_model_id:
            preferred = self.apply_multiplex_routing(pending_request=pending_request)
            having = [one for one in staying if one.replica_id in preferred]
            staying = having or staying
        choices = [self._choice(one, pending_request) for one in staying]
        best = staying[route(choices)]
        return [[best], [one for one in staying if one is not best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        key = _key(replica_id)
        self._prefixes.setdefault(key, _SentPrefixes()).add(pending_request.kwargs.get("blocks", ()))
        num_tokens = int(pending_request.kwargs.get("num_tokens", 1))
        self._work.setdefault(key, {})[pending_request.metadata.internal_request_id] = num_tokens

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._work.get(_key(replica_id), {}).pop(internal_request_id, None)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._prefixes.pop(_key(replica_id), None)
        self._work.pop(_key(replica_id), None)

    def _choice(self, replica: RunningReplica, request: PendingRequest) -> Choice:
        key = _key(replica.replica_id)
        work = self._work.get(key, {})
        crowded = CROWDED_TOKENS if len(work) >= replica.max_ongoing_requests else 0
        num_blocks = self._prefixes[key].num_known(request.kwargs.get("blocks", ())) if key in self._prefixes else 0
        return Choice(sum(work.values()) + crowded, num_blocks * int(request.kwargs.get("block_tokens", 0)))


class _SentPrefixes:
    """The blocks of prompts that were sent to a replica lately. Serve's replicas do not tell which they still keep."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, None] = {}

    def add(self, blocks: Iterable[bytes]) -> None:
        for block in blocks:
            self._blocks.pop(block, None)
            self._blocks[block] = None
        while len(self._blocks) > MAX_REMEMBERED_BLOCKS:
            del self._blocks[next(iter(self._blocks))]

    def num_known(self, blocks: Iterable[bytes]) -> int:
        """Return how many of a prompt's blocks, from its beginning, are among them."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, blocks))


def _key(replica_id: Any) -> str:
    return str(replica_id.unique_id)
