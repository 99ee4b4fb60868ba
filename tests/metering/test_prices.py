"""Prices: exact decimals in, integer micro-units out."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.errors import ConfigError
from pilotlight.metering.prices import PriceTable
from pilotlight.metering.usage import Usage


def decimals() -> st.SearchStrategy[str]:
    return st.decimals(min_value=0, max_value=1000, places=6).map(str)


def counts() -> st.SearchStrategy[int]:
    return st.integers(0, 10**7)


class TestCost:
    def test_the_parts_are_added(self) -> None:
        prices = PriceTable.from_config(
            {
                "prompt_per_million_tokens": "0.15",
                "cached_prompt_per_million_tokens": "0.075",
                "completion_per_million_tokens": "0.60",
                "per_invocation": "0.000002",
                "per_second": "0.00003",
            }
        )
        usage = Usage(prompt_tokens=1_000, cached_tokens=400, completion_tokens=500, busy_ms=2_500)
        assert prices.cost_micros(usage) == 90 + 30 + 300 + 2 + 75

    def test_parts_below_one_micro_add_up_before_the_one_rounding(self) -> None:
        prices = PriceTable.from_config(
            {"prompt_per_million_tokens": "0.3", "completion_per_million_tokens": "0.3", "per_second": "0.0003"}
        )
        assert prices.cost_micros(Usage(prompt_tokens=1)) == 0
        assert prices.cost_micros(Usage(prompt_tokens=1, completion_tokens=1, busy_ms=1)) == 1

    @pytest.mark.parametrize(("num_tokens", "cost_micros"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2)])
    def test_a_half_is_rounded_up(self, num_tokens: int, cost_micros: int) -> None:
        prices = PriceTable.from_config({"completion_per_million_tokens": "0.5"})
        assert prices.cost_micros(Usage(completion_tokens=num_tokens)) == cost_micros

    def test_recomputed_and_delivered_tokens_cost_nothing(self) -> None:
        prices = PriceTable.from_config({"prompt_per_million_tokens": "9", "completion_per_million_tokens": "9"})
        assert prices.cost_micros(Usage(recomputed_tokens=10**6, delivered_tokens=10**6)) == 0

    @given(decimals(), decimals(), decimals(), counts(), counts(), counts())
    def test_it_is_what_exact_decimals_give(
        self, prompt: str, completion: str, second: str, num_prompt: int, num_completion: int, busy_ms: int
    ) -> None:
        prices = PriceTable.from_config(
            {
                "prompt_per_million_tokens": prompt,
                "completion_per_million_tokens": completion,
                "per_second": second,
            }
        )
        exact = num_prompt * Decimal(prompt) + num_completion * Decimal(completion) + busy_ms * 1000 * Decimal(second)
        usage = Usage(prompt_tokens=num_prompt, completion_tokens=num_completion, busy_ms=busy_ms)
        assert prices.cost_micros(usage) == int(exact.quantize(Decimal(1), ROUND_HALF_UP))


class TestConfig:
    def test_nothing_configured_costs_nothing(self) -> None:
        prices = PriceTable.from_config({})
        assert prices.cost_micros(Usage(10**6, 0, 10**6, busy_ms=10**6)) == 0
        assert prices.currency == "USD"

    def test_cached_tokens_cost_what_others_do_unless_said_otherwise(self) -> None:
        same = PriceTable.from_config({"prompt_per_million_tokens": "2"})
        free = PriceTable.from_config({"prompt_per_million_tokens": "2", "cached_prompt_per_million_tokens": "0"})
        cached = Usage(prompt_tokens=10, cached_tokens=10)
        assert [same.cost_micros(cached), free.cost_micros(cached)] == [20, 0]

    def test_whole_amounts_may_be_numbers(self) -> None:
        assert PriceTable.from_config({"per_invocation": 2}).per_invocation_micros == 2_000_000

    def test_the_id_follows_from_the_prices(self) -> None:
        a = PriceTable.from_config({"per_invocation": "0.10"})
        b = PriceTable.from_config({"per_invocation": "0.1", "currency": "USD"})
        c = PriceTable.from_config({"per_invocation": "0.1", "currency": "EUR"})
        assert a == b
        assert a.id != c.id
        assert a.id.startswith("sha256:")

    def test_an_id_may_be_given(self) -> None:
        assert PriceTable.from_config({"id": "2026-autumn"}).id == "2026-autumn"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("per_invocation", 0.1),
            ("per_invocation", True),
            ("per_invocation", None),
            ("per_invocation", ""),
            ("per_invocation", "-1"),
            ("per_invocation", -1),
            ("per_invocation", "1e3"),
            ("per_invocation", "0.0000001"),
            ("per_invocation", "1,5"),
            ("per_invocation", " 1"),
            ("per_invocation", "1."),
            ("per_invocation", "١"),
            ("per_invocation", "1000000001"),
            ("per_invocation", 10**30),
            ("per_invocation", []),
            ("currency", "usd"),
            ("currency", "dollars"),
            ("currency", 1),
            ("id", ""),
            ("id", 7),
        ],
    )
    def test_a_bad_value_is_named_with_what_was_expected(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError) as caught:
            PriceTable.from_config({key: value}, "functions.demo.prices")
        assert caught.value.message.startswith(f"functions.demo.prices.{key} = {value!r}: expected ")

    def test_an_unknown_key_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"^prices\.per_token is not a setting; expected one of id, currency"):
            PriceTable.from_config({"per_token": "1"})
