"""One plan on one trace: build the fleet, let the requests come, and add up what became of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pilotlight.config import FunctionSettings
from pilotlight.engine.policy import Policy as EnginePolicy
from pilotlight.errors import ConfigError
from pilotlight.host import autoscaler
from pilotlight.host.pool_settings import PoolSettings
from pilotlight.host.rates import ArtifactSize, Rates
from pilotlight.host.wire import ReplicaSpec
from pilotlight.plan.agenda import Agenda
from pilotlight.plan.cost import lambda_cost, machines_cost, modal_cost, own_cost
from pilotlight.plan.engine import Capacity
from pilotlight.plan.fleet import UNLIMITED_BYTES, Ground, PooledFleet
from pilotlight.plan.outcomes import NUM_SAMPLES, Outcomes
from pilotlight.plan.plans import Place, Plan, Warmth
from pilotlight.plan.prices import Prices
from pilotlight.plan.prompts import Prompt
from pilotlight.plan.replica import Speed
from pilotlight.plan.result import Result, SpotFigures
from pilotlight.plan.sandboxes import SandboxFleet, SandboxTerms
from pilotlight.plan.spot import SpotMarket, SpotTerms
from pilotlight.plan.trace import Arrival
from pilotlight.request import Sequence

LONG_START_TICKS = 3600
"""A machine may take minutes to boot, and its replica must not be taken for one that hangs."""

Fleet = PooledFleet | SandboxFleet


@dataclass(frozen=True, slots=True)
class Conditions:
    """All that the plans have in common."""

    settings: FunctionSettings
    rates: Rates
    prices: Prices
    memory_budget_bytes: int = UNLIMITED_BYTES
    seed: int = 0

    def with_memory(self, budget_bytes: int) -> Conditions:
        """Return the same with so much memory on a machine of one's own."""
        return replace(self, memory_budget_bytes=budget_bytes)

    @property
    def max_context_tokens(self) -> int:
        return context_of(self.settings, self.rates.artifact)


def context_of(settings: FunctionSettings, artifact: ArtifactSize) -> int:
    """Return how long prompt and answer may be together."""
    longest = artifact.max_context_tokens
    return min(longest, settings.max_context_tokens or 4096, settings.kv_budget_tokens or longest)


def simulate(plan: Plan, arrivals: list[Arrival], conditions: Conditions) -> Result:
    """Return what a trace would have cost under a plan, and how long its requests would have waited.

    Raises:
        ConfigError: a replica would not fit its machine.
    """
    run = _Run(plan, arrivals, conditions)
    with _quiet():
        run.agenda.at(0.0, run.begin)
        run.agenda.run()
    return run.result()


