"""Secrets of a function version (contract/management.md §6)."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SecretStr, WithJsonSchema

from fnqueue.wire.fields import Wire

MAX_SECRET_CHARACTERS = 32_768


def _secret(value: Any) -> str:
    """The JSON text of a string or an object; says nothing of what it was."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if not isinstance(value, str | dict):
        raise ValueError("must be a string or a JSON object")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=isinstance(value, str), separators=(",", ":"))
        text.encode()
    except ValueError:
        raise ValueError("must hold nothing that JSON in UTF-8 cannot") from None
    if not 1 <= len(value if isinstance(value, str) else text) <= MAX_SECRET_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_SECRET_CHARACTERS} characters as JSON")
    return text


SecretName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$")]


class Secret(Wire):
    """`value` is a string or a JSON object on the wire, and its JSON text here."""

    name: SecretName
    value: Annotated[
        SecretStr,
        BeforeValidator(_secret),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1, "maxLength": MAX_SECRET_CHARACTERS},
                    {"type": "object"},
                ],
                "writeOnly": True,
            }
        ),
    ]


class PutSecrets(Wire):
    """Body of `PUT /secrets/functions/{functionId}/versions/{versionId}`: merged by name."""

    secrets: list[Secret]
