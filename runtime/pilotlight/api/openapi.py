"""``/openapi.json``: what the endpoints say of themselves, in OpenAPI 3.2 (the first that knows streams)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from pilotlight.api import anthropic_errors
from pilotlight.api.anthropic_types import ErrorEvent
from pilotlight.api.endpoint import Endpoint
from pilotlight.api.objects import ErrorEnvelope, RequestHeaders
from pilotlight.api.wire import Body
from pilotlight.errors import PilotlightError
from pilotlight.tee import TEE_HEADER, TeeLabel

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
REF = "#/components/schemas/{name}"
PATH_PARAMETER = re.compile(r"{(\w+)(:\w+)?}")
DESCRIPTION = (
    "Functions of language models, behind the APIs that app backends already speak: chat and text completions and "
    "responses of OpenAI, messages of Anthropic. `model` names the function. A parameter that would change the answer "
    "and is not supported is refused by name."
)

Schema = dict[str, Any]


def document(endpoints: Sequence[Endpoint], version: str) -> Schema:
    """Return the document that describes these endpoints."""
    schemas = _Schemas(endpoints)
    paths: dict[str, Schema] = {}
    for endpoint in endpoints:
        path = PATH_PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    return {
        "openapi": "3.2.0",
        "info": {"title": "Pilotlight", "version": version, "description": DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"api_key": []}],
    }


class _Schemas:
    """The schemas of every wire type that the endpoints name, made together so that they share components."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        types: list[Any] = [ErrorEnvelope, ErrorEvent, RequestHeaders]
        for endpoint in endpoints:
            named = (endpoint.answer, endpoint.body, endpoint.event, endpoint.query, endpoint.headers)
            types += [kind for kind in named if kind is not None and not isinstance(kind, str) and kind not in types]
        schemas, self.components = msgspec.json.schema_components(types, ref_template=REF)
        self._types = types
        self._schemas = schemas
        for kind in types:
            if inspect.isclass(kind) and issubclass(kind, Body):
                _complete(self.components[kind.__name__], kind)
                for untyped in kind.untyped:
                    self.components[untyped.__name__]["required"].remove("type")

    def of(self, kind: Any) -> Schema:
        """Return the schema of a type, which for a struct is a reference."""
        return self._schemas[self._types.index(kind)]

    def fields(self, kind: Any) -> list[tuple[str, Schema, bool]]:
        """Return the name, the schema and the necessity of each field of a struct."""
        component = self.components[kind.__name__]
        required = component.get("required", ())
        return [(name, schema, name in required) for name, schema in component["properties"].items()]


def _complete(component: Schema, kind: type[Body]) -> None:
    """Add what a body takes besides its fields, and that null means not given."""
    properties = component["properties"]
    for name, schema in properties.items():
        if name not in component["required"] and {"type": "null"} not in schema.get("anyOf", ()):
            default = {"default": schema.pop("default")} if "default" in schema else {}
            properties[name] = {"anyOf": [schema, {"type": "null"}], **default}
    for name in sorted(kind.ignored):
        properties[name] = {"description": "Accepted, without any effect."}
    for name, values in sorted(kind.neutral.items()):
        properties[name] = {
            "description": "Not supported: accepted with a value that asks for nothing.",
            "enum": [*values, None],
        }


def _operation(endpoint: Endpoint, schemas: _Schemas) -> Schema:
    operation: Schema = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "parameters": _parameters(endpoint, schemas),
        "responses": _responses(endpoint, schemas),
    }
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas.of(endpoint.body)}}}
    return operation


def _parameters(endpoint: Endpoint, schemas: _Schemas) -> list[Schema]:
    found = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name, _ in PATH_PARAMETER.findall(endpoint.path)
    ]
    for place, kind in (("query", endpoint.query), ("header", endpoint.headers), ("header", RequestHeaders)):
        if kind is not None:
            found += [
                {"name": name, "in": place, "required": required, "schema": _without_null(schema)}
                for name, schema, required in schemas.fields(kind)
            ]
    return found


def _without_null(schema: Schema) -> Schema:
    """Return the schema of a parameter, which is either given as text or left out."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf" and value is not None}
    return {**rest, **kinds[0]} if "anyOf" in schema else rest


def _responses(endpoint: Endpoint, schemas: _Schemas) -> Schema:
    if isinstance(endpoint.answer, str):
        content: Schema = {endpoint.answer: {"schema": {"type": "string"}}}
    else:
        content = {JSON: {"schema": schemas.of(endpoint.answer)}}
    if endpoint.event is not None:
        content[EVENT_STREAM] = {"itemSchema": _frame(endpoint, schemas)}
    content |= {media_type: {"schema": {"type": "string"}} for media_type in endpoint.also}
    responses = {"200": _response("The answer.", content)}
    error = ErrorEvent if endpoint.path.startswith(anthropic_errors.PATHS) else ErrorEnvelope
    for status, reasons in sorted(_reasons(endpoint.refusals).items()):
        responses[str(status)] = _response(" ".join(reasons), {JSON: {"schema": schemas.of(error)}})
    return responses


def _frame(endpoint: Endpoint, schemas: _Schemas) -> Schema:
    """Return the schema of one server-sent event, whose data is JSON (or, where a stream ends so, its terminator)."""
    event = schemas.of(endpoint.event)
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": event}
    if endpoint.terminator is not None:
        or_error = {"anyOf": [event, schemas.of(ErrorEnvelope)]}
        rest = {"contentMediaType": JSON, "contentSchema": or_error}
        data = {"type": "string", "if": {"const": endpoint.terminator}, "else": rest}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}


def _response(description: str, content: Schema) -> Schema:
    request_id = {"description": "Names the request, in the usage ledger too.", "schema": {"type": "string"}}
    tee = {"description": "What proves the machine: see /attestation.", "schema": {"enum": [*TeeLabel]}}
    headers = {"x-request-id": request_id, TEE_HEADER: tee}
    return {"description": description, "headers": headers, "content": content}


def _reasons(refusals: Iterable[type[PilotlightError]]) -> dict[int, list[str]]:
    """Return why each status may come: the first lines of the errors' own documentation."""
    reasons: dict[int, list[str]] = {}
    for error in refusals:
        (line, *_) = (inspect.getdoc(error) or error.__name__).splitlines()
        reasons.setdefault(error.status, []).append(line)
    return reasons