class _Run:
    """The simulation of one plan."""

    def __init__(self, plan: Plan, arrivals: list[Arrival], conditions: Conditions) -> None:
        self.agenda = Agenda()
        self.outcomes = Outcomes(self.agenda)
        self._plan = plan
        self._arrivals = arrivals
        self._conditions = conditions
        self._market: SpotMarket | None = None
        self._speed = Speed.of(conditions.rates, _speed_of(plan, conditions.prices))
        self._min_replicas = max(1, conditions.settings.min_replicas) if plan.warmth is Warmth.WARM else 0
        self._fleet = self._make_fleet()
        self._lead_s = self._lead() if self._min_replicas else 0.0
        self._num_entered = 0
        self._sample_every_s = max(0.001, arrivals[-1].at_s / NUM_SAMPLES)

    def begin(self) -> None:
        self._fleet.open()
        self.agenda.at(self._lead_s, self._sample)
        self.agenda.at(self._lead_s + self._arrivals[0].at_s, self._come, 0)

    def result(self) -> Result:
        now, outcomes = self.agenda.now, self.outcomes
        ordered = outcomes.ttft_s()
        lives = self._fleet.lives
        spot_s = sum(life.seconds(now) for life in lives if life.on_spot)
        replica_s = sum(life.seconds(now) for life in lives)
        spot = None
        if self._market is not None:
            discount = self._conditions.prices.machines.discount
            spot = SpotFigures(discount, self._market.num_interruptions, spot_s / replica_s if replica_s else 0.0)
        return Result.of(
            self._plan,
            outcomes,
            ordered,
            duration_s=now - self._lead_s,
            cost=self._cost(),
            num_cold_starts=max(0, len(lives) - self._min_replicas),
            replica_s=replica_s,
            num_tokens=sum(one.num_new_tokens for one in self._arrivals),
            spot=spot,
        )

    def _come(self, number: int) -> None:
        arrival = self._arrivals[number]
        self.outcomes.came(self.agenda.now)
        self.agenda.at(self.agenda.now + self._fleet.take_in(arrival.num_prompt_tokens), self._enter, number)
        if number + 1 < len(self._arrivals):
            self.agenda.at(self._lead_s + self._arrivals[number + 1].at_s, self._come, number + 1)

    def _enter(self, number: int) -> None:
        arrival = self._arrivals[number]
        prompt = Prompt.of(number, arrival)
        self._num_entered += 1
        self.outcomes.entered(number)
        self._fleet.submit(Sequence(str(number), prompt, arrival.num_new_tokens, tenant=arrival.tenant))

    def _sample(self) -> None:
        self.outcomes.samples.append(self._fleet.sample())
        if self._num_entered == len(self._arrivals) and self._is_settled():
            for _ in range(self.outcomes.num_open):
                self.outcomes.failed()
            self._fleet.close()
            self.agenda.stop()
        else:
            self.agenda.at(self.agenda.now + self._sample_every_s, self._sample)

    def _is_settled(self) -> bool:
        fleet = self._fleet
        return self.outcomes.num_open == 0 or (isinstance(fleet, PooledFleet) and fleet.pool.num_open == 0)

    def _lead(self) -> float:
        """Return how long the first replicas take, which are to be there when the trace begins."""
        boot_s = self._conditions.prices.machines.boot_s + self._conditions.prices.modal.sandbox_s
        return boot_s + self._conditions.prices.aws_lambda.sandbox_s + self._speed.start_s(light=False) + 1.0

    def _make_fleet(self) -> Fleet:
        place, prices = self._plan.place, self._conditions.prices
        if place is Place.LAMBDA:
            of_lambda = prices.aws_lambda
            terms = SandboxTerms(1, of_lambda.max_sandboxes, self._min_replicas, 0, of_lambda.keep_s,
                                 of_lambda.sandbox_s, of_lambda.memory_mb << 20)  # fmt: skip
            return self._sandboxes(terms)
        if place is Place.MODAL:
            of_modal = prices.modal
            settings = self._conditions.settings
            terms = SandboxTerms(settings.num_slots, of_modal.max_containers, self._min_replicas,
                                 settings.max_queued_requests, of_modal.scaledown_window_s, of_modal.sandbox_s,
                                 int(of_modal.memory_gib * (1 << 30)))  # fmt: skip
            return self._sandboxes(terms)
        return self._pooled()

    def _sandboxes(self, terms: SandboxTerms) -> SandboxFleet:
        artifact, context = self._conditions.rates.artifact, self._conditions.max_context_tokens
        capacity = Capacity(terms.max_inputs, context, artifact.kv_bytes_per_token)
        return SandboxFleet(terms, capacity, self._engine_policy(), self._speed, self.agenda, self.outcomes)

    def _pooled(self) -> PooledFleet:
        place, machines = self._plan.place, self._conditions.prices.machines
        ground = Ground(self._conditions.memory_budget_bytes)
        if place is not Place.OWN:
            ground = Ground(boot_s=machines.boot_s)
        if place in (Place.SPOT, Place.MIXED):
            terms = SpotTerms(machines.discount, machines.interruptions_per_hour, machines.notice_s,
                              machines.outage_s, floor=int(place is Place.MIXED))  # fmt: skip
            self._market = SpotMarket(terms, self._conditions.seed)
        kv_bytes_per_token = self._conditions.rates.artifact.kv_bytes_per_token
        phase_s = random.Random(self._conditions.seed).random()
        return PooledFleet(
            self._pool_settings(), self._speed, ground, self.agenda, self.outcomes, kv_bytes_per_token, self._market,
            phase_s,
        )  # fmt: skip

    def _pool_settings(self) -> PoolSettings:
        settings, rates = self._conditions.settings, self._conditions.rates
        context, policy = self._conditions.max_context_tokens, self._engine_policy()
        num_slots = policy.num_slots(settings.num_slots)
        kv_bytes = num_slots * context * rates.artifact.kv_bytes_per_token
        needed = rates.artifact.weights_bytes + kv_bytes
        if needed > self._conditions.memory_budget_bytes:
            budget = self._conditions.memory_budget_bytes
            raise ConfigError(f"a replica needs {needed / 1e6:,.0f} MB, and the machine has {budget / 1e6:,.0f}")
        scaling = autoscaler.Policy.from_settings(settings, num_slots)
        sleep = autoscaler.Sleep.LIGHT if self._plan.warmth is Warmth.LIGHT else autoscaler.Sleep.DEEP
        scaling = replace(
            scaling,
            sleep=sleep,
            min_replicas=self._min_replicas,
            max_replicas=max(scaling.max_replicas, self._min_replicas),
        )
        return PoolSettings(
            name="planned",
            spec=ReplicaSpec("planned", "", num_slots, context, policy, rates.whole.num_threads, None, 0.0),
            policy=scaling,
            weights_bytes=rates.artifact.replica_bytes or rates.artifact.weights_bytes,
            kv_bytes=kv_bytes,
            max_queued_requests=settings.max_queued_requests,
            max_queued_tokens=settings.max_queued_tokens,
            start_ticks=LONG_START_TICKS,
        )

    def _engine_policy(self) -> EnginePolicy:
        """Return the engine's policy. Nobody can guess tokens that are not there; and without any name for beginnings,
        no prompt can be known to begin like another.
        """
        policy = replace(EnginePolicy.from_settings(self._conditions.settings), speculates=False)
        named = any(arrival.block_ids for arrival in self._arrivals)
        return policy if named else replace(policy, prefix_cache_bytes=0)

    def _cost(self) -> float:
        now, prices, fleet = self.agenda.now, self._conditions.prices, self._fleet
        if isinstance(fleet, SandboxFleet):
            if self._plan.place is Place.LAMBDA:
                return lambda_cost(fleet.all, self._min_replicas, now, prices.aws_lambda)
            return modal_cost(fleet.lives, now, prices.modal)
        if self._plan.place is Place.OWN:
            return own_cost(fleet.lives, fleet.template_s, now, prices.own)
        return machines_cost(fleet.lives, now, prices.machines)


def _speed_of(plan: Plan, prices: Prices) -> float:
    if plan.place is Place.LAMBDA:
        return prices.aws_lambda.speed
    return prices.modal.speed if plan.place is Place.MODAL else 1.0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the pool's reports of lost replicas to itself: none of them exists."""
    logger = logging.getLogger("pilotlight.host")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


__all__ = ["Conditions", "context_of", "simulate"]
