"""What is accepted of JSON Schema holds for every sampled answer; what is refused says where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grammar_sampling import make_grammars, sampled
from pilotlight.engine.grammar import Grammars
from pilotlight.errors import InvalidRequest
from pilotlight.text.grammar import check_grammar, json_schema_grammar
from pilotlight.text.json_schema import UnsupportedSchema, supported
from pilotlight.text.json_schema_negation import negated
from pilotlight.text.json_schema_pattern import portable

LEAST_ACCEPTED = 0.7
NUM_SAMPLES = 6


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grammars]:
    grammars = make_grammars(tmp_path_factory.mktemp("grammars"))
    yield grammars
    grammars.close()


def validator(schema: Any) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def grammar_of(schema: object) -> str | None:
    """Return the grammar of a schema, None where it is refused up front."""
    try:
        grammar = json_schema_grammar(schema, "schema")
        check_grammar(grammar, "schema")
    except InvalidRequest:
        return None
    return grammar


def answers(grammars: Grammars, schema: Any, num_samples: int) -> list[Any]:
    """Return sampled answers to an accepted schema; each of them is valid."""
    grammar = grammar_of(schema)
    assert grammar is not None
    found = []
    for seed in range(num_samples):
        if (text := sampled(grammars, grammar, seed)) is not None:
            found.append(json.loads(text))
            assert validator(schema).is_valid(found[-1]), text
    return found


def test_of_the_official_suite_enough_is_accepted_and_all_of_that_holds(
    shared_data: Path, grammars: Grammars, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted, refused, num_answers = [], [], 0
    for path in sorted((shared_data / "json_schema").glob("*.json")):
        for group in json.loads(path.read_text()):
            if grammar_of(group["schema"]) is None:
                refused.append(f"{path.stem}: {group['description']}")
            else:
                accepted.append(f"{path.stem}: {group['description']}")
                num_answers += len(answers(grammars, group["schema"], NUM_SAMPLES))
    with capsys.disabled():
        print(f"\nJSON Schema suite: {len(accepted)} accepted, {len(refused)} refused, {num_answers} valid answers")
    assert num_answers > len(accepted) * NUM_SAMPLES / 2
    assert len(accepted) >= LEAST_ACCEPTED * (len(accepted) + len(refused)), refused


DOG = {"properties": {"kind": {"const": "dog"}, "barks": {"type": "boolean"}}, "required": ["kind", "barks"]}
CAT = {"properties": {"kind": {"const": "cat"}, "lives": {"enum": [7, 9]}}, "required": ["kind", "lives"]}
SHORT = {"type": "string", "maxLength": 3}
CLOSED = {"type": "object", "additionalProperties": False}

HELD: dict[str, Any] = {
    "true": True,
    "annotations": {"title": "t", "description": "d", "default": 1, "examples": [1], "x-mine": 1, "type": "integer"},
    "counts as floats": {"type": "array", "items": {"const": 1}, "minItems": 1.0, "maxItems": 2.0},
    "if then else": {
        **CLOSED,
        "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
        "required": ["kind"],
        "if": {"properties": {"kind": {"const": "a"}}},
        "then": {"required": ["n"]},
        "else": {"properties": {"n": False}},
    },
    "if without else": {"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 3}},
    "else without then": {"type": ["integer", "null"], "if": {"type": "integer"}, "else": {"const": None}},
    "a condition that cannot be negated": {
        "type": "string",
        "if": {"pattern": "^a"},
        "then": {"maxLength": 4},
        "else": {"minLength": 2},
    },
    "if alone": {"if": {"type": "string"}, "type": "integer"},
    "not a value": {**CLOSED, "properties": {"a": {**SHORT, "not": {"enum": ["", "a", "ab"]}}}, "required": ["a"]},
    "not a number": {"type": "integer", "minimum": -9, "maximum": 9, "not": {"minimum": 0, "maximum": 4}},
    "not a type": {"not": {"type": ["object", "array", "string", "null"]}},
    "not required": {"type": "object", "not": {"required": ["a"]}, "maxProperties": 2},
    "not not": {"not": {"not": {"type": "boolean"}}},
    "one of what excludes": {"type": "object", "oneOf": [{"type": "object", **DOG}, {"type": "object", **CAT}]},
    "one of what overlaps": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]},
    "dependent": {**CLOSED, "properties": {"a": SHORT, "b": SHORT}, "dependentRequired": {"a": ["b"]}},
    "dependent schemas": {
        **CLOSED,
        "properties": {"a": SHORT, "b": {}},
        "dependentSchemas": {"a": {"properties": {"b": {"const": 1}}, "required": ["b"]}},
    },
    "names": {"type": "object", "propertyNames": {"pattern": "^x[0-9]$"}, "maxProperties": 2},
    "names of a length": {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": SHORT},
    "listed names": {"type": "object", "propertyNames": {"enum": ["a", "b"]}},
    "contains": {"type": "array", "items": {"enum": [1, 2, 3]}, "contains": {"const": 2}, "maxItems": 4},
    "contains so many": {
        "type": "array",
        "items": {"enum": [1, 2, 3]},
        "contains": {"minimum": 2},
        "minContains": 2,
        "maxContains": 3,
    },
    "unevaluated items": {"allOf": [{"prefixItems": [SHORT]}], "type": "array", "unevaluatedItems": False},
    "unevaluated properties": {
        "type": "object",
        "$ref": "#/$defs/base",
        "properties": {"b": SHORT},
        "unevaluatedProperties": False,
        "$defs": {"base": {"properties": {"a": SHORT}, "required": ["a"]}},
    },
    "an anchor": {"$ref": "#there", "$defs": {"x": {"$anchor": "there", "type": "null"}}},
    "a dynamic anchor": {"$dynamicRef": "#there", "$defs": {"x": {"$dynamicAnchor": "there", "type": "null"}}},
    "recursion": {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}},
    },
    "formats": {
        **CLOSED,
        "properties": {name: {"format": name, "type": "string"} for name in ("date", "time", "date-time", "ipv4")},
        "required": ["date", "time", "date-time"],
    },
    "classes": {"type": "string", "pattern": r"^\d{2}[\w-]\s$"},
    "unique, for there is one": {"type": "array", "uniqueItems": True, "maxItems": 1},
}  # fmt: skip


@pytest.mark.parametrize("schema", HELD.values(), ids=HELD.keys())
def test_what_is_accepted_holds(grammars: Grammars, schema: Any) -> None:
    assert answers(grammars, schema, 30)


REFUSED: list[tuple[object, str]] = [
    ({"properties": {"a": {"uniqueItems": True}}}, ".properties.a.uniqueItems"),
    ({"items": {"anyOf": [{}, {"not": {"pattern": "a"}}]}}, ".items.anyOf[1].not"),
    ({"properties": {"a": {"format": "regex"}}}, ".properties.a.format"),
    ({"properties": {"a": {"pattern": r"^\p{L}$"}}}, ".properties.a.pattern"),
    ({"$ref": "https://example.com/other"}, ".$ref"),
    ({"items": {"$ref": 5}}, ".items.$ref"),
    ({"type": "thing"}, ".type"),
    ({"properties": []}, ".properties"),
    ({"properties": {"a": 5}}, ".properties.a"),
    ({"maxItems": 1.5}, ".maxItems"),
    ({"anyOf": {}}, ".anyOf"),
    ({"propertyNames": {"format": "email"}}, ".propertyNames"),
    ({"anyOf": [{}], "unevaluatedProperties": False}, ".unevaluatedProperties"),
    ({"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, ".oneOf"),
    (False, ""),
    ([], ""),
    ({"allOf": [{"not": {}}]}, ".allOf[0].not"),
]


@pytest.mark.parametrize(("schema", "path"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_held_is_refused_with_its_path(schema: object, path: str) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        supported(schema)
    assert caught.value.path == path


def test_endless_nesting_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    with pytest.raises(UnsupportedSchema, match="deeper than"):
        supported(schema)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "ab", "b"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from("ab"), below, max_size=2),
    max_leaves=4,
)
TYPE_NAMES = st.sampled_from(["array", "boolean", "integer", "null", "number", "object", "string"])
SCHEMAS = st.recursive(
    st.booleans()
    | st.fixed_dictionaries({"type": TYPE_NAMES | st.lists(TYPE_NAMES, min_size=1, max_size=3, unique=True)})
    | st.fixed_dictionaries({"enum": st.lists(VALUES, min_size=1, max_size=3)})
    | st.fixed_dictionaries({"const": VALUES})
    | st.dictionaries(st.sampled_from(["minimum", "exclusiveMaximum", "maxLength", "minItems"]), st.integers(0, 3))
    | st.fixed_dictionaries({"required": st.lists(st.sampled_from("ab"), max_size=2, unique=True)}),
    lambda below: (
        st.fixed_dictionaries({"properties": st.dictionaries(st.sampled_from("ab"), below, max_size=2)})
        | st.fixed_dictionaries({"items": below})
        | st.fixed_dictionaries({"prefixItems": st.lists(below, min_size=1, max_size=2), "items": below})
        | st.fixed_dictionaries({"not": below})
        | st.fixed_dictionaries({"anyOf": st.lists(below, min_size=1, max_size=2)})
        | st.fixed_dictionaries({"allOf": st.lists(below, min_size=1, max_size=2)})
    ),
    max_leaves=4,
)


@given(schema=SCHEMAS, value=VALUES)
def test_what_a_negation_allows_is_invalid(schema: Any, value: Any) -> None:
    if jsonschema.Draft202012Validator(negated(schema, lambda _: None)).is_valid(value):
        assert not jsonschema.Draft202012Validator(schema).is_valid(value)


@given(words=st.sets(st.text("ab-]^\\", max_size=3), min_size=1, max_size=4), text=st.text("ab-]^\\c", max_size=4))
def test_the_complement_of_words_is_exact(words: set[str], text: str) -> None:
    other = negated({"enum": sorted(words)}, lambda _: None)
    assert isinstance(other, dict)
    (pattern,) = [way["pattern"] for way in other["anyOf"] if "pattern" in way]
    assert bool(re.fullmatch(pattern.removeprefix("^").removesuffix("$"), text)) == (text not in words)


def test_classes_mean_ascii() -> None:
    assert portable(r"\d[\w.]\\d\]\s") == r"[0-9][A-Za-z0-9_.]\\d\][ \t\n\r\f\v]"
