"""Plays a scenario: fills its variables in, sends its calls, and says what came back other than expected."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

from multidict import CIMultiDict

from tests.compat.exchange import Reply, request
from tests.compat.matching import differences
from tests.compat.scenarios import Scenario, Step, filled
from tests.compat.stages import Stage
from tests.eventually import eventually

SOON_S = 0.5
UNKNOWN_ID = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"


async def play(stage: Stage, scenario: Scenario) -> None:
    """Fails with every difference of the first call that went otherwise than expected."""
    always = {"unknown": UNKNOWN_ID, "soon": time.time() + SOON_S}
    variables = {**always, **await stage.prepare(scenario.given), **scenario.variables}
    variables["authorization"] = f"Authorization: Bearer {await stage.key_of(variables['account'])}"
    for number, written in enumerate(scenario.steps, start=1):
        # A text of `each` may hold variables of what is given.
        step = Step(**{name: filled(filled(getattr(written, name), variables), variables) for name in Step.__slots__})
        sent = await _bytes(stage, step, variables)
        reply, wrong = await _answer(stage, step, sent)
        assert not wrong, _report(scenario, number, sent, reply, wrong)
        variables |= {name: _kept(reply, where) for name, where in step.keep.items()}


async def _answer(stage: Stage, step: Step, sent: bytes) -> tuple[Reply, list[str]]:
    async def once() -> tuple[Reply, list[str]]:
        reply = await stage.send(sent)
        return reply, differences(step, reply)

    if not step.within_s:
        return await once()
    return await eventually(once, lambda seen: not seen[1], within_s=step.within_s)


async def _bytes(stage: Stage, step: Step, variables: Mapping[str, Any]) -> bytes:
    if step.raw:
        return step.raw.replace("\n", "\r\n").encode()
    key = await _key(stage, step, variables)
    method, _, target = step.call.partition(" ")
    body = _body(step)
    headers = CIMultiDict({"Host": stage.url.partition("//")[2]})
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if step.json is not None:
        headers["Content-Type"] = "application/json"
    if step.container:
        headers["X-Mirror"] = json.dumps(_order(step.container))
    for name, value in step.headers.items():
        headers.popall(name, None)
        headers.extend([(name, each) for each in (value if isinstance(value, list) else [value]) if each is not None])
    headers.setdefault("Content-Length", str(len(body)))
    return request(method, target, headers, body)


async def _key(stage: Stage, step: Step, variables: Mapping[str, Any]) -> str:
    """'' for nobody's."""
    match step.of:
        case "nobody":
            return ""
        case "admin":
            return stage.admin_key
        case "caller":
            return await stage.key_of(variables["account"])
        case "stranger":
            return await stage.key_of(variables["stranger"])
        case str(key):
            return key
        case asked:
            return await stage.key_of(**{"account": variables["account"], **asked})


def _body(step: Step) -> bytes:
    if step.size:
        return b"x" * step.size
    if step.body is not None:
        return step.body.encode()
    if step.json is None:
        return b""
    if step.but is None:
        return json.dumps(step.json).encode()
    return json.dumps({name: value for name, value in {**step.json, **step.but}.items() if value is not None}).encode()


def _order(container: Mapping[str, Any]) -> dict[str, Any]:
    """For tests/containers/mirror.py, which takes a body as base64; here it is a text, or JSON."""
    order = dict(container)
    for name in {"body", "raw"} & order.keys():
        text = order[name] if isinstance(order[name], str) else json.dumps(order[name])
        order[name] = base64.b64encode(text.encode()).decode()
    return order


def _kept(reply: Reply, where: str) -> Any:
    if where.startswith("header "):
        return reply.headers[where.removeprefix("header ")]
    found = reply.json
    for part in where.split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    return found


def _report(scenario: Scenario, number: int, sent: bytes, reply: Reply, wrong: list[str]) -> str:
    head = sent.partition(b"\r\n\r\n")[0].decode(errors="replace").replace("\r\n", "\n    ")
    lines = [f"{scenario.id}, call {number}:", *wrong, "  sent:", f"    {head}", f"  got {reply.status}:"]
    lines += [f"    {name}: {value}" for name, value in reply.headers.items()]
    return "\n".join([*lines, "", f"    {reply.body[:800].decode(errors='replace')}"])
