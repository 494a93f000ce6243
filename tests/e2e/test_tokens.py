"""Delegated invocation tokens: in a container on both families, and their end on two front ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.servers import S3, RabbitMQ, Redis
from tests.e2e.conftest import NVCF, UNKNOWN_ID, Mirror, Site
from tests.eventually import eventually
from tests.house import Caller, House, Reply

DEFINITION = {"name": "mine", "inferenceUrl": "/", "containerImage": "fnqueue/echo:latest"}


async def mint(caller: Caller, function_id: str, client_id: str = "kiosk 7") -> str:
    reply = await caller.call("POST", f"{NVCF}/tokens/functions/{function_id}", data={"clientId": client_id})
    assert reply.status == 200, reply
    return str(reply.json["access_token"])


async def test_the_container_is_told_of_key_and_client(site: Site, mirror: Mirror) -> None:
    async with site.caller(await mint(mirror.caller, mirror.function.id)) as client:
        reply = await mirror.post(order={"tell": True}, caller=client)
        assert reply.status == 200, reply
        told = [value for name, value in reply.json["headers"] if name.lower() == "nvcf-sub"]
        assert [value.rpartition("/")[2] for value in told] == ["kiosk 7"]
        assert not [name for name, _ in reply.json["headers"] if name.lower() == "authorization"]
        assert (await client.status(reply.request_id)).body == reply.body
        assert (await client.invoke(UNKNOWN_ID)).status == 404
        assert (await client.call("GET", f"{NVCF}/functions")).status == 403


@pytest.fixture
def pair(product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path: Path) -> Iterator[House]:
    """Two front ends and nobody who works: an invocation gets as far as being told that nothing is deployed."""
    servers = {
        "FNQUEUE_QUEUE_URL": product_rabbitmq.url,
        "FNQUEUE_STORE_URL": f"{redis_server.url.rpartition('/')[0]}/12",
        "FNQUEUE_BLOBS_URL": s3.url,
    }
    house = House(tmp_path, servers, fronts=2)
    try:
        for front in house.fronts:
            front.start()
        yield house
    finally:
        house.stop()


async def test_a_suspended_key_takes_its_tokens_along_on_every_front_end(pair: House) -> None:
    rights = {"policies": [{"scopes": ["invoke_function"]}]}
    async with pair.caller(0) as admin, pair.caller(1) as other:
        made = await admin.call("POST", f"{NVCF}/functions", data=DEFINITION)
        function_id = made.json["function"]["id"]
        key = (await admin.call("POST", "/v1/keys", data={"authorizations": rights})).json
        token = await mint(admin.with_key(key["value"]), function_id)
        clients = (admin.with_key(token), other.with_key(token))

        async def answers() -> list[int]:
            replies: list[Reply] = [await client.invoke(function_id) for client in clients]
            return [reply.status for reply in replies]

        assert await answers() == [404, 404]  # known, and not deployed
        suspended = await other.call("PUT", f"/v1/keys/{key['id']}/status", data={"status": "SUSPENDED"})
        assert suspended.status == 200, suspended
        await eventually(answers, lambda seen: seen == [401, 401])
        await other.call("PUT", f"/v1/keys/{key['id']}/status", data={"status": "ACTIVE"})
        await eventually(answers, lambda seen: seen == [404, 404])
        await admin.call("DELETE", f"/v1/keys/{key['id']}")
        await eventually(answers, lambda seen: seen == [401, 401])
