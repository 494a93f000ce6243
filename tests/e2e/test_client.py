"""The Python client on both families: what a program does with it, from a file to a result."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fnqueue import AsyncClient, AsyncHandle, Client, Done, File, Queued, Running, Upload, errors
from tests.e2e.conftest import Gate, Mirror, Site, ordered
from tests.house import STREAMER, Caller, Function

LIMIT_S = 60.0
ECHO = "fnqueue/echo:latest"


@pytest.fixture(scope="module")
async def fnq(site: Site) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(site.url, site.key) as client:
        yield client


@pytest.fixture(scope="module")
async def echo(caller: Caller) -> AsyncIterator[Function]:
    function = await caller.deploy(ECHO, inference_url="/echo", concurrency=4, name="echo-of-the-client")
    yield function
    await function.undeploy()


@pytest.fixture(scope="module")
async def streamer(caller: Caller) -> AsyncIterator[Function]:
    function = await caller.deploy(STREAMER)
    yield function
    await function.undeploy()


async def test_a_function_is_called_by_its_name(fnq: AsyncClient, echo: Function) -> None:
    result = await fnq.function("echo-of-the-client").run(message="hi", repeats=2, timeout_s=LIMIT_S)
    assert result.json() == {"echo": "hi hi"}
    assert (await fnq.handle(result.request_id).status()).status == "fulfilled"


async def test_a_request_tells_how_it_goes_and_is_found_again_by_its_id(
    fnq: AsyncClient, recorder: Function, tmp_path: Path
) -> None:
    gates = [tmp_path / "first", tmp_path / "second", tmp_path / "end"]
    told = [json.dumps({"id": "any", "progress": percent, "partialResponse": {"at": percent}}) for percent in (30, 60)]
    order = {"progress": list(zip(map(str, gates), told, strict=False)), "gate": str(gates[2])}
    before = await fnq.function(recorder.id).spawn({"gate": str(tmp_path / "before")})
    await running(before)
    request_id = (await fnq.function(recorder.id).spawn(order)).id
    handle = fnq.handle(request_id)
    found = handle.events(timeout_s=LIMIT_S)
    first = await anext(found)
    assert isinstance(first, Queued)
    assert (first.position, first.length) == (1, 1)
    (tmp_path / "before").touch()
    seen = []
    async for event in found:
        seen.append(event)
        if isinstance(event, Running):
            gates.pop(0).touch()
    percents = [event.percent for event in seen if isinstance(event, Running)]
    assert percents == [None, 30, 60]
    assert seen[-1] == Done(status="fulfilled", status_code=200)
    assert (await handle.get(timeout_s=LIMIT_S)).json()["id"] == request_id
    assert (await before.get(timeout_s=LIMIT_S)).status == 200


async def running(handle: AsyncHandle) -> None:
    async with aclosing(handle.events(timeout_s=LIMIT_S)) as events:
        async for event in events:
            if isinstance(event, Running):
                return


async def test_a_cancelled_request_has_no_result(fnq: AsyncClient, recorder: Function, gate: Gate) -> None:
    handle = await fnq.function(recorder.id).spawn(gate.order())
    waiting = asyncio.ensure_future(handle.get(timeout_s=LIMIT_S))
    assert await handle.cancel()
    with pytest.raises(errors.RequestCancelled):
        await waiting
    assert await handle.cancel()


async def test_a_call_that_comes_again_under_its_key_is_the_same_request(
    fnq: AsyncClient, mirror: Mirror, tmp_path: Path
) -> None:
    """With a file that is uploaded anew each time, as after a crash."""
    path = tmp_path / "large.bin"
    path.write_bytes(b"x" * 100_000)
    function = fnq.function(mirror.function.id, headers=ordered({"tell": True}))
    given = File(path, upload=True)
    handles = [await function.spawn(file=given, idempotency_key=str(tmp_path)) for _ in range(2)]
    assert handles[0].id == handles[1].id
    with pytest.raises(errors.IdempotencyKeyReused):
        await function.spawn(file=File(b"other", name="large.bin", upload=True), idempotency_key=str(tmp_path))
    told = (await handles[0].get(timeout_s=LIMIT_S)).json()
    assert list(told["assets"].values()) == [hashlib.sha256(path.read_bytes()).hexdigest()]


async def test_a_file_beyond_the_limit_is_uploaded_by_itself(fnq: AsyncClient, mirror: Mirror, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(b"p" * (6 * 1024 * 1024))
    told: list[Upload] = []
    result = await fnq.function(mirror.function.id, headers=ordered({"tell": True})).run(
        path, progress=told.append, timeout_s=LIMIT_S
    )
    [(asset_id, digest)] = result.json()["assets"].items()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [each.sent_bytes for each in told] == [size * 1024 * 1024 for size in range(1, 7)]
    assert asset_id not in [asset.asset_id for asset in await fnq.assets()]


async def test_a_large_answer_comes_with_its_files(fnq: AsyncClient, mirror: Mirror, tmp_path: Path) -> None:
    order = {"size_bytes": 6_000_000, "files": {"page-1.txt": "one", "pages/2.txt": "two"}}
    with await fnq.function(mirror.function.id, headers=ordered(order)).run(timeout_s=LIMIT_S) as result:
        assert result.content == b"m" * 6_000_000
        assert result.files == ["page-1.txt", "pages/2.txt"]
        assert [path.read_text() for path in result.extract(tmp_path)] == ["one", "two"]


async def test_a_map_gives_what_fails_beside_what_does_not(fnq: AsyncClient, echo: Function) -> None:
    values = [{"message": str(number)} if number != 3 else {"message": 3} for number in range(8)]
    found = [each async for each in fnq.function(echo.id).map(values, concurrency=3, timeout_s=LIMIT_S)]
    assert [each.index for each in found] == list(range(8))
    assert [each.get().json()["echo"] for each in found if each.ok] == ["0", "1", "2", "4", "5", "6", "7"]
    assert isinstance(found[3].error, errors.FunctionFailed)
    assert found[3].error.detail == "message: must be a string"


async def test_a_rate_limit_is_waited_out(fnq: AsyncClient, caller: Caller, echo: Function) -> None:
    limits = f"/v2/nvcf/ratelimit/functions/{echo.id}/versions/{echo.version_id}"
    assert (await caller.call("PUT", limits, data={"rateLimit": "1-S"})).status == 204
    try:
        results = [await fnq.function(echo.id).run(message="x", timeout_s=LIMIT_S) for _ in range(3)]
    finally:
        assert (await caller.call("DELETE", limits)).status == 204
    assert [result.status for result in results] == [200, 200, 200]


async def test_a_stream_survives_a_broken_connection(site: Site, streamer: Function, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with cutting(site.url) as line, AsyncClient(line.url, site.key) as fnq:
        events = fnq.function(streamer.id).stream({"count": 6, "gates": {"3": str(gate)}}, timeout_s=LIMIT_S)
        found = [(await anext(events)).data.split()[0] for _ in range(3)]
        line.cut()
        gate.touch()
        found += [event.data.split()[0] async for event in events]
    assert found == ["0", "1", "2", "3", "4", "5"]
    assert line.connections >= 2


async def test_a_program_without_asyncio_does_the_same(site: Site, echo: Function, recorder: Function) -> None:
    def work() -> None:
        with Client(site.url, site.key) as fnq:
            function = fnq.function(echo.id)
            assert function.run(message="hi", timeout_s=LIMIT_S).json() == {"echo": "hi"}
            messages = [{"message": str(number)} for number in range(6)]
            found = list(function.map(messages, concurrency=3, ordered=False, timeout_s=LIMIT_S))
            assert sorted(each.get().json()["echo"] for each in found) == list("012345")
            handle = fnq.function(recorder.id).spawn({"delay_s": 600})
            for event in handle.events(timeout_s=LIMIT_S):
                if isinstance(event, Running):
                    assert handle.cancel()
            with pytest.raises(errors.RequestCancelled):
                handle.get(timeout_s=LIMIT_S)
            assert fnq.function(recorder.id).queues()[0].function_version_id == recorder.version_id

    await asyncio.to_thread(work)


class Line:
    """What leads to a server, and can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._open: set[asyncio.StreamWriter] = set()
        self.url = ""
        self.connections = 0

    def cut(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        ends = {writer, far_writer}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pour(reader, far_writer))
                both.create_task(_pour(far_reader, writer))
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def cutting(url: str) -> AsyncIterator[Line]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    line = Line(parts.hostname, parts.port)
    server = await asyncio.start_server(line.lead, "127.0.0.1", 0)
    line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield line
    finally:
        server.close()
        line.cut()
        await server.wait_closed()
