"""How many replicas run on machines that may be taken away, and how many on those that may not. Pure.

Source: SkyServe (Mao et al., EuroSys 2025): over-provision spot machines, fall back to others while they are missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MixPolicy:
    """``on_demand_floor`` replicas never run on spot machines; ``spot_surplus`` spot ones too many bridge a loss.

    With ``fall_back``, replicas on demand stand in for spot replicas that were asked for and are not there.
    """

    on_demand_floor: int = 1
    spot_surplus: int = 0
    fall_back: bool = True


@dataclass(frozen=True, slots=True)
class Mix:
    """How many replicas of each kind there should be."""

    on_demand: int
    spot: int


def mix(num_wanted: int, num_spot_ready: int, policy: MixPolicy) -> Mix:
    """Return how ``num_wanted`` replicas are made up, where ``num_spot_ready`` spot replicas serve and stay.

    Nothing wanted is nothing kept, the floor included: a function that sleeps costs nothing. As soon as the spot
    replicas are back, those that stood in for them are not wanted any more.
    """
    if num_wanted <= 0:
        return Mix(0, 0)
    on_demand = min(num_wanted, policy.on_demand_floor)
    of_spot = num_wanted - on_demand
    if of_spot == 0:
        return Mix(on_demand, 0)
    missing = max(0, of_spot - num_spot_ready) if policy.fall_back else 0
    return Mix(on_demand + missing, of_spot + policy.spot_surplus)
