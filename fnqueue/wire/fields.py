"""What the models of the wire are made of: their base class, and fields that several nouns have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel

MAX_INSTANCES = 1_000_000

_TAG = re.compile(r"[A-Za-z0-9_:=-]{1,128}", re.ASCII)
_DURATION: TypeAdapter[timedelta] = TypeAdapter(timedelta)


class Wire(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        ser_json_bytes="utf8",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {name: value for name, value in given.items() if value is not None}
        return given

    def to_json(self) -> bytes:
        """As it goes on the wire: null fields left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


def upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _uri(value: str) -> str:
    """A path or an absolute URL. What it says of a host is not used: the container is always beside its sidecar."""
    if not value.isprintable() or " " in value or "\\" in value:
        raise ValueError("must be a URI without blanks, backslashes and control characters")
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ValueError("must be a path or a URI") from None
    if not parts.scheme and (parts.netloc or value.startswith("//")):
        raise ValueError("must be a path with one leading slash, or a URI")
    return value


def _tags(values: list[str]) -> list[str]:
    if any(_TAG.fullmatch(value) is None for value in values):
        raise ValueError("each tag has 1 to 128 letters, digits, '-', '_', ':' and '='")
    return list(dict.fromkeys(values))


def _duration(value: str) -> str:
    if seconds(value) <= 0:
        raise ValueError("must be an ISO-8601 duration above zero, as PT10S")
    return value


def seconds(duration: str) -> float:
    """0 for what is no ISO-8601 duration."""
    try:
        return _DURATION.validate_python(duration).total_seconds() if duration.startswith("P") else 0.0
    except ValidationError:
        return 0.0


def _without_blanks(value: Any) -> Any:
    if isinstance(value, list):
        return [item for item in value if not isinstance(item, str) or item.strip()]
    return value


def _once_each(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def unique(names: Iterable[str], what: str) -> None:
    listed = list(names)
    if len(set(listed)) < len(listed):
        raise ValueError(f"{what}: each name may come once")


Uri = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_uri)]
Instances = Annotated[int, Field(le=MAX_INSTANCES)]
Duration = Annotated[str, Field(max_length=64), AfterValidator(_duration)]
Tags = Annotated[list[str], Field(max_length=64), AfterValidator(_tags)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
AccountId = Annotated[str, Field(min_length=1, max_length=128)]
Places = Annotated[
    list[Annotated[str, Field(max_length=256)]],
    Field(max_length=64),
    BeforeValidator(_without_blanks),
    AfterValidator(_once_each),
]
