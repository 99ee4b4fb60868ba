"""Exchange the artifact behind a function while it is called. Whatever fails, the old version goes on.

The new version is loaded beside the old one, warmed and checked, and then gets the requests; streams finish where they
are. Where memory does not allow both, requests are held, the old version drains, and the new one takes its place.
"""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from pilotlight.api.admin import FunctionStatus, HostStatus, ReplicaStatus, SwapReport, VersionStatus
from pilotlight.errors import FunctionNotFound, PilotlightError, SwapFailed
from pilotlight.host.autoscaler import Sleep
from pilotlight.host.deployments import Deployment, Deployments, Version
from pilotlight.host.launcher import ZygoteLauncher
from pilotlight.host.memory import private_bytes, resident_bytes
from pilotlight.host.pool import Pool
from pilotlight.host.pooled import Surroundings, open_pooled
from pilotlight.host.replica_handle import Replica
from pilotlight.request import FinishReason, SamplingParams, Sequence

SETTLED_LOOKS = 3
LOOK_INTERVAL_S = 0.1
PROBE_ID = "pilotlight-probe"


class HostControl:
    """What the operator of this host can see and do."""

    def __init__(self, deployments: Deployments, around: Surroundings, launcher: ZygoteLauncher) -> None:
        self._deployments = deployments
        self._around = around
        self._launcher = launcher
        self._swapping: set[str] = set()

    def status(self) -> HostStatus:
        """Return what runs; wakes nothing."""
        machine = self._around.machine
        return HostStatus(
            host_pid=os.getpid(),
            zygote_pid=self._launcher.pid,
            memory_budget_bytes=machine.budget_bytes,
            memory_taken_bytes=machine.taken_bytes,
            functions=[
                FunctionStatus(name=name, versions=[_version(deployment, one) for one in deployment.versions])
                for name, deployment in self._deployments.deployments()
            ],
        )

    async def swap(self, name: str, artifact: str, canary_percent: float | None) -> SwapReport:
        """Have another artifact serve a function, or a share of its requests.

        Raises:
            FunctionNotFound: no such function is served here.
            SwapFailed: the old version goes on, and the message says why.
        """
        if name not in self._deployments:
            raise FunctionNotFound(name, list(self._deployments))
        if name in self._swapping:
            raise SwapFailed(f"{name} is being swapped already")
        self._swapping.add(name)
        try:
            return await self._swap(name, artifact, canary_percent)
        except SwapFailed:
            raise
        except PilotlightError as error:
            raise SwapFailed(error.message) from error
        finally:
            self._swapping.discard(name)

    async def _swap(self, name: str, artifact: str, canary_percent: float | None) -> SwapReport:
        begun_at = time.monotonic()
        deployment = self._deployments.deployment(name)
        previous = deployment.current
        settings = msgspec.structs.replace(previous.settings, artifact=artifact)
        function, pool = await asyncio.to_thread(open_pooled, name, settings, self._around)
        version = Version(settings, function, pool)
        beside = not previous.pool.fleet.replicas or self._around.machine.has_room(
            pool.fleet.replica_bytes, previous.pool
        )
        if not beside and canary_percent is not None:
            await function.close()
            raise SwapFailed("there is no memory for a canary beside the current version")
        num_tokens = await (_check(version) if beside else self._check_alone(deployment, version))
        share = canary_percent
        leaving = deployment.promote(version) if share is None else deployment.try_out(version, share)
        deployment.open.set()
        self._deployments.retire(deployment, leaving)
        pool.hold(pool.settings.policy.min_replicas)
        return SwapReport(
            function=name,
            digest=function.artifact.digest,
            previous_digest=previous.function.artifact.digest,
            role=deployment.role(version),
            num_probe_tokens=num_tokens,
            ready_ms=round((time.monotonic() - begun_at) * 1000, 3),
        )

    async def _check_alone(self, deployment: Deployment, version: Version) -> int:
        """Hold the requests, let the running streams finish, give the memory back, and check the new version."""
        old = deployment.current
        deployment.open.clear()
        try:
            await _quiet(old)
            await old.pool.rest()
            return await _check(version)
        except BaseException:
            deployment.open.set()
            old.pool.hold(old.pool.settings.policy.min_replicas)
            raise


async def _quiet(version: Version) -> None:
    """Wait for the last stream; a request that was let in just before may still be on its way."""
    settled = 0
    while settled < SETTLED_LOOKS:
        await asyncio.sleep(LOOK_INTERVAL_S)
        settled = 0 if version.function.num_running else settled + 1


async def _check(version: Version) -> int:
    """Start a replica of a version and compare its greedy answer with the one in its manifest.

    Raises:
        SwapFailed: it does not start, or computes something else; it is closed then.
    """
    pool, probe = version.pool, version.function.artifact.manifest.probe
    try:
        await pool.started()
        prompt_ids, wanted = (tuple(probe.prompt_ids), probe.token_ids) if probe is not None else ((0,), [])
        greedy = SamplingParams(temperature=0.0)
        sequence = Sequence(PROBE_ID, prompt_ids, max(1, len(wanted)), sampling=greedy)
        found = [event async for event in pool.submit(sequence)]
        if found[-1].finish is FinishReason.ERROR:
            raise SwapFailed(f"the new version cannot generate: {found[-1].error}")
        token_ids = [event.token_id for event in found]
        if wanted and token_ids != wanted:
            raise SwapFailed(f"the new version computes {token_ids} where its manifest has {wanted}")
        return len(token_ids)
    except BaseException:
        await version.function.close()
        raise


def _version(deployment: Deployment, version: Version) -> VersionStatus:
    pool, artifact = version.pool, version.function.artifact
    return VersionStatus(
        artifact=str(artifact.path),
        digest=artifact.digest,
        role=deployment.role(version),
        sleep=pool.fleet.sleep.value,
        replicas=[_replica(replica, pool) for replica in pool.fleet.replicas.values()],
        template_pid=pool.fleet.template_pid,
        num_open=pool.num_open,
        num_queued=pool.num_queued,
        num_queued_tokens=pool.num_queued_tokens,
        sleeps_in_s=_sleeps_in_s(pool),
        failure=pool.failure or None,
    )


def _sleeps_in_s(pool: Pool) -> float | None:
    policy = pool.settings.policy
    if pool.fleet.sleep is not Sleep.AWAKE or policy.min_replicas or pool.num_open:
        return None
    return round(max(0.0, policy.idle_timeout_s - pool.idle_s), 1)


def _replica(replica: Replica, pool: Pool) -> ReplicaStatus:
    stages = replica.stages
    return ReplicaStatus(
        id=replica.id,
        state=replica.state.value,
        pid=replica.pid,
        num_running=len(replica.entries),
        num_slots=pool.settings.spec.num_slots,
        memory_bytes=resident_bytes(replica.pid) if replica.pid is not None else None,
        private_bytes=private_bytes(replica.pid) if replica.pid is not None else None,
        origin=stages.origin if stages is not None else None,
        fork_ms=stages.fork_ms if stages is not None else 0.0,
        map_ms=stages.map_ms if stages is not None else 0.0,
        session_ms=stages.session_ms if stages is not None else 0.0,
        warm_up_ms=stages.warm_up_ms if stages is not None else 0.0,
        unseal_ms=stages.unseal_ms if stages is not None else 0.0,
    )
