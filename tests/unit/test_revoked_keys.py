"""A key that is taken away while a call of its own is held (field/security.md, "stolen key")."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest

from broker import accounts
from broker.model import Key, Outcome, Progress
from tests.eventually import eventually
from tests.sse import listening
from tests.unit import test_channels
from tests.unit.test_event_streams import invoked
from tests.unit.test_request_events import path_of, start
from tests.unit.test_server import INVOKE, NOW, NVCF, House, opened

# A verdict on a key is kept for two seconds.
HANG_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """Somebody with a key of his own, for as long as he has it."""

    house: House
    client: aiohttp.ClientSession
    key: Key

    async def lose_key(self) -> None:
        await accounts.delete_key(self.house.broker, self.key.id)

        async def status() -> int:
            async with self.client.get(f"{NVCF}/functions") as response:
                return response.status

        await eventually(status, lambda seen: seen == 401, within_s=HANG_S)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    async with opened(tmp_path, account_calls_per_s=0) as house, invited(house, house.url) as found:
        yield found


@asynccontextmanager
async def invited(house: House, url: str) -> AsyncIterator[Guest]:
    token, key = await accounts.create_key(house.broker, account="default")
    async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {token}"}) as client:
        yield Guest(house=house, client=client, key=key)


@pytest.mark.parametrize("way", ["invoke", "poll"])
async def test_a_call_that_is_held_gives_no_result_to_a_revoked_key(guest: Guest, way: str) -> None:
    house = guest.house

    async def call() -> tuple[int, bytes]:
        if way == "invoke":
            sent = guest.client.post(INVOKE, data=b"{}")
        else:
            sent = guest.client.get(f"{NVCF}/pexec/status/{request_id}")
        async with sent as response:
            return response.status, await response.read()

    if way == "poll":
        async with guest.client.post(INVOKE, data=b"{}", headers=NOW) as response:
            request_id = response.headers["NVCF-REQID"]
    waiting = asyncio.create_task(call())
    await house.some_queued()
    await guest.lose_key()
    assert not waiting.done()
    await house.finish(Outcome(status=200, body=b"not for a thief"))
    status, body = await asyncio.wait_for(waiting, HANG_S)
    assert status == 401
    assert b"thief" not in body


async def test_a_listener_with_a_revoked_key_is_told_nothing_more(guest: Guest) -> None:
    async with guest.client.post(INVOKE, data=b"{}", headers=NOW) as response:
        request_id = response.headers["NVCF-REQID"]
    _, lease = await start(guest.house)
    async with asyncio.timeout(HANG_S), listening(guest.client, path_of(request_id)) as found:
        await found.until("started")
        await guest.lose_key()
        await guest.house.broker.results.report(lease, Progress(percent=50, partial=b'{"a":"thief"}'), sequence=1)
        assert b"thief" not in await found.response.read()


async def test_a_stream_ends_at_once_for_a_revoked_key(guest: Guest) -> None:
    async with invoked(replace(guest.house, client=guest.client)) as (job, response):
        await job.send(b"data: one\n\n")
        await response.content.readuntil(b"\n\n")
        await guest.lose_key()
        await job.send(b"data: thief\n\n")
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.readuntil(b"thief")


async def test_a_websocket_of_a_revoked_key_is_closed(tmp_path: Path) -> None:
    async with test_channels.opened(tmp_path, channel_drain_s=0.2) as rig, rig.sidecar():
        token, key = await accounts.create_key(rig.broker, account="acme")
        own = {**test_channels.BOTH_WAYS, "Authorization": f"Bearer {token}"}
        async with rig.ws(headers=own) as ws:
            await ws.send_str("hello")
            assert await ws.receive_str() == "echo hello"
            await accounts.delete_key(rig.broker, key.id)
            message = await asyncio.wait_for(ws.receive(), HANG_S)
            assert message.type is aiohttp.WSMsgType.CLOSE
            assert message.extra == "its client is not let in any more"
        assert (await rig.ended()).reason == "its client is not let in any more"
