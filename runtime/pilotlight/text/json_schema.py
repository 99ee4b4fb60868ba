"""JSON Schema, draft 2020-12, as far as answers can be held to it.

The grammar engine knows a part of the vocabulary. What it does not know is rewritten into what it knows, so that
everything which is valid under the result is valid under the schema; the reverse need not hold. (The items that
``contains`` asks for come first in their array, for instance.) What cannot be rewritten is refused, with its path.

Source: JSON Schema Core and Validation, 2020-12; what llguidance knows is in its docs/json_schema.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pilotlight.text.json_schema_negation import TYPES, negated
from pilotlight.text.json_schema_pattern import UnsupportedPattern, portable

Schema = dict[str, Any] | bool

MAX_DEPTH = 64
COUNTS = frozenset("minItems maxItems minLength maxLength minProperties maxProperties minContains maxContains".split())
AS_THEY_ARE = frozenset(
    "enum const required minimum maximum exclusiveMinimum exclusiveMaximum multipleOf $anchor $id $schema".split()
)
MAPS = frozenset(("properties", "$defs", "definitions"))
LISTS = frozenset(("allOf", "anyOf", "prefixItems"))
FORMATS = {name: name for name in "duration email hostname ipv4 ipv6 uri uuid".split()} | {
    # each of these contains all texts of the one it is written as
    "idn-email": "email",
    "idn-hostname": "hostname",
    "iri": "uri",
    "iri-reference": "uri",
    "uri-reference": "uri",
    "uri-template": "uri",
}
_DATE = (
    "([1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    "|[1-9][0-9](0[48]|[2468][048]|[13579][26])-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMAT_PATTERNS = {
    # llguidance's own let 29 February through in every year
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "json-pointer": "^(/([a-zA-Z0-9_ -]|~[01])*)*$",
    "relative-json-pointer": "^(0|[1-9][0-9]*)(#|(/([a-zA-Z0-9_ -]|~[01])*)*)$",
}
IN_PLACE = ("anyOf", "oneOf", "if", "dependentSchemas", "$dynamicRef")


class UnsupportedSchema(Exception):
    """A schema cannot be guaranteed; ``path`` leads to what is in the way, as ``.properties.name``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def supported(schema: object) -> dict[str, Any]:
    """Return a schema of known words under which no more is valid than under ``schema``.

    Raises:
        UnsupportedSchema: there is none; names the path to what is in the way.
    """
    plain = _Rewriter(schema).rewrite(schema, "", 0)
    if plain is False:
        raise UnsupportedSchema("", "nothing is valid under it")
    return {} if plain is True else plain


