"""Answers that come while they are made, on both families (contract/invocation.md §5)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import NVCF, Mirror, Site, invoke_path
from tests.house import STREAMER, Caller, Function

EVENTS = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
async def streamer(caller: Caller) -> AsyncIterator[Function]:
    function = await caller.deploy(STREAMER, concurrency=4)
    yield function
    await function.undeploy()


@asynccontextmanager
async def called(
    site: Site, method: str, path: str, headers: Mapping[str, str], order: Mapping[str, Any] | None = None
) -> AsyncIterator[aiohttp.ClientResponse]:
    sent = {"Authorization": f"Bearer {site.key}", **EVENTS, **headers}
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, site.url + path, json=order, headers=sent) as response,
    ):
        yield response


async def test_events_arrive_while_the_container_is_at_work(site: Site, streamer: Function, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    order = {"count": 3, "ids": True, "gates": {"2": str(gate)}}
    async with called(site, "POST", invoke_path(streamer), {}, order) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        request_id = response.headers["NVCF-REQID"]
        for number in range(2):
            assert await response.content.readuntil(b"\n\n") == f"id: {number}\ndata: {number} \n\n".encode()
        gate.touch()
        assert await response.read() == b"id: 2\ndata: 2 \n\n"
    status = f"{NVCF}/pexec/status/{request_id}"
    async with called(site, "GET", status, {"Last-Event-ID": "0"}) as response:
        assert await response.read() == b"id: 1\ndata: 1 \n\nid: 2\ndata: 2 \n\n"
    async with called(site, "GET", status, {"Accept": "*/*"}) as response:
        assert (response.headers["NVCF-STATUS"], response.content_type) == ("fulfilled", "text/event-stream")
        assert await response.read() == b"".join(b"id: %d\ndata: %d \n\n" % (at, at) for at in range(3))


@pytest.mark.parametrize("size_bytes", [12, 6 * 1024 * 1024])
async def test_an_answer_of_another_type_passes_through(mirror: Mirror, size_bytes: int) -> None:
    headers = [["Content-Type", "application/x-own"], ["X-Own", "1"]]
    reply = await mirror.post(order={"status": 409, "size_bytes": size_bytes, "headers": headers}, headers=EVENTS)
    assert (reply.status, reply.headers["Content-Type"], reply.headers["X-Own"]) == (409, "application/x-own", "1")
    assert reply.headers["NVCF-STATUS"] == "errored"
    assert reply.body == b"m" * size_bytes
