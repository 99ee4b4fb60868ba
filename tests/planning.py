"""Rates and conditions for simulated plans: a machine whose figures are round."""

from __future__ import annotations

import random

import msgspec

from pilotlight.config import FunctionSettings
from pilotlight.host.rates import ArtifactSize, ChunkTime, HostRates, Rates, StartRates, StepRates, StepTime
from pilotlight.plan.prices import Prices, read_prices
from pilotlight.plan.simulate import Conditions
from pilotlight.plan.trace import Arrival

STEPS = StepRates(
    num_threads=1,
    decode=[
        StepTime("main", rows, context, 10 + 2 * rows + rows * context / 200)
        for rows in (1, 2, 4, 8)
        for context in (100, 400)
    ],
    prefill=[
        ChunkTime(size, past, 2 + size / 4 + past * size / 10_000) for size in (16, 64, 256) for past in (0, 100, 400)
    ],
    step_overhead_ms=0.5,
    row_overhead_ms=0.1,
    after_prefill_factor=1.5,
)
RATES = Rates(
    artifact=ArtifactSize("round", "", 1024, 100_000_000, 10_000),
    lean=STEPS,
    whole=STEPS,
    starts=StartRates(
        deep_ms=500, light_ms=50, template_ms=500, deep_first_run_ms=40, light_first_run_ms=10, grow_ms=300
    ),
    host=HostRates(request_ms=4, prompt_token_ms=0.01, request_busy_ms=1.0, token_busy_ms=0.05),
)
PRICES = read_prices()


def conditions(seed: int = 0, prices: Prices = PRICES, rates: Rates = RATES, **settings: object) -> Conditions:
    """Return conditions with these settings of the function."""
    of_function = msgspec.convert({"artifact": "", "max_context_tokens": 512, **settings}, FunctionSettings)
    return Conditions(of_function, rates, prices, seed=seed)


def bursts(
    num_requests: int, seed: int = 0, gap_s: float = 30.0, tenants: tuple[str | None, ...] = (None,)
) -> list[Arrival]:
    """Return requests in bursts with long gaps between."""
    rng = random.Random(seed)
    at_s, found = 0.0, []
    for number in range(num_requests):
        at_s += rng.expovariate(1 / gap_s) if number and rng.random() < 0.1 else rng.expovariate(4.0)
        found.append(Arrival(at_s, rng.randint(1, 400), rng.randint(1, 100), rng.choice(tenants)))
    first = found[0].at_s
    return [Arrival(one.at_s - first, one.num_prompt_tokens, one.num_new_tokens, one.tenant) for one in found]
