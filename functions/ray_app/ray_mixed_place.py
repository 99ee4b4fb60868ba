"""Two deployments of one function, on demand and on spot machines, as one place. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import ray_replicas
from pilotlight.host.attempt import Attempt, FromAttempt
from pilotlight.host.routing import Choice, prefix_keys, route
from pilotlight.host.wire import ReplicaSpec
from pilotlight.metering.record import Capacity

LOOK_AGAIN_S = 0.1
"""How often an attempt that waits at a deployment without replicas looks whether the other one has some."""


def spot_name(pool: str) -> str:
    """Return what the deployment of a pool on spot machines is called."""
    return f"{pool}-spot"


def capacity_of(replica_id: str, pool: str) -> Capacity:
    """Return how the machine of a replica of a mixed pool is paid for: replicas begin with their deployment's name."""
    return Capacity.SPOT if replica_id.rpartition("-")[0] == spot_name(pool) else Capacity.ON_DEMAND


class Deployed(Protocol):
    """One of the two."""

    deployment: str

    def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        """See ``host.remote.Place``."""

    def leaving(self, replica_id: str) -> None:
        """See ``host.remote.Place``."""


class MixedPlace:
    """Sends each attempt to the best replica of both deployments, as far as this process knows them.

    Without any replica it waits on demand: there the first one of a function starts. What waits at a deployment whose
    last replica is gone goes to the other one as soon as that has some.
    """

    def __init__(self, on_demand: Deployed, spot: Deployed, spec: ReplicaSpec) -> None:
        self._places = (on_demand, spot)
        self._policy = spec.policy
        self._unanswered: Counter[str] = Counter()

    async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        first = None
        while first is None:
            place = self._choose(attempt)
            async with aclosing(place.attempt(attempt)) as answers:
                if (first := await self._first(attempt, answers, place)) is not None:
                    for answer in first:
                        yield answer
                    async for answer in answers:
                        yield answer

    def leaving(self, replica_id: str) -> None:
        self._places[0].leaving(replica_id)

    def _choose(self, attempt: Attempt) -> Deployed:
        known = [(place, one) for place in self._places for one in ray_replicas.staying(place.deployment).values()]
        if not known:
            return self._places[0]
        keys = [attempt.function.encode() + key for key in prefix_keys(attempt.sequence, self._policy)]
        num_replicas = Counter(place.deployment for place, _ in known)
        choices = []
        for place, one in known:
            choice = one.choice(keys, self._policy.prefix_block_tokens)
            waiting = self._unanswered[place.deployment] // num_replicas[place.deployment]
            choices.append(Choice(choice.num_outstanding_tokens + waiting, choice.num_known_tokens))
        return known[route(choices)][0]

    async def _first(
        self, attempt: Attempt, answers: AsyncGenerator[FromAttempt, None], place: Deployed
    ) -> list[FromAttempt] | None:
        """Wait for the first answer, if there is one; None when the attempt had better go to the other deployment."""
        num_tokens = len(attempt.sequence.prompt_ids) + len(attempt.sequence.emitted_ids)
        self._unanswered[place.deployment] += num_tokens
        first = asyncio.create_task(_next(answers))
        try:
            while not first.done():
                await asyncio.wait({first}, timeout=LOOK_AGAIN_S)
                if not first.done() and self._is_stranded(place):
                    return None
            return first.result()
        finally:
            self._unanswered[place.deployment] -= num_tokens
            if not first.done():
                first.cancel()
                await asyncio.wait({first})

    def _is_stranded(self, place: Deployed) -> bool:
        return not ray_replicas.staying(place.deployment) and any(
            ray_replicas.staying(other.deployment) for other in self._places
        )


async def _next(answers: AsyncGenerator[FromAttempt, None]) -> list[FromAttempt]:
    async for answer in answers:
        return [answer]
    return []
