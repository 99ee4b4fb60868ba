"""Prices and assumptions of the places where a function can run: a dated table, and what a user puts over it."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from pilotlight.config import read_toml
from pilotlight.errors import ConfigError

Amount = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]
Factor = Annotated[float, Meta(gt=0)]


class Own(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A machine that is there anyway: a replica costs it whole while it lives, a template the memory that it takes."""

    machine_per_hour: Amount
    machine_memory_gb: Factor
    source: str
    checked: str


class Machines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Machines by the second, one for each replica, on demand and spot."""

    per_hour: Amount
    spot_per_hour: Amount
    memory_gb: Factor
    min_billed_s: Seconds
    boot_s: Seconds
    interruptions_per_hour: Amount
    outage_s: Seconds
    notice_s: Seconds
    source: str
    checked: str

    @property
    def discount(self) -> float:
        return 1 - self.spot_per_hour / self.per_hour if self.per_hour else 0.0


class Lambda(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AWS Lambda: by GB-second of running and initialising, and by request."""

    per_gb_second: Amount
    per_request: Amount
    provisioned_per_gb_second: Amount
    provisioned_duration_per_gb_second: Amount
    memory_mb: Annotated[int, Meta(ge=128, le=10240)]
    max_sandboxes: Annotated[int, Meta(ge=1)]
    keep_s: Seconds
    sandbox_s: Seconds
    speed: Factor
    source: str
    checked: str

    @property
    def gb(self) -> float:
        return self.memory_mb / 1024


class Modal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Modal: by the second of a container's life."""

    per_core_second: Amount
    per_gib_second: Amount
    cores: Factor
    memory_gib: Factor
    max_containers: Annotated[int, Meta(ge=1)]
    scaledown_window_s: Seconds
    sandbox_s: Seconds
    speed: Factor
    source: str
    checked: str

    @property
    def per_second(self) -> float:
        return self.cores * self.per_core_second + self.memory_gib * self.per_gib_second


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a price file."""

    own: Own
    machines: Machines
    aws_lambda: Lambda = msgspec.field(name="lambda")
    modal: Modal = msgspec.field()


def read_prices(path: Path | None = None) -> Prices:
    """Return the default prices, and over them those of a file.

    Raises:
        ConfigError: the file is missing or malformed, or has an unknown key.
    """
    table = tomllib.loads(files("pilotlight.plan").joinpath("defaults.toml").read_text(encoding="utf-8"))
    for name, given in ({} if path is None else read_toml(path)).items():
        table[name] = {**table.get(name, {}), **given} if isinstance(given, dict) else given
    try:
        return msgspec.convert(table, Prices)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
