"""The processes of one version of a function: its replicas, and the template that they are forked from.

A fleet starts them, where the machine has the memory, and lets them go. How many there should be and what they do is
the pool's to say.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from pilotlight.host.autoscaler import Sleep
from pilotlight.host.link import Launcher, Link
from pilotlight.host.machine import Machine, Room
from pilotlight.host.memory import Idle, estimated_bytes, private_bytes
from pilotlight.host.pool_settings import PoolSettings
from pilotlight.host.replica_handle import Owner, Replica, State, TemplateHandle
from pilotlight.host.wire import Dormant, ReplicaSpec
from pilotlight.request import Signals

logger = logging.getLogger("pilotlight.host")

TEMPLATE_BYTES = 100 * 1024 * 1024


class Unstartable(Exception):
    """No replica can be started here; the message says why."""


class Crew(Owner, Protocol):
    """Whom a fleet's messages concern."""

    def act(self) -> None:
        """Look again at what can be done."""


class Fleet:
    """Replicas by their ids, of which some start, some are ready and some are leaving."""

    def __init__(
        self, settings: PoolSettings, launcher: Launcher, machine: Machine, owner: Crew, clock: Callable[[], float]
    ) -> None:
        self.replicas: dict[str, Replica] = {}
        self._settings = settings
        self._launcher = launcher
        self._machine = machine
        self._owner = owner
        self._clock = clock
        self._template = TemplateHandle(f"{settings.name}-template")
        self._measured_bytes: int | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.state is State.READY]

    @property
    def spare(self) -> list[Replica]:
        """The ready ones that have nothing to do, the one that was used last behind the others."""
        return sorted((one for one in self.ready if not one.entries), key=lambda one: one.used_at)

    @property
    def num_staying(self) -> int:
        return sum(1 for replica in self.replicas.values() if replica.state is not State.LEAVING)

    @property
    def replica_bytes(self) -> int:
        """What one replica may come to need."""
        return estimated_bytes(self._settings.weights_bytes, self._settings.kv_bytes, self._measured_bytes)

    @property
    def sleep(self) -> Sleep:
        """Say whether there is a replica, or at least a template."""
        if self.replicas:
            return Sleep.AWAKE
        return Sleep.LIGHT if self._template.forks is not None else Sleep.DEEP

    @property
    def template_pid(self) -> int | None:
        return self._template.pid

    # replicas

    def signals(self) -> Signals:
        """Return the load of all replicas together."""
        of_replicas = [replica.signals for replica in self.replicas.values() if replica.signals is not None]
        return Signals(
            num_waiting=sum(s.num_waiting for s in of_replicas),
            num_running=sum(s.num_running for s in of_replicas),
            num_slots=self._settings.spec.num_slots * len(self.ready),
            num_prefill_backlog_tokens=sum(s.num_prefill_backlog_tokens for s in of_replicas),
            kv_used_bytes=sum(s.kv_used_bytes for s in of_replicas),
            kv_reserved_bytes=sum(s.kv_reserved_bytes for s in of_replicas),
            num_preemptions=sum(s.num_preemptions for s in of_replicas),
            num_prefix_query_tokens=sum(s.num_prefix_query_tokens for s in of_replicas),
            num_prefix_hit_tokens=sum(s.num_prefix_hit_tokens for s in of_replicas),
            prefix_cache_bytes=sum(s.prefix_cache_bytes for s in of_replicas),
            num_drafted_tokens=sum(s.num_drafted_tokens for s in of_replicas),
            num_accepted_tokens=sum(s.num_accepted_tokens for s in of_replicas),
        )

    def start(self, num_warm_up_tokens: int) -> bool:
        """Start one more replica; False where its memory is not free yet.

        Raises:
            Unstartable: it never will be, or no process can be made.
        """
        replica_id = f"{self._settings.name}-{secrets.token_hex(4)}"
        num_bytes = self.replica_bytes
        room = self._machine.take(replica_id, num_bytes)
        if room is Room.NEVER and not self.replicas:
            raise Unstartable(
                f"a replica may need {num_bytes / 1e6:,.0f} MB, and the functions of this host may take "
                f"{self._machine.budget_bytes / 1e6:,.0f} MB together"
            )
        if room is not Room.TAKEN:
            return False
        spec = self._spec(replica_id, num_warm_up_tokens)
        replica = Replica(spec, self._owner, num_bytes)
        self.replicas[replica_id] = replica
        self._empty.clear()
        try:
            replica.link = self._fork(spec, replica)
        except OSError as error:
            self.remove(replica)
            raise Unstartable(f"no process can be made ({error.strerror})") from error
        return True

    def started(self, pid: int) -> None:
        """Note what a replica that has just started takes, for the next ones."""
        if (found := private_bytes(pid)) is not None:
            self._measured_bytes = max(self._measured_bytes or 0, found)

    def let_go(self, replicas: Iterable[Replica]) -> None:
        """End replicas that have nothing to do."""
        for replica in replicas:
            replica.leave()

    def kill(self) -> None:
        """End all replicas at once."""
        for replica in list(self.replicas.values()):
            replica.kill()

    def remove(self, replica: Replica) -> None:
        """Forget a replica whose process is gone."""
        self.replicas.pop(replica.id, None)
        self._machine.release(replica.id)
        if not self.replicas:
            self._empty.set()

    async def emptied(self) -> None:
        """Wait until there are no replicas, and their memory is free."""
        await self._empty.wait()

    def idle(self, num_kept: int, idle_s: float, restart_ms: float) -> list[Idle]:
        """Return what could leave, were its memory needed, so that ``num_kept`` ready replicas stay."""
        now = self._clock()
        spare = self.spare[: max(0, len(self.ready) - num_kept)]
        idle = [Idle(one.id, one.num_bytes, restart_ms, now - one.used_at) for one in spare]
        if self._template.forks is not None and not self.replicas:
            idle.append(Idle(self._template.name, self._template.num_bytes, restart_ms, idle_s))
        return idle

    def evict(self, name: str) -> None:
        """Let an idle replica go, or the template."""
        if name == self._template.name:
            self.drop_template()
        else:
            self.let_go([self.replicas[name]])

    # the template

    def prepare_to_sleep(self) -> bool:
        """Have a template made, where there should be one; True while it is in the making."""
        template = self._template
        if template.in_the_making:
            return True
        if self._settings.policy.sleep is Sleep.DEEP or template.forks is not None or template.failed:
            return False
        if not self._machine.fits(TEMPLATE_BYTES):
            return False
        if self._machine.take(template.name, TEMPLATE_BYTES) is not Room.TAKEN:
            return False
        try:
            template.link = self._launcher.launch_template(self._spec(template.name, num_warm_up_tokens=0), self)
        except OSError:
            self._machine.release(template.name)
            return False
        template.num_bytes = TEMPLATE_BYTES
        return True

    def drop_template(self) -> None:
        """Sleep deeply from now on."""
        if self._template.link is not None:
            self._template.link.close()
            self._template.gone()
            self._machine.release(self._template.name)

    def template_dormant(self, message: Dormant) -> None:
        self._template.dormant(message)
        self._owner.act()

    def template_ended(self, cause: str) -> None:
        logger.warning("%s: the template is lost: %s", self._settings.name, cause)
        self._template.failed = True
        self.drop_template()
        self._owner.act()

    def _fork(self, spec: ReplicaSpec, replica: Replica) -> Link:
        """Fork a replica from the template; from nothing where there is none, or where it has just died.

        Raises:
            OSError: no process can be made.
        """
        if (template := self._template.forks) is not None:
            try:
                return template.launch(spec, replica)
            except ConnectionError:
                self.drop_template()
        return self._launcher.launch(spec, replica)

    def _spec(self, replica_id: str, num_warm_up_tokens: int) -> ReplicaSpec:
        return msgspec.structs.replace(
            self._settings.spec,
            replica_id=replica_id,
            asked_at=self._clock(),
            num_warm_up_tokens=num_warm_up_tokens,
        )
