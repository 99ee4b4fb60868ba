"""Machines that are cheaper and may be taken away: a seeded market, and the formula for what they save."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pilotlight.plan.agenda import Agenda
from pilotlight.plan.replica import SimulatedReplica


@dataclass(frozen=True, slots=True)
class SpotTerms:
    """``discount`` is the part of the price that is saved. Machines are taken away at random, so often an hour, each
    ``notice_s`` after it was told; then there are none for ``outage_s`` on average. ``floor`` replicas are on demand.
    """

    discount: float
    interruptions_per_hour: float
    notice_s: float
    outage_s: float
    floor: int = 0


class SpotMarket:
    """Says for each replica on which kind of machine it runs, and takes machines away.

    While there are no spot machines, replicas are started on demand, and they go as soon as there are some again.
    """

    def __init__(self, terms: SpotTerms, seed: int) -> None:
        self.terms = terms
        self.num_interruptions = 0
        self._random = random.Random(seed)
        self._back_at = 0.0
        self._on_demand: list[SimulatedReplica] = []

    def use(self, agenda: Agenda, retire: Callable[[SimulatedReplica], None]) -> None:
        self._agenda, self._retire = agenda, retire

    def place(self, replica: SimulatedReplica) -> None:
        """Choose a machine for a replica that is being started."""
        self._on_demand = [one for one in self._on_demand if not one.gone]
        now = self._agenda.now
        if len(self._on_demand) < self.terms.floor or now < self._back_at:
            self._on_demand.append(replica)
            return
        replica.life.on_spot = True
        if self.terms.interruptions_per_hour > 0:
            lives_s = self._random.expovariate(self.terms.interruptions_per_hour / 3600)
            self._agenda.at(now + max(0.0, lives_s - self.terms.notice_s), self._notify, replica, now + lives_s)

    def _notify(self, replica: SimulatedReplica, ends_at: float) -> None:
        if replica.gone:
            return
        self.num_interruptions += 1
        now = self._agenda.now
        outage_s = self._random.expovariate(1 / self.terms.outage_s) if self.terms.outage_s > 0 else 0.0
        self._back_at = max(self._back_at, now + outage_s)
        self._agenda.at(ends_at, self._take, replica)
        self._agenda.at(self._back_at, self._return)
        self._retire(replica)

    def _take(self, replica: SimulatedReplica) -> None:
        if not replica.gone:
            replica.life.interrupted = True
            replica.die("its machine was taken away")

    def _return(self) -> None:
        """There are spot machines again: what is on demand beyond the floor is replaced by them."""
        if self._agenda.now < self._back_at:
            return
        living = [one for one in self._on_demand if not one.gone]
        for replica in living[self.terms.floor :]:
            self._retire(replica)


def saving(availability: float, discount: float, over_provisioning: float) -> float:
    """Return the part of the on-demand cost that spot machines save.

    ``availability`` is the share of the replicas' time on spot machines, ``over_provisioning`` how much more of it they
    took because of interruptions.
    """
    return 1 - (availability * (1 - discount) * (1 + over_provisioning) + (1 - availability))
