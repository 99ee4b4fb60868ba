"""Precisions and recipes: one table that says how each weight of an artifact is stored.

A precision is what a user asks for; a recipe is one way to reach it. The first recipe of a precision is its default,
chosen by the measurements in docs/quantization.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pilotlight_export.errors import UnknownRecipe

ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8; the exact level 0 decodes at less than half the speed."""


@dataclass(frozen=True)
class Blocks:
    """Weights of ``bits`` bits, activations as they are: one scale and one zero point for each block of a row."""

    bits: int
    block_size: int = 32
    zero_point: Literal["middle", "fitted"] = "middle"
    scales: Literal["nearest", "searched"] = "searched"

    def __str__(self) -> str:
        zero_point = "symmetric" if self.zero_point == "middle" else "with zero points"
        scales = "rounded to nearest" if self.scales == "nearest" else "scales by least squares"
        return f"{self.bits} bits, block {self.block_size}, {zero_point}, {scales}"


@dataclass(frozen=True)
class Columns:
    """Weights and activations of 8 bits: one scale for each output of a weight, one for each token of an activation.

    Weights stay within ±``limit``: kernels without VNNI add two products of a weight and an activation in 16 bits,
    which ±63 can never overflow and ±127 does.
    """

    limit: int = 63

    def __str__(self) -> str:
        return f"8 bits within ±{self.limit} by output, activations 8 bits by token"


@dataclass(frozen=True)
class Halves:
    """Stored as float16, and widened when a session loads where the graph computes in float32."""

    def __str__(self) -> str:
        return "float16"


Scheme = Blocks | Columns | Halves
Rules = tuple[tuple[str, Scheme], ...]


@dataclass(frozen=True)
class GraphRecipe:
    """Which weights of one graph are quantized how: the first rule whose pattern fits a name decides.

    Weights that no rule fits are stored as ``dtype``, which is also what the graph computes in.
    """

    rules: Rules = ()
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def accuracy_level(self) -> int:
        """How MatMulNBits multiplies: in float16 as a GPU does where the graph is for one, in int8 on processors."""
        return 0 if self.dtype == "float16" else ACCURACY_LEVEL

    def scheme_for(self, weight_name: str) -> Scheme | None:
        return next((scheme for pattern, scheme in self.rules if fnmatchcase(weight_name, pattern)), None)


@dataclass(frozen=True)
class Recipe:
    """How a whole artifact is stored: its graph and, in a hybrid, a second graph for prefill and batches."""

    name: str
    precision: str
    graph: GraphRecipe
    prefill: GraphRecipe | None = None
    has_int8_cache: bool = False

    @property
    def kv_dtype(self) -> Literal["float32", "float16", "int8"]:
        """What keys and values are kept as between steps."""
        return "int8" if self.has_int8_cache else self.graph.dtype

    @property
    def block_sizes(self) -> set[int]:
        """The numbers of columns into which the rows of weights have to divide."""
        graphs = [self.graph] if self.prefill is None else [self.graph, self.prefill]
        return {s.block_size for graph in graphs for _, s in graph.rules if isinstance(s, Blocks)}

    def summary(self) -> dict[str, str | int | float | bool]:
        """Return the recipe as it is written into the manifest."""
        summary: dict[str, str | int | float | bool] = {"name": self.name}
        if any(isinstance(scheme, Blocks) for _, scheme in self.graph.rules):
            summary["accuracy_level"] = self.graph.accuracy_level
        if self.graph.rules and self.graph.dtype != "float32":
            summary["activations"] = self.graph.dtype
        summary |= {pattern: str(scheme) for pattern, scheme in self.graph.rules}
        if self.prefill is not None:
            summary |= {f"prefill {pattern}": str(scheme) for pattern, scheme in self.prefill.rules}
        if self.has_int8_cache:
            summary["cache"] = "8 bits by channel"
        return summary


INT8 = Blocks(bits=8)
INT4 = Blocks(bits=4, zero_point="fitted")
INT4_BLOCKS64 = Blocks(bits=4, block_size=64, zero_point="fitted")
INT4_BLOCKS128 = Blocks(bits=4, block_size=128, zero_point="fitted")
INT4_NEAREST = Blocks(bits=4, scales="nearest")

EMBEDDING = "*embed_tokens.weight"
HEAD = "*lm_head.weight"
TIED_HEAD = "lm_head.weight"
"""What a product with the embedding goes by."""
FIRST_LAYER = "*.layers.0.*"
ROTARY: Rules = (("rotary*", Halves()),)

_W8A8: Rules = (("*", Columns()),)


def _int4(blocks: Blocks) -> Rules:
    return (*ROTARY, (FIRST_LAYER, INT8), ("*", blocks))


def _batches(blocks: Blocks) -> GraphRecipe:
    """Return the second graph of a hybrid, which shares the embedding with the first."""
    return GraphRecipe(((EMBEDDING, blocks), *ROTARY, *_W8A8))


def _with_heads(scheme: Scheme, rules: Rules) -> Rules:
    """Give the embedding and the head, which may be one tied weight, a scheme of their own."""
    return ((EMBEDDING, scheme), (HEAD, scheme), *rules)


EXACT = Recipe("fp32", "fp32", GraphRecipe())
_ALL = (
    EXACT,
    Recipe("fp16", "fp16", GraphRecipe(dtype="float16")),
    Recipe("int8", "int8", GraphRecipe((*ROTARY, ("*", INT8)))),
    Recipe("w8a8", "w8a8", GraphRecipe(_with_heads(INT8, (*ROTARY, *_W8A8)))),
    Recipe("int4", "int4", GraphRecipe(_int4(INT4))),
    Recipe("int4-heads8", "int4", GraphRecipe(_with_heads(INT8, _int4(INT4)))),
    Recipe("int4-blocks64", "int4", GraphRecipe(_int4(INT4_BLOCKS64))),
    Recipe("int4-uniform", "int4", GraphRecipe((*ROTARY, ("*", INT4)))),
    Recipe("int4-nearest", "int4", GraphRecipe((*ROTARY, ("*", INT4_NEAREST)))),
    Recipe("int4-fp16", "int4", GraphRecipe((*ROTARY, ("*", INT4)), dtype="float16")),
    Recipe("int4-cache8", "int4", GraphRecipe(_int4(INT4)), has_int8_cache=True),
    Recipe("hybrid", "hybrid", GraphRecipe(_int4(INT4)), _batches(INT4), has_int8_cache=True),
    Recipe("hybrid-cache32", "hybrid", GraphRecipe(_int4(INT4)), _batches(INT4)),
    Recipe(
        "hybrid-blocks64", "hybrid", GraphRecipe(_int4(INT4_BLOCKS64)), _batches(INT4_BLOCKS64), has_int8_cache=True
    ),
    Recipe(
        "hybrid-blocks128", "hybrid", GraphRecipe(_int4(INT4_BLOCKS128)), _batches(INT4_BLOCKS128), has_int8_cache=True
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
PRECISIONS: tuple[str, ...] = tuple(dict.fromkeys(recipe.precision for recipe in _ALL))


def choose_recipe(precision: str, name: str | None) -> Recipe:
    """Return a precision's recipe of that name, or its default.

    Raises:
        UnknownRecipe: the precision has no such recipe.
    """
    names = recipe_names(precision)
    if name is not None and name not in names:
        raise UnknownRecipe(f"{precision} has no recipe {name!r}; it has {', '.join(names)}")
    return RECIPES[name or names[0]]


def recipe_names(precision: str) -> list[str]:
    """Return the recipes of a precision, the default first."""
    return [recipe.name for recipe in _ALL if recipe.precision == precision]
