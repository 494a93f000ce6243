"""Scenarios: what a client sends and what it gets, as data. One YAML file per group under `scenarios/`.

A file is a list of scenarios. Each has
    name    a sentence that is true when the scenario passes
    rows    the rows of the contract that it covers (`rows/`)
    given   what is there before: see Given
    each    variants: one run each, with these variables
    stack   true: also run on RabbitMQ, Redis and S3
    steps   calls in order; a scenario of one call has the call's members itself: see Step
`{name}` in any text stands for a variable: one of `each`, of what is given, or one that a step kept. A text that is
nothing but `{name}` stands for the variable as it is, also when that is a number or an object.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

HERE = Path(__file__).parent
RUNNING = "running"

T = TypeVar("T")

_VARIABLE = re.compile(r"\{([a-z][a-z_0-9]*)\}")


class _Loader(yaml.SafeLoader):
    """YAML in which nothing is said twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {', '.join(sorted(twice))}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> Any:
    with path.open() as file:
        return yaml.load(file, _Loader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What is there before the first step.

    function    `running`: one whose container does what a step's `container` says (tests/containers/mirror.py);
                `idle`: ACTIVE, and nobody takes what is queued; `made`: never deployed; or a status to put it into.
                Its variables are `function` and `version`.
    definition  further fields of the function's definition
    asset       true: one that was uploaded; its variable is `asset`
    account     `shared` by all scenarios, or `fresh`; its variable is `account`, another account's is `stranger`
    """

    function: str = ""
    definition: Mapping[str, Any] = field(default_factory=dict)
    asset: bool = False
    account: str = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call, and what has to come back.

    Sent:
        call       method and path
        of         whose key: `caller` (with every scope of an account), `stranger`, `admin`, `nobody`, a key itself, or
                   one that is made: some of account, scopes, resources
        headers    name to value, or to values
        json, but  a JSON body, with these members in place of its own; null takes one away
        body       a body as it is; `size` bytes of no meaning
        container  what the container is told to do
        raw        the whole request, in place of all others; `{authorization}` is the caller's header
    Expected:
        status     of the answer, or several
        has        headers: a value, several values, `~` and a pattern, or null for absent
        gives      members of the JSON: objects may have more of them, null is absent, texts may be `~` and a pattern
        equals     the JSON, all of it
        text       the body, or `~` and a pattern
    And then:
        keep       variable to a path in the JSON (`function.id`), or to `header NAME`
        within_s   repeat the call until the answer is as expected
    """

    call: str = ""
    of: str | Mapping[str, Any] = "caller"
    headers: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    but: Any = None
    body: str | None = None
    size: int = 0
    container: Mapping[str, Any] = field(default_factory=dict)
    raw: str = ""
    status: Any = 200
    has: Mapping[str, Any] = field(default_factory=dict)
    gives: Any = None
    equals: Any = None
    text: str | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    within_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`id` is unique among all."""

    id: str
    name: str
    rows: tuple[str, ...]
    given: Given
    steps: tuple[Step, ...]
    variables: Mapping[str, Any]
    stack: bool


@cache
def read_all() -> tuple[Scenario, ...]:
    """Raises ValueError that names the file and the scenario which is not well written."""
    return tuple(scenario for path in sorted((HERE / "scenarios").glob("*.yaml")) for scenario in _read(path))


def _read(path: Path) -> Iterator[Scenario]:
    for number, written in enumerate(load(path) or []):
        try:
            yield from _scenarios(path.stem, written)
        except (TypeError, ValueError, KeyError) as exc:
            raise ValueError(f"{path.name}, scenario {number} ({written.get('name')}): {exc}") from exc


def _scenarios(group: str, written: Mapping[str, Any]) -> Iterator[Scenario]:
    known = {"name", "rows", "given", "each", "stack", "steps"}
    head = {name: written[name] for name in known & written.keys()}
    inline = {name: written[name] for name in written.keys() - known}
    steps = [_made(Step, step) for step in head.get("steps", [inline])]
    if "steps" in head and inline:
        raise ValueError(f"steps, and beside them {', '.join(inline)}")
    for variant, each in enumerate(head.get("each", [{}]), start=1):
        name = head["name"]
        label = f"{variant}: {', '.join(str(value) for value in each.values())[:60]}" if "each" in head else ""
        yield Scenario(
            id=f"{group}: {name}" + (f" [{label}]" if label else ""),
            name=name,
            rows=tuple(head["rows"]),
            given=_made(Given, head.get("given", {})),
            steps=tuple(steps),
            variables=each,
            stack=head.get("stack", False),
        )


def _made(kind: type[T], members: Mapping[str, Any]) -> T:
    known = {member.name for member in fields(kind)}  # type: ignore[arg-type]  # mypy knows no bound for dataclasses
    if unknown := members.keys() - known:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    return kind(**members)


def filled(value: Any, variables: Mapping[str, Any]) -> Any:
    """`value` with its variables in it, at any depth. Raises KeyError for one that there is not."""
    if isinstance(value, str):
        if whole := _VARIABLE.fullmatch(value):
            return variables[whole[1]]
        return _VARIABLE.sub(lambda found: str(variables[found[1]]), value)
    if isinstance(value, Mapping):
        return {filled(name, variables): filled(each, variables) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each, variables) for each in value]
    return value
