"""The plans that are compared: where a function runs, and how deeply it sleeps there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Place(StrEnum):
    """Where replicas run. ``SPOT`` is machines that may be taken away, ``MIXED`` has one on demand among them."""

    OWN = "own"
    MACHINES = "machines"
    SPOT = "spot"
    MIXED = "mixed"
    LAMBDA = "lambda"
    MODAL = "modal"


class Warmth(StrEnum):
    """What an idle function keeps: nothing, a template, or a replica."""

    COLD = "cold"
    LIGHT = "light"
    WARM = "warm"


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to run a function."""

    place: Place
    warmth: Warmth

    @property
    def name(self) -> str:
        return f"{self.place}-{self.warmth}"


def plans(places: frozenset[Place] = frozenset(Place), warmths: frozenset[Warmth] = frozenset(Warmth)) -> list[Plan]:
    """Return every plan for these places. Only a machine that stays can keep a template."""
    return list(_plans(places, warmths))


def _plans(places: frozenset[Place], warmths: frozenset[Warmth]) -> Iterator[Plan]:
    for place in Place:
        for warmth in Warmth:
            if place in places and warmth in warmths and (place is Place.OWN or warmth is not Warmth.LIGHT):
                yield Plan(place, warmth)
