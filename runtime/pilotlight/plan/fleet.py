"""A function's replicas under the host's own pool, on simulated time.

The pool is the very one of `pilotlight serve`: its queue, its routing, its autoscaler, its templates and its memory.
What it gets from here is a clock, a machine, a second hand, and replicas that are simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pilotlight.errors import CapacityError
from pilotlight.host.autoscaler import Sleep
from pilotlight.host.machine import TICK_S, Machine
from pilotlight.host.pool import Pool
from pilotlight.host.pool_settings import PoolSettings
from pilotlight.host.replica_handle import State
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.desk import Desk
from pilotlight.plan.outcomes import Outcomes, Sample
from pilotlight.plan.prompts import named_keys
from pilotlight.plan.replica import Life, SimulatedLauncher, SimulatedReplica, Speed
from pilotlight.plan.spot import SpotMarket
from pilotlight.request import Sequence

UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Ground:
    """Where replicas run. ``boot_s``: each is on a machine of its own, which has to be started first."""

    memory_bytes: int = UNLIMITED_BYTES
    boot_s: float = 0.0


class PooledFleet:
    """Replicas on machines of one's own or of a cloud, under the host's pool."""

    def __init__(
        self,
        settings: PoolSettings,
        speed: Speed,
        ground: Ground,
        agenda: Agenda,
        outcomes: Outcomes,
        kv_bytes_per_token: int,
        market: SpotMarket | None = None,
        phase_s: float = 0.0,
    ) -> None:
        """``phase_s``: where in the second the host's clock ticks."""
        self.lives: list[Life] = []
        self.template_s = 0.0
        self._agenda = agenda
        self._outcomes = outcomes
        self._speed = speed
        self._ground = ground
        self._market = market
        self._replicas: list[SimulatedReplica] = []
        self._machine = Machine(ground.memory_bytes, lambda: ground.memory_bytes, agenda.soon)
        self._desk = Desk(speed.rates.host, agenda, speed.factor)
        launcher = SimulatedLauncher(speed, agenda, kv_bytes_per_token, outcomes.observe, self._desk, self._launched)
        self.pool = Pool(settings, launcher, self._machine, clock=agenda.clock, prefix_keys=named_keys)
        self._thresholds_s = (
            settings.policy.idle_timeout_s,
            settings.policy.idle_timeout_s + settings.policy.light_timeout_s,
        )
        self._phase_s = phase_s
        self._next_tick = math.inf
        self._looked_at = 0.0
        if market is not None:
            market.use(agenda, self._retire)

    def open(self) -> None:
        """Have the replicas started that are to be there always, and the clock tick."""
        self.pool.act()
        self._tick_soon()

    def submit(self, sequence: Sequence) -> None:
        outcomes, pool = self._outcomes, self.pool
        is_cold = not pool.fleet.ready
        try:
            pool.submit(sequence)
        except CapacityError:
            outcomes.refused()
            return
        outcomes.num_waited_for_start += is_cold
        self._tick_soon()

    def take_in(self, num_prompt_tokens: int) -> float:
        """Return after how many seconds a request that comes now is with the pool."""
        return self._desk.take_in(num_prompt_tokens)

    def sample(self) -> Sample:
        signals = self.pool.signals()
        states = [replica.state for replica in self.pool.fleet.replicas.values()]
        return Sample(
            self._agenda.now,
            len(states),
            states.count(State.STARTING),
            self.pool.num_queued,
            sum(replica.engine.scheduler.num_in_slots for replica in self._living()),
            signals.num_slots,
            self._machine.taken_bytes,
            sum(replica.engine.signals().kv_used_bytes for replica in self._living()),
        )

    def close(self) -> None:
        """Count what is still there."""
        self._count_template()

    def _living(self) -> list[SimulatedReplica]:
        if any(replica.gone for replica in self._replicas):
            self._replicas = [replica for replica in self._replicas if not replica.gone]
        return self._replicas

    def _launched(self, replica: SimulatedReplica, light: bool) -> None:
        self._replicas.append(replica)
        self.lives.append(replica.life)
        replica.start(self._ground.boot_s + self._speed.start_s(light), self._speed.first_run_s(light))
        if self._market is not None:
            self._market.place(replica)

    def _retire(self, replica: SimulatedReplica) -> None:
        replica.retire()
        self.pool.act()

    def _count_template(self) -> None:
        now = self._agenda.now
        if self.pool.fleet.template_pid is not None:
            self.template_s += now - self._looked_at
        self._looked_at = now

    def _tick_soon(self) -> None:
        self._tick_at(math.floor((self._agenda.now - self._phase_s) / TICK_S) + 1)

    def _tick_at(self, number: float) -> None:
        """Have the clock tick for that time, unless it ticks earlier."""
        if number < self._next_tick:
            self._next_tick = number
            self._agenda.at(TICK_S * number + self._phase_s, self._tick, number)

    def _tick(self, number: float) -> None:
        if number != self._next_tick:
            return
        self._next_tick = math.inf
        self._count_template()
        for replica in list(self._living()):
            replica.beat()
        self.pool.tick()
        if (wait_s := self._next_tick_s()) is not None:
            self._tick_at(number + max(1, math.ceil(wait_s / TICK_S)))

    def _next_tick_s(self) -> float | None:
        """Return for how long ticks would change nothing; None: until somebody asks for something."""
        pool = self.pool
        if pool.num_open or any(replica.starting for replica in pool.fleet.replicas.values()):
            return 0.0
        idle_s = pool.idle_s
        ahead = [threshold - idle_s for threshold in self._thresholds_s if threshold >= idle_s]
        if ahead:
            return min(ahead)
        settled = len(pool.fleet.replicas) <= pool.settings.policy.min_replicas and pool.fleet.sleep is not Sleep.LIGHT
        return None if settled else 0.0
