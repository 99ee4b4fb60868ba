"""The table of recipes: which weight gets which scheme, and what the manifest says about it."""

from __future__ import annotations

import pytest

from pilotlight_export.errors import UnknownRecipe
from pilotlight_export.recipes import (
    EXACT,
    PRECISIONS,
    RECIPES,
    TIED_HEAD,
    Blocks,
    Columns,
    GraphRecipe,
    choose_recipe,
    recipe_names,
)

INT4 = Blocks(bits=4)
INT8 = Blocks(bits=8)


def test_the_first_rule_that_fits_decides() -> None:
    recipe = GraphRecipe((("*.down_proj.weight", INT8), ("model.layers.*", INT4)))
    assert recipe.scheme_for("model.layers.0.mlp.down_proj.weight") is INT8
    assert recipe.scheme_for("model.layers.0.self_attn.o_proj.weight") is INT4
    assert recipe.scheme_for("lm_head.weight") is None


def test_fp32_quantizes_nothing() -> None:
    assert EXACT.graph.scheme_for("lm_head.weight") is None
    assert EXACT.block_sizes == set()
    assert EXACT.summary() == {"name": "fp32"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_has_a_default_recipe_of_its_own_name(precision: str) -> None:
    assert choose_recipe(precision, None) is RECIPES[precision]
    assert recipe_names(precision)[0] == precision


def test_a_recipe_of_another_precision_is_refused() -> None:
    with pytest.raises(UnknownRecipe, match="int8 has no recipe 'int4'; it has int8"):
        choose_recipe("int8", "int4")


def test_the_graphs_of_a_hybrid_use_one_embedding_and_two_heads() -> None:
    hybrid = RECIPES["hybrid"]
    assert hybrid.prefill is not None
    embedding = "model.embed_tokens.weight"
    assert hybrid.prefill.scheme_for(embedding) == hybrid.graph.scheme_for(embedding)
    assert isinstance(hybrid.prefill.scheme_for(TIED_HEAD), Columns), "which needs no prepacking to be quick"
    assert isinstance(hybrid.graph.scheme_for(TIED_HEAD), Blocks)


def test_the_summary_tells_both_graphs_apart() -> None:
    summary = RECIPES["hybrid"].summary()
    assert summary["*"] == str(RECIPES["hybrid"].graph.scheme_for("model.layers.7.mlp.down_proj.weight"))
    assert "activations 8 bits by token" in str(summary["prefill *"])
