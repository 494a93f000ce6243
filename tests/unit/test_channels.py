"""Calls over a channel: a front end and a sidecar over back ends in memory, before a real container on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from yarl import URL

from api import headers
from api.routes import attach
from api.server import serving
from broker import channels
from broker.backends.memory.queue import MemoryQueue
from broker.channels import Close, Failure, Garbled, Head, Kind
from broker.connect import open_broker
from broker.errors import ConfigurationError
from broker.model import Channel, Draft, FunctionStatus, Job, Record, RequestState, Version
from broker.ports import Broker
from broker.settings import ApiSettings
from tests.containers.talker import Talker
from tests.eventually import eventually
from tests.unit.container import FUNCTION_ID, VERSION_ID, a_job, settings_for
from workers.channel import UNCLOSED, UNREACHABLE
from workers.sidecar import serve

KEY = "admin-key"
BOTH_WAYS = {"Authorization": f"Bearer {KEY}", "function-id": FUNCTION_ID, headers.STREAM_FULL_REQUEST: "true"}


class Spy(MemoryQueue):
    """Remembers what was published."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        self.jobs.append(job)
        await super().publish(job, timeout_s=timeout_s)


@dataclass
class Rig:
    """A front end and a container; sidecars are started by the test. `stop` stops the front end."""

    broker: Broker
    queue: Spy
    client: aiohttp.ClientSession
    url: URL
    talker: Talker
    folder: Path
    port: int
    stop: Callable[[], Coroutine[Any, Any, None]]

    @asynccontextmanager
    async def sidecar(self, **given: Any) -> AsyncIterator[asyncio.Task[None]]:
        settings = settings_for(self.folder, self.port, **{"max_request_concurrency": 200, "drain_s": 1.0, **given})
        stop = asyncio.Event()
        task = asyncio.create_task(serve(self.broker, settings, stop))
        try:
            yield task
        finally:
            stop.set()
            await asyncio.wait([task])

    def ws(self, path: str = "/ws", **given: Any) -> Any:
        return self.client.ws_connect(URL(f"{self.url.origin()}{path}", encoded=True), **given)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """A client that asks for a WebSocket during the body, and leaves."""

        async def ask() -> None:
            await self.ws()

        task = asyncio.create_task(ask())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def queued(self) -> None:
        """Return once a job was published."""
        await self.eventually(lambda: len(self.queue.jobs) > 0)

    async def eventually(self, satisfied: Callable[[], bool]) -> None:
        async def look() -> bool:
            return satisfied()

        await eventually(look, lambda seen: seen)

    async def listens(self) -> bool:
        try:
            async with self.client.get("/livez", headers={"function-id": ""}):
                return True
        except aiohttp.ClientConnectionError:
            return False

    async def said(self, line: str) -> None:
        """Return once the container has said something that begins so."""
        await self.eventually(lambda: any(said.startswith(line) for said in self.talker.said))

    async def record(self, job: Job | None = None) -> Record:
        record = await self.broker.results.read((job or self.queue.jobs[-1]).id)
        assert record is not None
        return record

    async def ended(self, job: Job | None = None) -> Record:
        return await eventually(lambda: self.record(job), lambda record: record.state.terminal)

    def channel(self) -> Channel:
        channel = self.queue.jobs[-1].channel
        assert channel is not None
        return channel


