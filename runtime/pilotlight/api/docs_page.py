"""``/docs``: the OpenAPI document as one page of HTML. It loads nothing, from here or elsewhere, and runs no script."""

from __future__ import annotations

from html import escape
from typing import Any

import msgspec

SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid #8884; padding-top: 1.5rem; font-size: 1.1rem; }
code, pre { font: 0.85em/1.4 ui-monospace, monospace; }
pre { overflow: auto; max-height: 30rem; padding: 0.75rem; background: #8881; }
td { padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; }
:root { color-scheme: light dark; }
"""


def page(document: dict[str, Any]) -> str:
    """Return the page of a document."""
    info = document["info"]
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f'<p>{escape(info["description"])}</p><p><a href="openapi.json">openapi.json</a></p>'
        f"{''.join(operations)}<h2>Schemas</h2>{''.join(schemas)}</body></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = [
        _row(f"{parameter['name']} ({parameter['in']})", _kind(parameter["schema"]))
        for parameter in operation["parameters"]
    ]
    body = operation.get("requestBody")
    taken = [_row("body", _contents(body["content"]))] if body else []
    responses = [
        _row(status, f"{_contents(response['content'])} {escape(response['description'])}")
        for status, response in operation["responses"].items()
    ]
    return (
        f'<h2 id="{escape(operation["operationId"])}"><code>{method.upper()} {escape(path)}</code></h2>'
        f"<p>{escape(operation['summary'])}.</p><table>{''.join(parameters + taken + responses)}</table>"
    )


def _row(name: str, value: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{value}</td></tr>"


def _contents(content: dict[str, Any]) -> str:
    return " or ".join(
        f"{_kind(_described(of))} <small>{escape(media_type.partition(';')[0])}</small>"
        for media_type, of in content.items()
    )


def _described(content: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a body, or of what the events of a stream carry."""
    if "itemSchema" in content:
        data = content["itemSchema"]["properties"]["data"]
        return dict(data.get("else", data)["contentSchema"])
    return dict(content["schema"])


def _kind(schema: dict[str, Any]) -> str:
    """Name a schema, with a link where it is described on this page."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " | ".join(_kind(kind) for kind in schema["anyOf"])
    return escape(str(schema.get("type", "any")))


def _schema(name: str, schema: dict[str, Any]) -> str:
    source = msgspec.json.format(msgspec.json.encode(schema), indent=2).decode()
    return f'<details id="schema-{escape(name)}"><summary>{escape(name)}</summary><pre>{escape(source)}</pre></details>'
