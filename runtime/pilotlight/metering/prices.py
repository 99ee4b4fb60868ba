"""What an invocation costs, in integer micro-units of a currency (1,000,000 micros are one unit)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import msgspec

from pilotlight.errors import ConfigError
from pilotlight.metering.usage import Usage

MICROS_PER_UNIT = 1_000_000
MAX_PRICE_UNITS = 1_000_000_000

_AMOUNT = re.compile(r"(\d{1,10})(?:\.(\d{1,6}))?", re.ASCII)
_CURRENCY = re.compile(r"[A-Z]{3}")
_AMOUNT_KEYS = (
    "prompt_per_million_tokens",
    "cached_prompt_per_million_tokens",
    "completion_per_million_tokens",
    "per_invocation",
    "per_second",
)


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The prices of a function at one time. ``id`` is a hash of the other fields unless the operator gave one."""

    id: str
    currency: str
    prompt_micros_per_million_tokens: int
    cached_prompt_micros_per_million_tokens: int
    completion_micros_per_million_tokens: int
    per_invocation_micros: int
    per_second_micros: int

    @classmethod
    def from_config(cls, prices: Mapping[str, object], where: str = "prices") -> PriceTable:
        """Read a table of decimal strings, such as ``prompt_per_million_tokens = "0.15"``.

        A missing amount is 0, except that cached prompt tokens cost what other prompt tokens cost.
        ``where`` names the table in errors.

        Raises:
            ConfigError: a key is unknown, or a value is not an amount with at most six decimals.
        """
        _refuse_unknown(prices, where)
        micros = {key: _micros(prices.get(key, 0), f"{where}.{key}") for key in _AMOUNT_KEYS}
        if "cached_prompt_per_million_tokens" not in prices:
            micros["cached_prompt_per_million_tokens"] = micros["prompt_per_million_tokens"]
        table = cls(
            id="",
            currency=_currency(prices.get("currency", "USD"), f"{where}.currency"),
            prompt_micros_per_million_tokens=micros["prompt_per_million_tokens"],
            cached_prompt_micros_per_million_tokens=micros["cached_prompt_per_million_tokens"],
            completion_micros_per_million_tokens=micros["completion_per_million_tokens"],
            per_invocation_micros=micros["per_invocation"],
            per_second_micros=micros["per_second"],
        )
        return msgspec.structs.replace(table, id=_id(prices.get("id"), table, f"{where}.id"))

    @property
    def tables(self) -> tuple[PriceTable, ...]:
        """All tables of a schedule: this one."""
        return (self,)

    def at(self, started_at_utc: str) -> PriceTable:
        """Return the table itself: it is a schedule of one that holds for ever."""
        return self

    def most_micros(self, prompt_tokens: int, max_new_tokens: int, max_busy_ms: int) -> int:
        """Return the most that an invocation can cost, whichever part of its prompt turns out to be cached."""
        dearest = Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=0 if self._cache_is_cheaper else prompt_tokens,
            completion_tokens=max_new_tokens,
            busy_ms=max_busy_ms,
        )
        return self.cost_micros(dearest)

    @property
    def _cache_is_cheaper(self) -> bool:
        return self.cached_prompt_micros_per_million_tokens <= self.prompt_micros_per_million_tokens

    def cost_micros(self, usage: Usage) -> int:
        """Return what ``usage`` costs. The parts are added exactly and rounded once, a half upwards."""
        millionths = (
            (usage.prompt_tokens - usage.cached_tokens) * self.prompt_micros_per_million_tokens
            + usage.cached_tokens * self.cached_prompt_micros_per_million_tokens
            + usage.completion_tokens * self.completion_micros_per_million_tokens
            + usage.busy_ms * self.per_second_micros * 1_000
            + self.per_invocation_micros * 1_000_000
        )
        return (millionths + 500_000) // 1_000_000


def _refuse_unknown(prices: Mapping[str, object], where: str) -> None:
    known = ("id", "currency", *_AMOUNT_KEYS)
    for key in prices:
        if key not in known:
            raise ConfigError(f"{where}.{key} is not a setting; expected one of {', '.join(known)}")


def _micros(value: object, where: str) -> int:
    # A TOML float has been rounded to binary before it gets here, so an amount with decimals has to be a string.
    match = _AMOUNT.fullmatch(str(value)) if type(value) in (str, int) else None
    if match is None or int(match[1]) > MAX_PRICE_UNITS:
        raise ConfigError(
            f'{where} = {value!r}: expected an amount in quotes with at most six decimals, such as "0.15"'
        )
    return int(match[1]) * MICROS_PER_UNIT + int((match[2] or "").ljust(6, "0"))


def _currency(value: object, where: str) -> str:
    if not isinstance(value, str) or not _CURRENCY.fullmatch(value):
        raise ConfigError(f'{where} = {value!r}: expected the three letters of a currency, such as "USD"')
    return value


def _id(value: object, table: PriceTable, where: str) -> str:
    if value is None:
        return f"sha256:{hashlib.sha256(msgspec.json.encode(table)).hexdigest()[:16]}"
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} = {value!r}: expected a name for the price table")
    return value
