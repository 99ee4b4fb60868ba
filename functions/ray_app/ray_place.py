"""A deployment of Ray Serve as a place where attempts are made."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

import ray_replicas
from pilotlight.host.attempt import Attempt, FromAttempt, read_answer
from pilotlight.host.remote import ReplicaLost
from pilotlight.host.routing import prefix_keys
from pilotlight.host.wire import ReplicaSpec, encode

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class ServePlace:
    """Sends attempts to a deployment. In a pool, Serve prefers the replicas that have the function loaded."""

    def __init__(self, handle: DeploymentHandle, spec: ReplicaSpec, *, shared: bool) -> None:
        self.deployment = handle.deployment_name
        self._handle = handle.options(stream=True)
        self._policy = spec.policy
        self._shared = shared

    async def attempt(self, attempt: Attempt) -> AsyncGenerator[FromAttempt, None]:
        handle: Any = self._handle.options(multiplexed_model_id=attempt.function) if self._shared else self._handle
        sequence = attempt.sequence
        answers = handle.generate.remote(
            encode(attempt),
            blocks=[attempt.function.encode() + key for key in prefix_keys(sequence, self._policy)],
            block_tokens=self._policy.prefix_block_tokens,
            num_tokens=len(sequence.prompt_ids) + len(sequence.emitted_ids),
            moved=attempt.epoch > 0,
        )
        try:
            async for answer in answers:
                yield read_answer(answer)
        except (RayError, RayServeException) as error:
            raise ReplicaLost(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
        finally:
            answers.cancel()

    def leaving(self, replica_id: str) -> None:
        ray_replicas.leave_out(replica_id)
