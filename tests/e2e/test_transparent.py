"""Invocation in the function's own name, on both families."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from multidict import CIMultiDict

from tests.e2e.conftest import NVCF, Mirror, exchange, ordered, slug
from tests.house import Reply

MIB = 1024 * 1024


def own_host(mirror: Mirror, *, version: bool = False) -> dict[str, str]:
    port = urlsplit(mirror.caller.url).port
    front = f"{mirror.function.version_id}." if version else ""
    return {"Host": f"{front}{mirror.function.id}.localhost:{port}"}


async def ask(
    mirror: Mirror,
    method: str = "GET",
    path: str = "/",
    order: Mapping[str, Any] | None = None,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    sent = {**own_host(mirror), **ordered(order or {}), **(headers or {})}
    return await mirror.caller.call(method, path, body=body, headers=sent)


def addresses(mirror: Mirror) -> list[dict[str, str]]:
    by_header = {"function-id": mirror.function.id}
    return [
        own_host(mirror),
        own_host(mirror, version=True),
        by_header,
        {**by_header, "function-version-id": mirror.function.version_id},
    ]


@pytest.mark.parametrize("which", range(4))
async def test_every_way_to_address_a_function_leads_to_it(mirror: Mirror, which: int) -> None:
    path = "/v2/nvcf/functions/..//%2e%2F%zz?q=%20+&&x=1;y=%C3%BC="
    sent = {**addresses(mirror)[which], **ordered({"tell": True})}
    reply = await exchange(mirror.caller, "PUT", path, headers=list(sent.items()), body=b"\x00\xff")
    assert (reply.status, reply.headers["NVCF-STATUS"]) == (200, "fulfilled")
    said = reply.json
    assert (said["method"], said["path"], said["body"]) == ("PUT", path, "AP8=")
    names = {name.lower() for name, _ in said["headers"]}
    assert not names & {"authorization", "function-id", "function-version-id", "prefer"}
    assert dict(said["headers"])["NVCF-REQID"] == reply.request_id


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
async def test_any_method_reaches_the_function(mirror: Mirror, method: str) -> None:
    reply = await ask(mirror, method, "/a?b", {"tell": True}, headers={"Origin": "https://page.example"})
    assert (reply.status, reply.json["method"], reply.json["path"]) == (200, method, "/a?b")


async def test_a_head_brings_the_head_alone(mirror: Mirror) -> None:
    reply = await ask(mirror, "HEAD", "/", {"size_bytes": 12_345})
    assert (reply.status, reply.headers["Content-Length"], reply.body) == (200, "12345", b"")


@pytest.mark.parametrize("status", [201, 202, 204, 304, 404, 418, 500, 503])
async def test_the_answer_is_the_functions_own(mirror: Mirror, status: int) -> None:
    body = b"" if status in (204, 304) else b'{"error": "mine"}'
    said = [["X-Own", "1"], ["Set-Cookie", "a=1"], ["Set-Cookie", "b=2"]]
    reply = await ask(mirror, "POST", "/", {"status": status, "body": body, "headers": said})
    assert (reply.status, reply.body, reply.headers["X-Own"]) == (status, body, "1")
    assert reply.headers["NVCF-STATUS"] == ("fulfilled" if status < 400 else "errored")
    assert CIMultiDict(reply.headers).getall("Set-Cookie") == ["a=1", "b=2"]


async def test_a_redirect_is_the_callers_to_follow(mirror: Mirror) -> None:
    for location in ("/there", f"{mirror.caller.url}/health"):
        reply = await ask(mirror, "GET", "/", {"status": 307, "headers": [["Location", location]]})
        assert (reply.status, reply.headers["Location"]) == (307, location)


async def test_files_of_the_function_do_not_become_an_archive(mirror: Mirror) -> None:
    reply = await ask(mirror, "POST", "/", {"files": {"made.txt": "x"}, "body": b"told"})
    assert (reply.status, reply.body) == (200, b"told")


async def test_what_takes_longer_is_polled_for_at_this_server(mirror: Mirror) -> None:
    reply = await ask(mirror, "POST", "/", {"delay_s": 2, "status": 201}, body=b"x", headers={"NVCF-POLL-SECONDS": "1"})
    assert (reply.status, reply.headers["NVCF-STATUS"]) == (202, "in-progress")
    port = urlsplit(mirror.caller.url).port
    assert reply.headers["Location"] == f"http://localhost:{port}{NVCF}/pexec/status/{reply.request_id}"
    again = await mirror.caller.call("GET", urlsplit(reply.headers["Location"]).path)
    assert (again.status, again.body) == (201, b"x")
    assert (await mirror.caller.status(reply.request_id)).body == b"x"


async def test_an_address_opens_nothing_that_the_key_does_not(mirror: Mirror) -> None:
    unknown = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
    for named in ({"Host": f"{unknown}.localhost"}, {"function-id": unknown}):
        assert (await ask(mirror, headers=named)).status == 404
    assert (await ask(mirror, headers={"Authorization": "Bearer nobody"})).status == 401
    assert slug(await ask(mirror, headers={"function-id": "x"})) == "bad-request"


# -- large bodies ------------------------------------------------------------------------------


def front_end(mirror: Mirror) -> psutil.Process:
    """The process that listens at the site's address."""
    port = urlsplit(mirror.caller.url).port
    return next(
        psutil.Process(found.pid)
        for found in psutil.net_connections("tcp")
        if found.pid and found.status == psutil.CONN_LISTEN and getattr(found.laddr, "port", 0) == port
    )


