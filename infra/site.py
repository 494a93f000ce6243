"""What the documentation site has beyond its pages: the operations, made from the OpenAPI document, and an entrance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from api.app import operations
from api.front import Front
from api.openapi import document

# Pages of the repository that are part of the site.
BESIDE = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
INDEX, REFERENCE = "docs/index", "docs/reference"
MARK = "<!-- In the site, the operations stand here. -->"
ENTRANCE = (
    '<!doctype html><meta charset="utf-8"><title>fnqueue</title><meta http-equiv="refresh" content="0; url=docs/">'
)

Json = Mapping[str, Any]
DOCS = Path(__file__).resolve().parent.parent / "docs"
_PATTERN = re.compile(r"^([\w-]+\*)\n", re.MULTILINE)
_SCHEMA = "#/components/schemas/"


def read(name: str, text: str) -> str:
    """A page as Sphinx shall read it; `name` is its path without the suffix."""
    if name == INDEX:
        # A pattern names pages that may be there: Sphinx would complain of one without any.
        return _PATTERN.sub(lambda found: found[0] if any(DOCS.glob(f"{found[1]}.md")) else "", text)
    if name == REFERENCE:
        # No operation asks anything of its front end before it serves.
        return text.replace(MARK, reference(document(operations(cast("Front", None)))))
    return text


def finish(folder: Path) -> None:
    """The site begins at `docs/`, and so does who opens its folder."""
    folder.joinpath("index.html").write_text(ENTRANCE + "\n")
    folder.joinpath(".nojekyll").touch()


def reference(openapi: Json) -> str:
    """Every operation by its group, then the shapes of the JSON, then the errors, as Markdown."""
    components = openapi["components"]
    lines: list[str] = []
    for tag in openapi["tags"]:
        lines += ["", f"## {tag['name'].capitalize()}", ""]
        for path, item in openapi["paths"].items():
            for method, operation in item.items():
                if operation["tags"] == [tag["name"]]:
                    lines += _operation(method.upper(), path, operation)
    lines += ["", "## Shapes", ""]
    for name, schema in sorted(components["schemas"].items()):
        lines += _shape(name, schema)
    lines += ["", "## Problems", "", "What can go wrong, by status, and the `type` of each.", ""]
    lines += ["| Status | |", "|---|---|"]
    lines += [f"| {name} | {_cell(response['description'])} |" for name, response in components["responses"].items()]
    return "\n".join(lines)


def _operation(method: str, path: str, operation: Json) -> Iterator[str]:
    yield from ("", f"### {operation['summary']}", "", f"`{method} {path}`", "")
    if described := operation.get("description"):
        yield from (described, "")
    if parameters := operation.get("parameters"):
        yield from ("| Parameter | In | |", "|---|---|---|")
        for each in parameters:
            yield f"| `{each['name']}` | {each['in']} | {_cell(each.get('description', ''), _type(each['schema']))} |"
        yield ""
    if body := operation.get("requestBody"):
        shapes = [f"{media}: {_type(content['schema'])}" for media, content in body["content"].items()]
        yield from (f"**Takes** {'; '.join(shapes)}", "")
    yield from ("| Answer | |", "|---|---|")
    failures = []
    for status, response in operation["responses"].items():
        if "$ref" in response:
            failures.append(f"[{status}](#problems)")
        else:
            shapes = [_type(content["schema"]) or media for media, content in response.get("content", {}).items()]
            yield f"| {status} | {_cell(response['description'], *shapes)} |"
    if failures:
        yield f"| or | {' '.join(failures)} |"


def _shape(name: str, schema: Json) -> Iterator[str]:
    yield from ("", f"### {name}", "")
    if described := schema.get("description"):
        yield from (described, "")
    if "properties" not in schema:
        yield from (_type(schema), "")
        return
    needed: Sequence[str] = schema.get("required", ())
    yield from ("| Field | Is | |", "|---|---|---|")
    for field, shape in schema["properties"].items():
        name = f"`{field}` (needed)" if field in needed else f"`{field}`"
        yield f"| {name} | {_type(shape)} | {_cell(shape.get('description', ''))} |"


def _type(schema: Json) -> str:
    """In a few words; shapes of their own as links."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_SCHEMA)
        return f"[{name}](#{name.lower()})"
    if several := [each for kind in ("anyOf", "oneOf", "allOf") for each in schema.get(kind, ())]:
        return " or ".join(dict.fromkeys(_type(each) for each in several))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    return _plain(schema)


def _plain(schema: Json) -> str:
    kind = schema.get("type", "")
    if kind == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties']) or 'anything'}"
    return " ".join(filter(None, (kind if isinstance(kind, str) else " or ".join(kind), schema.get("format", ""))))


def _cell(*texts: str) -> str:
    """One cell of a table."""
    return " ".join(re.sub(r"\s+", " ", text).replace("|", "\\|") for text in texts if text)
