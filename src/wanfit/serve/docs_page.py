"""`/docs`: our OpenAPI as a page, drawn here: no script, and nothing from another server."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>wanfit</title><style>
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}
h2{margin-top:2rem}h3{margin-bottom:0}code{font:14px ui-monospace,monospace}
table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}
</style></head><body><h1>wanfit</h1>
<p>For programs: <a href="openapi.json">openapi.json</a></p>"""
CONTENT_SECURITY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def docs_page(openapi: Mapping[str, Any]) -> str:
    """Every route with its words, parameters and fields."""
    by_tag: dict[str, list[str]] = {}
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            tag = operation.get("tags", ["other"])[0]
            by_tag.setdefault(tag, []).append(_route(method, path, operation))
    sections = [f"<h2>{escape(tag)}</h2>{''.join(routes)}" for tag, routes in by_tag.items()]
    return f"{_HEAD}{''.join(sections)}</body></html>"


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [
        _row(f"{parameter['name']} ({parameter['in']})", parameter.get("schema", {}))
        for parameter in operation.get("parameters", ())
    ]
    content = operation.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] = next((form["schema"] for form in content.values()), {})
    rows += [_row(name, field) for name, field in schema.get("properties", {}).items()]
    words = escape(operation.get("description", ""))
    table = f"<table>{''.join(rows)}</table>" if rows else ""
    return f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{words}</p>{table}"


def _row(name: str, schema: Mapping[str, Any]) -> str:
    kinds = [one.get("type", "") for one in schema.get("anyOf", (schema,))]
    kind = ", ".join(str(kind) for kind in kinds if kind and kind != "null")
    words = str(schema.get("description", ""))
    return (
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td>"
        f"<td>{escape(words)}</td></tr>"
    )