async def watched(process: psutil.Process, work: Any) -> tuple[Any, int]:
    """What `work` returns, and by how many bytes the process grew meanwhile at most."""
    before, most = process.memory_info().rss, 0
    task = asyncio.ensure_future(work)
    while not task.done():
        most = max(most, process.memory_info().rss - before)
        await asyncio.wait({task}, timeout=0.02)
    return task.result(), most


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_costs_the_front_end_no_memory(mirror: Mirror, chunked: bool) -> None:
    size_bytes = 100 * MIB
    piece = bytes(range(256)) * 4096

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size_bytes // len(piece)):
            yield piece

    async def send() -> dict[str, Any]:
        headers = {**own_host(mirror), **ordered({"digest": True}), "Authorization": f"Bearer {mirror.caller.key}"}
        if not chunked:
            headers["Content-Length"] = str(size_bytes)
        async with (
            aiohttp.ClientSession() as session,
            session.put(f"{mirror.caller.url}/large", data=pieces(), headers=headers) as response,
        ):
            assert response.status == 200, await response.text()
            found: dict[str, Any] = await response.json()
            return found

    found, grown_bytes = await watched(front_end(mirror), send())
    expected = hashlib.sha256()
    for _ in range(size_bytes // len(piece)):
        expected.update(piece)
    assert found == {"size_bytes": size_bytes, "sha256": expected.hexdigest()}
    assert grown_bytes < 40 * MIB


async def received(mirror: Mirror, order: Mapping[str, Any]) -> tuple[aiohttp.ClientResponse, int, str]:
    """The answer, how many bytes it had, and their digest; read as fast as they come and not kept."""
    headers = {**own_host(mirror), **ordered(order), "Authorization": f"Bearer {mirror.caller.key}"}
    digest, size_bytes = hashlib.sha256(), 0
    async with aiohttp.ClientSession() as session, session.get(f"{mirror.caller.url}/", headers=headers) as response:
        async for piece in response.content.iter_any():
            digest.update(piece)
            size_bytes += len(piece)
    return response, size_bytes, digest.hexdigest()


@pytest.mark.parametrize("declared", [False, True])
async def test_a_large_answer_is_handed_on_while_it_comes(mirror: Mirror, declared: bool) -> None:
    count, piece_bytes = 60, MIB
    order = {"size_bytes": count * piece_bytes} if declared else {"stream": [count, piece_bytes]}
    found, grown_bytes = await watched(front_end(mirror), received(mirror, order))
    response, size_bytes, digest = found
    expected = hashlib.sha256()
    for number in range(count):
        expected.update((b"m" if declared else bytes([number])) * piece_bytes)
    assert (response.status, size_bytes, digest) == (200, count * piece_bytes, expected.hexdigest())
    assert response.headers.get("Content-Length") == (str(count * piece_bytes) if declared else None)
    assert grown_bytes < 40 * MIB


async def test_a_large_answer_that_was_not_waited_for_is_handed_on_to_who_asks_again(mirror: Mirror) -> None:
    reply = await ask(mirror, "GET", "/", {"delay_s": 2, "size_bytes": 20 * MIB}, headers={"NVCF-POLL-SECONDS": "1"})
    assert reply.status == 202
    again = await mirror.caller.call("GET", urlsplit(reply.headers["Location"]).path)
    assert (again.status, len(again.body)) == (200, 20 * MIB)