class _Rewriter:
    def __init__(self, root: object) -> None:
        self._root = root
        self._anchors = dict(_anchors(root, "#"))
        self._has_ids = any(True for _ in _nested_ids(root))

    def rewrite(self, schema: object, path: str, depth: int) -> Schema:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise UnsupportedSchema(path, "expected an object or a boolean")
        if depth > MAX_DEPTH:
            raise UnsupportedSchema(path, f"nested deeper than {MAX_DEPTH} levels")
        plain: dict[str, Any] = {}
        also: list[Schema] = []
        for key, value in schema.items():
            self._keyword(key, value, schema, f"{path}.{key}", depth + 1, plain, also)
        conjuncts = [each for each in also if each is not True]
        if False in conjuncts:
            return False
        if conjuncts:
            plain["allOf"] = [*plain.get("allOf", []), *conjuncts]
        return plain

    def _keyword(
        self,
        key: str,
        value: Any,
        schema: dict[str, Any],
        path: str,
        depth: int,
        plain: dict[str, Any],
        also: list[Schema],
    ) -> None:
        """Add one keyword to ``plain`` as it is, or to ``also`` as schemas that have to hold beside it."""
        if key in AS_THEY_ARE:
            plain[key] = value
        elif key == "type":
            plain[key] = _known_types(value, path)
        elif key in COUNTS:
            if "Contains" not in key:
                plain[key] = _count(value, path)
        elif key in MAPS:
            plain[key] = self._map(value, path, depth)
        elif key in LISTS:
            if not isinstance(value, list):
                raise UnsupportedSchema(path, "expected an array")
            plain[key] = [self.rewrite(each, f"{path}[{index}]", depth) for index, each in enumerate(value)]
        elif key in ("items", "additionalProperties"):
            plain[key] = self.rewrite(value, path, depth)
        elif key == "patternProperties":
            rewritten = self._map(value, path, depth)
            plain[key] = {_portable(name, f"{path}.{name}"): each for name, each in rewritten.items()}
        elif key == "pattern":
            plain[key] = _portable(value, path)
        elif key == "format":
            also.append(_format(value, path))
        elif key in ("$ref", "$dynamicRef"):
            plain["$ref"] = self._reference(key, value, path)
        elif (rule := _RULES.get(key)) is not None:
            also += rule(self, value, schema, path, depth)
        # whatever else there is, is an annotation

    def _map(self, value: Any, path: str, depth: int) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise UnsupportedSchema(path, "expected an object")
        return {name: self.rewrite(each, f"{path}.{name}", depth) for name, each in value.items()}

    def _reference(self, key: str, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise UnsupportedSchema(path, "expected a string")
        if key == "$dynamicRef" and self._has_ids:
            raise UnsupportedSchema(path, "cannot be guaranteed between several schema resources")
        if not value.startswith("#") and not self._has_ids:
            raise UnsupportedSchema(path, "only references into the schema itself are followed")
        return value if self._has_ids else self._anchors.get(value, value)

    def resolve(self, reference: Any) -> Any:
        """Return what a local reference leads to, None where that is not plain."""
        if self._has_ids or not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self._root
        for part in self._anchors.get(reference, reference).removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                return None
        return found

    def negate(self, schema: object, path: str, depth: int) -> Schema:
        """Return a schema under which only what is invalid under ``schema`` is valid; False where none is known."""
        return self.rewrite(negated(schema, self.resolve), path, depth)

    # Rules: each returns what has to hold in place of its keyword.

    def contains(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        """The items that are asked for come first; where their number is limited, no other is like them."""
        least = _count(schema.get("minContains", 1), path)
        most = _count(schema["maxContains"], path) if "maxContains" in schema else None
        wanted = self.rewrite(value, path, depth)
        if (most is not None and most < least) or (wanted is False and least):
            return [{"type": sorted(TYPES - {"array"})}]
        first: dict[str, Any] = {"prefixItems": [wanted] * least, "minItems": least} if least else {}
        if most is not None:
            first["items"] = self.negate(value, path, depth)
        return [first] if first else []

    def unique_items(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        if value and not (isinstance(schema.get("maxItems"), int) and schema["maxItems"] <= 1):
            raise UnsupportedSchema(path, "cannot be guaranteed")
        return []

    def dependent_required(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        return [
            {"anyOf": [{"properties": {name: False}}, {"required": [name, *needed]}]}
            for name, needed in _object(value, path).items()
            if needed
        ]

    def dependent_schemas(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        return [
            {"anyOf": [{"properties": {name: False}}, self.rewrite(then, f"{path}.{name}", depth)]}
            for name, then in _object(value, path).items()
        ]

    def property_names(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        if value is True or value == {}:
            return []
        if value is False:
            return [{"maxProperties": 0}]
        names = _object(value, path)
        keys = set(names) - {"type", "title", "description", "$comment"}
        if keys <= {"enum", "const"} and keys:
            listed = names.get("enum", [names.get("const")])
            known = {name: True for name in listed if isinstance(name, str)}
            return [{"properties": known, "additionalProperties": False}]
        if keys == {"pattern"}:
            pattern = _portable(names["pattern"], f"{path}.pattern")
        elif keys and keys <= {"minLength", "maxLength"}:
            least, most = _count(names.get("minLength", 0), path), names.get("maxLength", "")
            pattern = f"^[\\s\\S]{{{least},{most if most == '' else _count(most, path)}}}$"
        elif not keys:
            return []
        else:
            raise UnsupportedSchema(path, "only enum, const, pattern or lengths can be guaranteed of names")
        if "properties" in schema or "patternProperties" in schema:
            raise UnsupportedSchema(path, "cannot be guaranteed beside properties or patternProperties")
        rest = self.rewrite(schema.get("additionalProperties", True), path, depth)
        return [{"patternProperties": {pattern: rest}, "additionalProperties": False}]

    def condition(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        """``if``: both it and ``then``, or ``else`` without it; where the latter is not known, both ``then`` and it."""
        if "then" not in schema and "else" not in schema:
            return []
        stem = path.removesuffix(".if")
        wanted = self.rewrite(value, path, depth)
        then = self.rewrite(schema.get("then", True), f"{stem}.then", depth)
        other = self.rewrite(schema.get("else", True), f"{stem}.else", depth)
        without = self.negate(value, path, depth)
        return [{"anyOf": [_all(wanted, then), _all(then if without is False else without, other)]}]

    def negation(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        without = self.negate(value, path, depth)
        if without is False:
            raise UnsupportedSchema(path, "cannot be guaranteed")
        return [without]

    def one_of(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        """One alternative, and none of the others, unless they exclude each other anyway."""
        if not isinstance(value, list) or not value:
            raise UnsupportedSchema(path, "expected an array")
        choices = []
        for index, each in enumerate(value):
            others = [other for place, other in enumerate(value) if place != index and not _disjoint(each, other)]
            without = [self.negate(other, path, depth) for other in others]
            choices.append(_all(self.rewrite(each, f"{path}[{index}]", depth), *without))
        possible = [choice for choice in choices if choice is not False]
        if not possible:
            raise UnsupportedSchema(path, "cannot be guaranteed")
        return [{"anyOf": possible}]

    def unevaluated_items(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        rest = self.rewrite(value, path, depth)
        if rest is True or "items" in schema:
            return []
        prefixes = [each.get("prefixItems", []) for each in self._applied(schema, path)]
        if any("items" in each for each in self._applied(schema, path)):
            return []
        evaluated = max((len(prefix) for prefix in prefixes), default=0)
        return [{"prefixItems": [True] * evaluated, "items": rest} if evaluated else {"items": rest}]

    def unevaluated_properties(self, value: Any, schema: dict[str, Any], path: str, depth: int) -> list[Schema]:
        rest = self.rewrite(value, path, depth)
        if rest is True or any("additionalProperties" in each for each in self._applied(schema, path)):
            return []
        known = {name: True for each in self._applied(schema, path) for name in each.get("properties", {})}
        patterns = {
            _portable(name, path): True
            for each in self._applied(schema, path)
            for name in each.get("patternProperties", {})
        }
        beside: dict[str, Any] = {"properties": known, "additionalProperties": rest}
        return [{**beside, "patternProperties": patterns} if patterns else beside]

    def _applied(self, schema: dict[str, Any], path: str, depth: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the schemas that apply to an instance for certain: this one, and those of ``allOf`` and ``$ref``."""
        if depth > 8 or any(key in schema for key in IN_PLACE):
            raise UnsupportedSchema(path, "cannot be guaranteed beside alternatives")
        yield schema
        below = list(schema.get("allOf", []))
        if "$ref" in schema:
            below.append(self.resolve(schema["$ref"]))
        for each in below:
            if each is None:
                raise UnsupportedSchema(path, "cannot be guaranteed beside this reference")
            if isinstance(each, dict):
                yield from self._applied(each, path, depth + 1)


_RULES = {
    "contains": _Rewriter.contains,
    "uniqueItems": _Rewriter.unique_items,
    "dependentRequired": _Rewriter.dependent_required,
    "dependentSchemas": _Rewriter.dependent_schemas,
    "propertyNames": _Rewriter.property_names,
    "if": _Rewriter.condition,
    "not": _Rewriter.negation,
    "oneOf": _Rewriter.one_of,
    "unevaluatedItems": _Rewriter.unevaluated_items,
    "unevaluatedProperties": _Rewriter.unevaluated_properties,
}


def _all(*schemas: Schema) -> Schema:
    """Return the conjunction of schemas."""
    if False in schemas:
        return False
    real = [schema for schema in schemas if schema is not True and schema != {}]
    if not real:
        return True
    return real[0] if len(real) == 1 else {"allOf": real}


def _disjoint(first: Any, second: Any) -> bool:
    """Whether nothing is valid under both for certain: by their types, or by a property that each wants otherwise."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return first is False or second is False
    if (one := _types(first)) is not None and (other := _types(second)) is not None and not one & other:
        return True
    if not (_types(first) == _types(second) == {"object"}):
        return False
    needed = set(first.get("required", [])) & set(second.get("required", []))
    wanted = [(_values(first, name), _values(second, name)) for name in needed]
    return any(one and other and not one & other for one, other in wanted)


def _types(schema: dict[str, Any]) -> set[str] | None:
    given = schema.get("type")
    if given is None:
        return None
    types = {given} if isinstance(given, str) else set(given)
    return types | {"integer"} if "number" in types else types


def _values(schema: dict[str, Any], name: str) -> set[str]:
    """Return the strings that a property is limited to; nothing where it is not limited to strings."""
    of = schema.get("properties", {}).get(name, {})
    listed = of.get("enum", [of["const"]] if "const" in of else []) if isinstance(of, dict) else []
    return set(listed) if all(isinstance(value, str) for value in listed) else set()


def _count(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise UnsupportedSchema(path, "expected a whole number")
    return int(value)


def _known_types(value: Any, path: str) -> Any:
    for name in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        if name not in TYPES:
            raise UnsupportedSchema(path, f"there is no type {name!r}")
    return value


def _object(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UnsupportedSchema(path, "expected an object")
    return value


def _format(value: Any, path: str) -> Schema:
    if value in FORMAT_PATTERNS:
        return {"pattern": FORMAT_PATTERNS[value]}
    if value not in FORMATS:
        raise UnsupportedSchema(path, f"the format {value!r} cannot be guaranteed")
    return {"format": FORMATS[value]}


def _portable(pattern: Any, path: str) -> str:
    try:
        return portable(pattern)
    except UnsupportedPattern as error:
        raise UnsupportedSchema(path, str(error)) from error


def _anchors(schema: object, path: str) -> Iterator[tuple[str, str]]:
    """Yield ``#name`` and the pointer it stands for, for every anchor."""
    if isinstance(schema, dict):
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(key), str):
                yield f"#{schema[key]}", path
        for key, value in schema.items():
            if key not in ("enum", "const"):
                yield from _anchors(value, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from _anchors(value, f"{path}/{index}")


def _nested_ids(schema: object, top: bool = True) -> Iterator[str]:
    """Yield the identifiers below the root, each of which begins a schema resource of its own."""
    if isinstance(schema, dict):
        if not top and isinstance(schema.get("$id"), str):
            yield schema["$id"]
        for key, value in schema.items():
            if key not in ("enum", "const"):
                yield from _nested_ids(value, top=False)
    elif isinstance(schema, list):
        for value in schema:
            yield from _nested_ids(value, top=False)
