"""The OpenAPI document, and a page that shows it without scripts and without other hosts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .questions import Description

__all__ = ["docs_page", "embed_schema", "predict_schema", "schema_of"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { background: #f2f2f2; padding: 0.7rem; overflow-x: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 0.2rem 1rem 0.2rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } pre { background: #2a2a2a; }
a { color: #8bf; } }
"""

_NUMBER, _WHOLE = {"type": "number"}, {"type": "integer"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "What was expected, what was got, and what to do."}},
}
_STATUSES = {
    "408": "The body did not arrive in time.",
    "413": "The body is larger than the limit.",
    "414": "The query is too long.",
    "422": "The photo cannot be read, or a parameter is invalid.",
    "500": "An error inside the service.",
    "503": "Too many photos wait, or the service starts or ends. Try again after the seconds of Retry-After.",
}


def schema_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the application; made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema["components"] = {"schemas": {"Error": _ERROR}}
        app.openapi_schema = schema
    return app.openapi_schema


def predict_schema(description: Description, steps: Sequence[float]) -> dict[str, Any]:
    """The operation of POST /v1/predict."""
    one = {"type": "object", "properties": {"class": _WHOLE, "label": {"type": "string"}, "probability": _NUMBER}}
    lives = {
        "type": "object",
        "description": "The life of each patch in blocks, row by row over the grid (rows, columns).",
        "properties": {
            "grid": {"type": "array", "items": _WHOLE},
            "life": {"type": "array", "items": _NUMBER},
        },
    }
    answer = {
        "top": {"type": "array", "items": one},
        "kept": {"type": "array", "items": _WHOLE, "description": "Patches that enter each block."},
        "lives": lives,
    }
    parameters = [
        _budget_parameter(description, steps),
        _parameter("top", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}, "Number of classes."),
        _parameter("lives", {"type": "boolean", "default": False}, "Also tell the life of each patch."),
    ]
    return _operation(parameters, answer, ["top", "kept"])


def embed_schema(description: Description, steps: Sequence[float]) -> dict[str, Any]:
    """The operation of POST /v1/embed."""
    answer = {"embedding": {"type": "array", "items": _NUMBER}}
    return _operation([_budget_parameter(description, steps)], answer, ["embedding"])


def _budget_parameter(description: Description, steps: Sequence[float]) -> dict[str, Any]:
    if description.budgets is not None:
        schema: dict[str, Any] = {"type": "number", "enum": list(description.budgets)}
    else:
        schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.01}
    text = f"Fraction of the dense model's FLOPs. Default: {steps[0]:g}."
    if len(steps) > 1:
        text += f" Under load a lower one may answer: {', '.join(f'{step:g}' for step in steps[1:])}."
    return _parameter("budget", schema, text)


def _parameter(name: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _operation(parameters: list[dict[str, Any]], answer: dict[str, Any], required: list[str]) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"type": "object", "required": ["photo"], "properties": {"photo": {"type": "string", "format": "binary"}}}
    content: dict[str, Any] = dict.fromkeys(("image/jpeg", "image/png", "image/webp"), binary)
    content |= {"application/octet-stream": binary, "multipart/form-data": {"schema": form}}
    common = {"budget": _NUMBER, "flops": _NUMBER, "fraction_of_dense": _NUMBER}
    record = {"type": "object", "required": [*required, *common], "properties": {**answer, **common}}
    header = {"X-PatchLife-Budget": {"schema": _NUMBER, "description": "The budget that answered."}}
    good = {"description": "The answer.", "headers": header, "content": {"application/json": {"schema": record}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "parameters": parameters,
        "requestBody": {"required": True, "description": "One JPEG, PNG or WEBP photo.", "content": content},
        "responses": {"200": good} | {s: {"description": text, "content": error} for s, text in _STATUSES.items()},
    }


def docs_page(schema: dict[str, Any], description: Description, base: str) -> str:
    """A page of the OpenAPI document; ``base`` is the address of the service, with a slash at its end."""
    tasks = "".join(f"<pre>curl --data-binary @photo.jpg {escape(base)}v1/{task}</pre>" for task in description.tasks)
    operations = "".join(
        _section(method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>PatchLife: {escape(description.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>PatchLife · {escape(description.name)}</h1>{tasks}"
        f'<p>The OpenAPI document is <a href="openapi.json">openapi.json</a>.</p>{operations}</html>'
    )


def _section(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [(f"?{parameter['name']}=", parameter["description"]) for parameter in operation.get("parameters", [])] + [
        (status, answer["description"]) for status, answer in operation["responses"].items()
    ]
    table = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>" for name, text in rows)
    text = operation.get("description", "")
    return f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(text)}</p><table>{table}</table>"
