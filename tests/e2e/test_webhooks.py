"""Webhooks on both families, told to a receiver of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import NVCF, Gate, Mirror, Site, begun
from tests.e2e.test_client_commands import Shell
from tests.eventually import eventually
from tests.house import Caller, Function
from tests.receiver import Receiver, receiving, verify

AT = f"{NVCF}/webhooks"
HELD_S = 60.0


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as opened:
        yield opened


@pytest.fixture
async def secret(caller: Caller) -> AsyncIterator[str]:
    """Of the account, for as long as the test lasts."""
    made = await caller.call("POST", f"{AT}/secrets", data={})
    assert made.status == 200, made
    yield made.json["secret"]
    await caller.call("DELETE", f"{AT}/secrets/{made.json['secretId']}")


async def told(receiver: Receiver, request_id: str) -> dict[str, Any]:
    """The headers and body of what came of a request."""

    async def look() -> list[Any]:
        return [came for came in receiver.came if request_id.replace("-", "") in came.headers["webhook-id"]]

    found = await eventually(look, bool)
    return {"headers": found[-1].headers, "body": found[-1].body, "count": len(found)}


async def delivered(caller: Caller, request_id: str, state: str = "delivered") -> dict[str, Any]:
    reply = await eventually(
        lambda: caller.call("GET", f"{AT}/deliveries/{request_id}"),
        lambda seen: seen.status == 200 and seen.json["state"] == state,
    )
    return dict(reply.json)


async def test_the_end_of_a_request_is_told_signed_by_all_secrets(
    caller: Caller, mirror: Mirror, receiver: Receiver, secret: str
) -> None:
    other = (await caller.call("POST", f"{AT}/secrets", data={})).json
    headers = {"NVCF-CALLBACK-URL": f"{receiver.url}/in?x=1"}
    reply = await caller.invoke(mirror.function.id, {"a": 1}, headers=headers)
    assert reply.status == 200
    came = await told(receiver, reply.request_id)
    payload = verify(secret, came["headers"], came["body"])
    assert verify(other["secret"], came["headers"], came["body"]) == payload
    assert payload["type"] == came["headers"]["ce-type"] == "request.fulfilled"
    data = payload["data"]
    assert (data["requestId"], data["functionId"], data["statusCode"]) == (reply.request_id, mirror.function.id, 200)
    assert receiver.came[0].path == "/in?x=1"
    delivery = await delivered(caller, reply.request_id)
    assert (delivery["tries"], delivery["lastStatusCode"]) == (1, 204)
    result = await caller.call("GET", data["resultUrl"])
    assert (result.status, result.json) == (200, {"a": 1})
    await caller.call("DELETE", f"{AT}/secrets/{other['secretId']}")


async def test_failures_and_cancels_are_told_too_and_a_receiver_that_fails_changes_no_result(
    caller: Caller, mirror: Mirror, recorder: Function, receiver: Receiver, secret: str, gate: Gate
) -> None:
    receiver.answers.extend([410, 410])
    headers = {"NVCF-CALLBACK-URL": receiver.url, "X-Mirror": '{"status": 422}'}
    failed = await caller.invoke(mirror.function.id, headers=headers)
    assert failed.status == 422
    came = await told(receiver, failed.request_id)
    assert verify(secret, came["headers"], came["body"])["type"] == "request.errored"
    await delivered(caller, failed.request_id, "failed")
    assert (await caller.status(failed.request_id)).status == 422
    occupying = await begun(caller, recorder, gate.order())
    cancelled = await caller.submit(recorder.id, headers={"NVCF-CALLBACK-URL": receiver.url})
    assert (await caller.cancel(cancelled)).status == 202
    came = await told(receiver, cancelled)
    assert verify(secret, came["headers"], came["body"])["data"]["status"] == "cancelled"
    gate.open()
    assert (await caller.result(occupying)).status == 200


async def test_a_functions_default_holds_until_a_request_says_otherwise(
    caller: Caller, mirror: Mirror, receiver: Receiver, secret: str
) -> None:
    default = f"{NVCF}/functions/{mirror.function.id}/webhook"
    set_to = await caller.call("PUT", default, data={"url": receiver.url, "events": ["fulfilled"]})
    assert set_to.status == 200, set_to
    try:
        silent = await caller.invoke(mirror.function.id, headers={"NVCF-CALLBACK-URL": "none"})
        failed = await caller.invoke(mirror.function.id, headers={"X-Mirror": '{"status": 500}'})
        heard = await caller.invoke(mirror.function.id)
        await told(receiver, heard.request_id)
        await delivered(caller, heard.request_id)
    finally:
        assert (await caller.call("DELETE", default)).status == 204
    for request_id in (silent.request_id, failed.request_id):
        assert (await caller.call("GET", f"{AT}/deliveries/{request_id}")).status == 404
    assert len(receiver.came) == 1


async def test_no_address_of_ours_is_reached(caller: Caller, mirror: Mirror, receiver: Receiver, secret: str) -> None:
    """This server may send to 127.0.0.0/8, for these tests, and to nothing else that is not public."""
    port = receiver.url.rpartition(":")[2]
    for host in ("[::1]", "10.0.0.1", "169.254.169.254", "2130706433", "[::ffff:10.0.0.1]"):
        refused = await caller.invoke(mirror.function.id, headers={"NVCF-CALLBACK-URL": f"http://{host}:{port}/"})
        assert refused.status == 400
        assert refused.json["detail"].startswith("NVCF-CALLBACK-URL")


async def test_by_the_commands_a_delivery_is_found_and_sent_again(
    site: Site, tmp_path: Path, mirror: Mirror, receiver: Receiver, caller: Caller
) -> None:
    shell = Shell(site, tmp_path)
    made = await shell.fnqueue("webhooks", "secrets", "create")
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    receiver.answers.append(410)
    reply = await caller.invoke(mirror.function.id, headers={"NVCF-CALLBACK-URL": receiver.url})
    await delivered(caller, reply.request_id, "failed")
    listed = await shell.told("webhooks", "list", "--state", "failed", "--function", mirror.function.id)
    assert reply.request_id in [each["requestId"] for each in listed]
    assert "410" in (await shell.fnqueue("webhooks", "show", reply.request_id)).stdout
    again = await shell.fnqueue("webhooks", "redeliver", reply.request_id)
    assert (again.exit_code, again.stdout) == (0, f"{reply.request_id}\n")
    await delivered(caller, reply.request_id)
    first, second = receiver.came
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert verify(secret, second.headers, second.body)["data"]["requestId"] == reply.request_id
    set_to = await shell.fnqueue(
        "webhooks", "default", "set", mirror.function.id, receiver.url, "--event", "dead", "--event", "expired"
    )
    assert set_to.stdout == f"{receiver.url} dead expired\n"
    assert (await shell.told("webhooks", "default", "show", mirror.function.id))["events"] == ["dead", "expired"]
    assert (await shell.fnqueue("webhooks", "default", "clear", mirror.function.id)).exit_code == 0
    assert (await shell.fnqueue("webhooks", "default", "show", mirror.function.id)).stdout == "none\n"
    [kept] = await shell.told("webhooks", "secrets", "list")
    assert (await shell.fnqueue("webhooks", "secrets", "delete", kept["secretId"])).exit_code == 0
    refused = await shell.fnqueue("webhooks", "show", mirror.function.id)
    assert refused.exit_code == 1
    assert "no such webhook delivery" in refused.output


async def test_a_slow_receiver_keeps_no_other_waiting(
    caller: Caller, mirror: Mirror, receiver: Receiver, secret: str
) -> None:
    freed = asyncio.Event()

    async with receiving() as slow:

        async def held(request: Any) -> Any:
            await asyncio.wait_for(freed.wait(), HELD_S)
            raise ConnectionResetError

        slow.answers.extend([held] * 8)
        for _ in range(8):
            await caller.invoke(mirror.function.id, headers={"NVCF-CALLBACK-URL": slow.url})
        reply = await caller.invoke(mirror.function.id, headers={"NVCF-CALLBACK-URL": receiver.url})
        await delivered(caller, reply.request_id)
        freed.set()
