"""Whether an answer is what a step expects; every difference is told, not just the first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.compat.exchange import Reply
from tests.compat.scenarios import Step

ABSENT = object()


def differences(step: Step, reply: Reply) -> list[str]:
    return [*_status(step, reply), *_headers(step, reply), *_body(step, reply)]


def _status(step: Step, reply: Reply) -> Iterator[str]:
    wanted = step.status if isinstance(step.status, list) else [step.status]
    if reply.status not in wanted:
        yield f"status is {reply.status}, not {step.status}"


def _headers(step: Step, reply: Reply) -> Iterator[str]:
    for name, wanted in step.has.items():
        values = reply.headers.getall(name, [])
        if wanted is None:
            if values:
                yield f"header {name} is there: {values}"
        elif isinstance(wanted, list):
            if values != wanted:
                yield f"headers {name} are {values}, not {wanted}"
        elif len(values) != 1 or not _same(str(wanted), values[0]):
            yield f"header {name} is {values}, not {wanted!r}"


def _body(step: Step, reply: Reply) -> Iterator[str]:
    if step.text is not None and not _same(step.text, reply.body.decode(errors="replace")):
        yield f"body is not {step.text!r}"
    if step.gives is None and step.equals is None:
        return
    try:
        found = reply.json
    except ValueError:
        yield "body is not JSON"
        return
    if step.equals is not None and found != step.equals:
        yield f"JSON is not {step.equals}"
    if step.gives is not None:
        yield from _members(step.gives, found, "JSON")


def _members(wanted: Any, found: Any, at: str) -> Iterator[str]:
    if wanted is None:
        if found not in (ABSENT, None):
            yield f"{at} is there: {found!r}"
    elif isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            yield f"{at} is {_shown(found)}, not an object"
            return
        for name, each in wanted.items():
            yield from _members(each, found.get(name, ABSENT), f"{at}.{name}")
    elif isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            yield f"{at} is {_shown(found)}, not {len(wanted)} elements"
            return
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            yield from _members(one, other, f"{at}[{number}]")
    elif isinstance(wanted, str) and wanted.startswith("~"):
        if found is ABSENT or not _same(wanted, str(found)):
            yield f"{at} is {_shown(found)}, not {wanted}"
    elif type(found) is not type(wanted) or found != wanted:
        yield f"{at} is {_shown(found)}, not {wanted!r}"


def _same(wanted: str, found: str) -> bool:
    if wanted.startswith("~"):
        return re.fullmatch(wanted[1:], found, re.DOTALL) is not None
    return wanted == found


def _shown(found: Any) -> str:
    return "absent" if found is ABSENT else repr(found)