@asynccontextmanager
async def opened(folder: Path, **given: Any) -> AsyncIterator[Rig]:
    settings = ApiSettings(
        port=0, data_dir=folder, admin_key=SecretStr(KEY), admin_account="acme", shutdown_grace_s=2, **given
    )
    queue, talker = Spy(), Talker()
    runner = web.AppRunner(talker.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        broker = replace(await stack.enter_async_context(open_broker(settings)), queue=queue)
        await queue.declare(VERSION_ID)
        await broker.catalog.versions.put(
            Version(
                id=VERSION_ID,
                function_id=FUNCTION_ID,
                account="acme",
                name="f",
                inference_url="/",
                container_image="i",
                created_at=1.0,
                status=FunctionStatus.ACTIVE,
            )
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        front = await stack.enter_async_context(AsyncExitStack())
        url = await front.enter_async_context(serving(broker, settings))
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(url, connector=connector, headers=BOTH_WAYS) as client:
            yield Rig(broker, queue, client, URL(url), talker, folder, runner.addresses[0][1], front.aclose)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path, channel_drain_s=0.2) as found:
        yield found


# -- WebSockets --------------------------------------------------------------------------------


async def test_a_websocket_carries_text_and_bytes_in_both_directions(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws:
        await ws.send_str("hällo")
        assert await ws.receive_str() == "echo hällo"
        await ws.send_bytes(b"\x00" * 700_000)
        assert await ws.receive_bytes() == b"\x00" * 700_000
        await ws.send_bytes(b"")
        assert await ws.receive_bytes() == b""
    assert (await rig.ended()).state is RequestState.FULFILLED


async def test_the_container_gets_path_query_and_headers_and_chooses_the_subprotocol(rig: Rig) -> None:
    sent = {"X-Mine": "1", "NVCF-SUB": "somebody"}
    async with rig.sidecar(), rig.ws("/ws?a=%2F&b=", protocols=("soap", "superchat"), headers=sent) as ws:
        assert ws.protocol == "superchat"
        await ws.send_str("tell")
        told = json.loads(await ws.receive_str())
    found = {name.lower(): value for name, value in told["headers"]}
    assert told["path"] == "/ws?a=%2F&b="
    assert found["x-mine"] == "1"
    assert found["nvcf-reqid"] == rig.queue.jobs[0].id
    assert found["nvcf-sub"] == "admin"
    assert "authorization" not in found
    assert "sec-websocket-extensions" not in found
    assert rig.channel().token not in json.dumps(told)


async def test_no_subprotocol_is_agreed_on_that_the_container_does_not_speak(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws(protocols=("soap",), compress=15) as ws:
        assert ws.protocol is None
        assert not ws.compress


async def test_a_close_of_the_container_reaches_the_client_as_it_was(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws:
        await ws.send_str("close 4321 so long")
        message = await ws.receive()
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4321, "so long")
    assert (await rig.ended()).state is RequestState.FULFILLED


async def test_a_close_of_the_client_reaches_the_container_as_it_was(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws(headers={"X-Name": "n"}) as ws:
        await ws.send_str("hi")
        await ws.receive_str()
        await ws.close(code=4002, message=b"enough")
        await rig.said("done n 4002")
        assert ws.close_code == 4002
    assert (await rig.ended()).state is RequestState.FULFILLED


async def test_pings_go_all_the_way_in_both_directions(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws(autoping=False) as ws:
        await ws.ping(b"are you there")
        pong = await ws.receive()
        assert (pong.type, pong.data) == (WSMsgType.PONG, b"are you there")
        await ws.send_str("ping and you")
        ping = await ws.receive()
        assert (ping.type, ping.data) == (WSMsgType.PING, b"and you")
        await ws.pong(ping.data)
        assert await ws.receive_str() == "pong and you"


async def test_a_handshake_that_the_container_refuses_is_refused_with_its_status(rig: Rig) -> None:
    async with rig.sidecar():
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await rig.ws("/ws?refuse=403")
        assert refused.value.status == 403
        assert refused.value.headers is not None
        assert refused.value.headers["X-Why"] == "because"
        record = await rig.ended()
    assert (record.state, record.outcome and record.outcome.status) == (RequestState.ERRORED, 403)


async def test_what_is_no_handshake_is_refused_before_anything_is_queued(rig: Rig) -> None:
    async with rig.client.get("/ws", headers={"Upgrade": "websocket", "Connection": "Upgrade"}) as answer:
        assert answer.status == 400
    async with rig.client.post("/talk", headers={"Prefer": "respond-async"}) as answer:
        assert answer.status == 400
    assert rig.queue.jobs == []


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_message_that_is_too_large_closes_the_websocket(tmp_path: Path, direction: str) -> None:
    limit = 100_000
    async with (
        opened(tmp_path, max_message_bytes=limit) as rig,
        rig.sidecar(max_message_bytes=limit),
        rig.ws(max_msg_size=0, headers={"X-Name": "n"}) as ws,
    ):
        await ws.send_bytes(b"x" * limit)
        assert len(await ws.receive_bytes()) == limit
        await (ws.send_bytes(b"x" * (limit + 1)) if direction == "up" else ws.send_str(f"flood {limit + 1}"))
        await ws.receive()
        assert ws.close_code == (1009 if direction == "up" else 1011)
        assert (await rig.ended()).state.terminal


async def test_a_container_that_breaks_off_closes_the_websocket_with_a_reason(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws:
        await ws.send_str("die")
        message = await ws.receive()
        assert (message.data, message.extra) == (1011, UNCLOSED)
        record = await rig.ended()
    assert (record.state, record.outcome and record.outcome.status) == (RequestState.ERRORED, 500)


async def test_a_hundred_websockets_at_once(rig: Rig) -> None:
    async def talk(number: int) -> str:
        async with rig.ws() as ws:
            for turn in range(5):
                await ws.send_str(f"{number} {turn}")
                assert await ws.receive_str() == f"echo {number} {turn}"
            await ws.send_str(f"close {4000 + number} bye")
            return str((await ws.receive()).data)

    async with rig.sidecar():
        closed = await asyncio.gather(*(talk(number) for number in range(100)))
        assert closed == [str(4000 + number) for number in range(100)]
        for job in rig.queue.jobs:
            assert (await rig.ended(job)).state is RequestState.FULFILLED
    assert len(rig.queue.jobs) == 100


# -- bodies in both directions -----------------------------------------------------------------


async def pieces(*sent: bytes, after: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    for piece in sent:
        yield piece
        if after is not None:
            await after.wait()


async def test_an_answer_comes_while_the_body_is_still_being_sent(rig: Rig) -> None:
    turn: asyncio.Queue[bytes] = asyncio.Queue()

    async def body() -> AsyncIterator[bytes]:
        yield b""  # so that the head is sent
        while piece := await turn.get():
            yield piece

    async with rig.sidecar(), rig.client.put("/talk?x=1", data=body()) as answer:
        assert (answer.status, answer.headers["X-Mine"]) == (201, "1")
        assert answer.headers["NVCF-REQID"] == rig.queue.jobs[0].id
        assert answer.headers["Server"] == "fnqueue"
        for number in range(5):
            await turn.put(b"%d" % number)
            assert await answer.content.readexactly(6) == b"pong %d" % number
        await turn.put(b"")
        assert await answer.read() == b"bye"
        record = await rig.ended()
    assert (record.state, record.outcome and record.outcome.status) == (RequestState.FULFILLED, 204)
    assert rig.talker.met[0].method == "PUT"


async def test_a_body_keeps_its_length_and_its_bytes(rig: Rig) -> None:
    async with rig.sidecar():
        async with rig.client.post("/talk", data=b"x" * 300_000) as answer:
            assert (await answer.read()).replace(b"pong ", b"") == b"x" * 300_000 + b"bye"
        assert rig.talker.met[0].headers["Content-Length"] == "300000"
        async with rig.client.get("/talk") as answer:
            assert await answer.read() == b"bye"


async def test_a_channel_is_billed_by_what_the_container_said(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with rig.sidecar():
        async with rig.client.get("/talk") as answer:
            assert await answer.read() == b"bye"
        await rig.ended()
    [line] = [vars(found) for found in caplog.records if vars(found).get("event_type") == "NVCF_Invocation"]
    assert (line["response_type"], line["size"]) == ("FULFILLED", 3)


async def test_an_answer_that_comes_before_the_body_was_read_is_delivered_whole(rig: Rig) -> None:
    never = asyncio.Event()
    async with rig.sidecar():
        for _ in range(10):
            body = pieces(b"x" * 200_000, after=never)
            async with rig.client.post("/talk", data=body, headers={"X-Talk": "early"}) as answer:
                assert (answer.status, await answer.text()) == (413, "enough")


async def test_a_container_that_breaks_off_before_it_answers_is_a_problem(rig: Rig) -> None:
    async with rig.sidecar(), rig.client.post("/talk", data=b"x", headers={"X-Talk": "die"}) as answer:
        assert answer.status == 500
        assert (await answer.json())["type"].startswith("urn:inference-connection:")
        assert answer.headers["NVCF-REQID"] == (await rig.ended()).id


async def test_a_container_that_breaks_off_in_its_answer_leaves_it_visibly_cut(rig: Rig) -> None:
    async with rig.sidecar(), rig.client.post("/talk", data=b"x", headers={"X-Talk": "half"}) as answer:
        assert answer.status == 201
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
        assert (await rig.ended()).state is RequestState.ERRORED


async def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, max_streamed_body_bytes=1024) as rig, rig.sidecar():
        async with rig.client.post("/talk", data=b"x" * 1025) as answer:
            assert answer.status == 413
        assert rig.queue.jobs == []
        body = pieces(b"x" * 1025, after=asyncio.Event())
        async with rig.client.post("/talk", data=body, headers={"X-Talk": "silent"}) as answer:
            assert answer.status == 413
        assert (await rig.ended()).state is RequestState.CANCELLED


# -- slow readers ------------------------------------------------------------------------------


# What the sockets of three connections on the loopback hold, and some more; of ours, it is less than a tenth.
IN_FLIGHT_BYTES = 64 * 1024 * 1024


AT_ONCE = aiohttp.ClientWSTimeout(ws_close=0.1)


async def stands_still(counted: Callable[[], int]) -> int:
    """The count, once it does not grow any more."""
    before = -1
    while before != counted():
        before = counted()
        await asyncio.sleep(0.3)
    return before


async def test_a_client_that_does_not_read_holds_the_container_up(rig: Rig) -> None:
    async with rig.sidecar(), rig.client.get("/talk", headers={"X-Talk": "pour"}) as answer:
        poured = await stands_still(lambda: rig.talker.poured)
        assert 0 < poured < IN_FLIGHT_BYTES
        await answer.content.readexactly(poured)
        await rig.eventually(lambda: rig.talker.poured > poured)


async def test_a_client_that_does_not_read_its_websocket_holds_the_container_up(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws:
        await ws.send_str("flood 10000")
        poured = await stands_still(lambda: rig.talker.poured)
        assert 0 < poured < IN_FLIGHT_BYTES
        while poured > 0:
            poured -= len(await ws.receive_bytes())


async def test_a_container_that_does_not_read_holds_the_client_up(rig: Rig) -> None:
    sent = 0

    async def flood(ws: aiohttp.ClientWebSocketResponse) -> None:
        nonlocal sent
        while True:
            await ws.send_bytes(b"x" * 10_000)
            sent += 10_000

    async with rig.sidecar(), rig.ws("/ws?deaf=1", timeout=AT_ONCE) as ws:
        flooding = asyncio.create_task(flood(ws))
        assert 0 < await stands_still(lambda: sent) < IN_FLIGHT_BYTES
        flooding.cancel()


# -- who leaves --------------------------------------------------------------------------------


async def test_a_client_that_leaves_a_websocket_cancels_its_request(rig: Rig) -> None:
    async with rig.sidecar():
        ws = await rig.ws(headers={"X-Name": "n"})
        await ws.send_str("hi")
        await ws.receive_str()
        ws._response.close()
        record = await rig.ended()
        await rig.said("done n")
    assert (record.state, record.reason) == (RequestState.CANCELLED, "its client has gone")


async def test_a_client_that_leaves_in_the_middle_of_an_answer_cancels_its_request(rig: Rig) -> None:
    async with rig.sidecar():
        async with rig.client.get("/talk", headers={"X-Talk": "pour"}):
            pass
        record = await rig.ended()
        await rig.said("aborted")
    assert (record.state, record.reason) == (RequestState.CANCELLED, "its client has gone")


async def test_a_client_that_leaves_while_it_is_queued_cancels_its_request(rig: Rig) -> None:
    async with rig.asking():
        await rig.queued()
    record = await rig.ended()
    assert (record.state, record.reason) == (RequestState.CANCELLED, "its client has gone")


async def test_a_call_that_nobody_picks_up_is_taken_out_of_the_queue(rig: Rig) -> None:
    async with rig.client.post("/talk", headers={"NVCF-POLL-SECONDS": "1"}, data=b"x") as answer:
        problem = await answer.json()
        assert (answer.status, problem["type"]) == (504, "urn:fnqueue:problem-details:timed-out")
        assert problem["requestId"] == answer.headers["NVCF-REQID"] == rig.queue.jobs[0].id
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await rig.ws(headers={"NVCF-POLL-SECONDS": "1"})
    assert refused.value.status == 504
    for job in rig.queue.jobs:
        assert (await rig.record(job)).state is RequestState.CANCELLED
    async with rig.client.get(rig.channel().url, headers=attaching(rig.channel().token)) as answer:
        assert answer.status == 401


async def test_a_cancelled_request_closes_its_channel(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws(headers={"X-Name": "n"}) as ws:
        await ws.send_str("hi")
        await ws.receive_str()
        await rig.broker.results.cancel(rig.queue.jobs[0].id, reason="because")
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1011)
        assert "ended" in message.extra
        await rig.said("done n 1001")
    assert (await rig.ended()).state is RequestState.CANCELLED


async def test_a_call_that_takes_too_long_is_ended(rig: Rig) -> None:
    async with rig.sidecar(run_timeout_s=1):
        async with rig.client.post("/talk", data=b"x", headers={"X-Talk": "silent"}) as answer:
            assert answer.status == 504
        assert (await rig.ended()).state is RequestState.TIMED_OUT
        await rig.said("aborted")
        async with rig.ws() as ws:
            assert (await ws.receive()).data == 1011


async def test_a_channel_on_which_nothing_happens_is_closed(tmp_path: Path) -> None:
    async with opened(tmp_path, channel_idle_s=0.3) as rig, rig.sidecar():
        async with rig.ws() as ws:
            message = await ws.receive()
            assert (message.data, message.extra) == (1001, "nothing was sent or received for 0.3 s")
        assert (await rig.ended()).state is RequestState.CANCELLED
        async with rig.client.post("/talk", data=b"x", headers={"X-Talk": "silent"}) as answer:
            assert answer.status == 504


async def test_a_front_end_that_stops_lets_channels_end_and_closes_the_rest(tmp_path: Path) -> None:
    async with opened(tmp_path, channel_drain_s=1) as rig, rig.sidecar(), rig.ws() as ends, rig.ws() as stays:
        stopping = asyncio.create_task(rig.stop())
        await eventually(rig.listens, lambda listens: not listens)
        await ends.send_str("still here")
        assert await ends.receive_str() == "echo still here"
        await ends.close()
        message = await stays.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
        await stopping
        states = [(await rig.ended(job)).state for job in rig.queue.jobs[:2]]
    assert states == [RequestState.FULFILLED, RequestState.CANCELLED]


async def test_a_front_end_that_stops_answers_who_is_queued(rig: Rig) -> None:
    async def ask() -> int:
        async with rig.client.post("/talk", data=b"x") as answer:
            return answer.status

    asking = asyncio.create_task(ask())
    await rig.queued()
    await rig.stop()
    assert await asking == 503
    assert (await rig.ended()).state is RequestState.CANCELLED


async def test_a_sidecar_that_stops_tells_the_client(rig: Rig) -> None:
    async with rig.sidecar(drain_s=0.1):
        ws = await rig.ws()
        await ws.send_str("hi")
        await ws.receive_str()
    message = await ws.receive()
    assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
    record = await rig.ended()
    assert (record.state, record.attempt) == (RequestState.ERRORED, 1)
    assert await rig.queue.take(VERSION_ID) is None


# -- front ends that have gone -----------------------------------------------------------------


@pytest.mark.parametrize("gone", ["restarted", "refusing"])
async def test_a_job_whose_front_end_has_gone_ends_and_its_container_is_left_alone(
    rig: Rig, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = channels.new_token()
    async with rig.client.post("/talk", headers={"NVCF-POLL-SECONDS": "1"}, data=b"x") as answer:
        assert answer.status == 504
    url = rig.channel().url if gone == "restarted" else "http://127.0.0.1:9/attach"
    job = a_job(channel=Channel(url=url, token=token), target="/talk")
    draft = Draft(
        id=job.id,
        account=job.account,
        function_id=job.function_id,
        version_id=job.version_id,
        digest=job.digest,
        deadline_s=60,
    )
    await rig.broker.results.create(draft, queue_limit=10, watch=False)
    with caplog.at_level(logging.DEBUG):
        async with rig.sidecar():
            await rig.queue.publish(job, timeout_s=1)
            record = await rig.ended(job)
    assert (record.state, record.attempt) == (RequestState.ERRORED, 1)
    assert record.outcome is not None
    assert (record.outcome.status, UNREACHABLE in record.outcome.body.decode()) == (500, True)
    assert not rig.talker.said
    assert await rig.queue.take(VERSION_ID) is None
    assert token not in "".join(str(vars(line)) for line in caplog.records)


# -- the sidecars' door ------------------------------------------------------------------------


def attaching(token: str) -> dict[str, str]:
    """The headers with which a sidecar attaches."""
    return {
        "Authorization": f"Bearer {token}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }


async def test_a_token_opens_a_channel_once_and_nothing_else_does(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws:
        await ws.send_str("hi")
        await ws.receive_str()
        seen = set()
        for sent in (rig.channel().token, KEY, "wrong", "", "x" * 4000):
            async with rig.client.get(rig.channel().url, headers=attaching(sent)) as answer:
                seen.add((answer.status, await answer.read(), answer.headers["Server"]))
        assert len(seen) == 1
        assert seen.pop()[0] == 401
        async with rig.client.get(rig.channel().url.replace(attach.PATH, "/health")) as answer:
            assert (answer.status, answer.headers["Server"]) == (404, "fnqueue")
        async with rig.client.get(rig.url / attach.PATH[1:], headers={"function-id": ""}) as answer:
            assert answer.status in (400, 404)
        await ws.send_str("hi")
        assert await ws.receive_str() == "echo hi"


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({}, "127.0.0.1"),
        ({"host": "0.0.0.0"}, "."),
        ({"host": "0.0.0.0", "attach_address": "10.1.2.3"}, "10.1.2.3"),
        ({"attach_host": "0.0.0.0", "attach_address": "fe80::1"}, "fe80::1"),
    ],
)
async def test_sidecars_are_given_an_address_that_other_machines_can_call(
    tmp_path: Path, settings: dict[str, str], host: str
) -> None:
    async with opened(tmp_path, **settings) as rig:
        async with rig.asking():
            await rig.queued()
        url = URL(rig.channel().url)
        assert host in str(url.host)
        assert (url.host != "0.0.0.0", url.path, url.port == rig.url.port) == (True, attach.PATH, False)


async def test_a_port_for_sidecars_that_is_taken_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        with pytest.raises(ConfigurationError, match="FNQUEUE_ATTACH_PORT"):
            async with opened(tmp_path, attach_port=rig.url.port):
                pass


async def test_more_channels_than_a_front_end_may_hold_are_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, max_channels=1) as rig, rig.sidecar():
        async with rig.ws() as ws:
            async with rig.client.post("/talk", data=b"x") as answer:
                assert (answer.status, "Retry-After" in answer.headers) == (503, True)
            await ws.close()
        async with rig.client.post("/talk", data=b"x") as answer:
            assert answer.status == 201


# -- what is said over a channel ----------------------------------------------------------------


@given(kind=st.sampled_from(Kind), payload=st.binary(max_size=50))
def test_a_message_survives_the_way(kind: Kind, payload: bytes) -> None:
    assert channels.parse(channels.message(kind, payload)) == (kind, payload)


@given(code=st.integers(1000, 4999), reason=st.text(max_size=200))
def test_a_close_survives_the_way_with_as_much_of_its_reason_as_fits(code: int, reason: str) -> None:
    reason = reason.encode(errors="replace").decode()
    close = channels.closing(code, reason)
    assert channels.unpack_close(channels.pack_close(close)) == close
    assert len(close.reason) <= 123
    assert reason.startswith(close.reason.decode())


def test_a_head_and_a_failure_survive_the_way() -> None:
    head = Head(status=201, headers=(("A", "b"),), protocol="chat")
    assert channels.unpack_head(channels.pack_head(head)) == head
    failure = Failure(status=504, problem=b'{"detail": "late"}', code=1012)
    assert channels.unpack_failure(channels.pack_failure(failure)) == failure
    assert failure.detail == "late"
    assert channels.closing(0, b"") == Close(code=1000)


@given(raw=st.binary(max_size=50))
def test_garbage_is_garbled_and_nothing_worse(raw: bytes) -> None:
    for read in (channels.parse, channels.unpack_head, channels.unpack_close, channels.unpack_failure):
        with contextlib.suppress(Garbled):
            read(raw)
    assert isinstance(Failure(status=500, problem=raw).detail, str)
