"""Calls over a channel: a front end and a sidecar over back ends in memory, before a real container on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from hypothesis import given
from hypothesis import strategies as st

from api import headers
from api.front import Front
from api.middleware import answer_errors, observing
from api.routes import attach
from api.routes.channels import converse
from api.server import _attaching
from broker import channels
from broker.backends.memory.queue import MemoryQueue
from broker.channels import Close, Failure, Garbled, Head, Kind
from broker.invocations import Submission
from broker.model import Channel, Draft, FunctionStatus, Job, Principal, Record, RequestState, Version
from broker.ports import Broker
from broker.settings import ApiSettings
from tests.containers.talker import Talker
from tests.eventually import eventually
from tests.unit.container import FUNCTION_ID, VERSION_ID, a_job, settings_for
from workers.channel import GONE, UNCLOSED
from workers.sidecar import serve


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
    """A front end and a container; sidecars are started by the test. `slots` is theirs."""

    broker: Broker
    queue: Spy
    front: Front
    client: aiohttp.ClientSession
    talker: Talker
    folder: Path
    port: int
    closed: asyncio.Event = field(default_factory=asyncio.Event)

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
        return self.client.ws_connect(path, **given)

    async def record(self, job: Job | None = None) -> Record:
        record = await self.broker.results.read((job or self.queue.jobs[-1]).id)
        assert record is not None
        return record

    async def ended(self, job: Job | None = None) -> Record:
        return await eventually(lambda: self.record(job), lambda record: record.state.terminal)

    async def said(self, line: str, times: int = 1) -> None:
        async def count() -> int:
            return sum(n for said, n in self.talker.said.items() if said.startswith(line))

        await eventually(count, lambda seen: seen == times)


@asynccontextmanager
async def opened(folder: Path, broker: Broker, **given: Any) -> AsyncIterator[Rig]:
    settings = ApiSettings(data_dir=folder, **given)
    queue = Spy()
    broker = replace(broker, queue=queue)
    front = Front.over(broker, settings)
    version = Version(
        id=VERSION_ID,
        function_id=FUNCTION_ID,
        account="acme",
        name="f",
        inference_url="/",
        container_image="i",
        created_at=0,
        status=FunctionStatus.ACTIVE,
    )

    async def handle(request: web.Request) -> web.StreamResponse:
        submission = Submission(
            principal=Principal(account="acme", subject="s", scopes=frozenset()),
            function_id=FUNCTION_ID,
            version_id=VERSION_ID,
            headers=headers.forwarded(request.headers),
            body=b"",
            passthrough=True,
            method=request.method,
            target=request.raw_path,
        )
        return await converse(front, request, submission, version, wait_s=headers.wait(request.headers).seconds)

    talker = Talker()
    app = web.Application(middlewares=[observing(front), answer_errors])
    app.router.add_route("*", "/{p:.*}", handle)
    async with asyncio.timeout(60), _attaching(front):
        runners = [
            web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1),
            web.AppRunner(talker.app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1),
        ]
        try:
            for runner in runners:
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports = [runner.addresses[0][1] for runner in runners]
            await broker.queue.declare(VERSION_ID)
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{ports[0]}", connector=connector) as client:
                yield Rig(broker, queue, front, client, talker, folder, ports[1])
        finally:
            await front.channels.drain()
            await front.calls.finish(grace_s=1)
            for runner in runners:
                await runner.cleanup()


@pytest.fixture
async def rig(tmp_path: Path, memory_broker: Broker) -> AsyncIterator[Rig]:
    async with opened(tmp_path, memory_broker, channel_drain_s=0.2) as found:
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
    sent = {"X-Mine": "1", "Authorization": "Bearer secret", "NVCF-SUB": "somebody"}
    async with rig.sidecar(), rig.ws("/ws?a=%2F&b=", protocols=("soap", "superchat"), headers=sent) as ws:
        assert ws.protocol == "superchat"
        await ws.send_str("tell")
        told = json.loads(await ws.receive_str())
    found = {name.lower(): value for name, value in told["headers"]}
    assert told["path"] == "/ws?a=%2F&b="
    assert found["x-mine"] == "1"
    assert found["nvcf-reqid"] == rig.queue.jobs[0].id
    assert found["nvcf-sub"] == "s"
    assert "authorization" not in found
    assert "sec-websocket-extensions" not in found
    channel = rig.queue.jobs[0].channel
    assert channel is not None
    assert channel.token not in json.dumps(told)


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
async def test_a_message_that_is_too_large_closes_the_websocket(
    tmp_path: Path, memory_broker: Broker, direction: str
) -> None:
    limit = 100_000
    async with (
        opened(tmp_path, memory_broker, max_message_bytes=limit) as rig,
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


async def test_a_body_over_the_limit_is_refused(tmp_path: Path, memory_broker: Broker) -> None:
    async with opened(tmp_path, memory_broker, channel_body_bytes=1024) as rig, rig.sidecar():
        async with rig.client.post("/talk", data=b"x" * 1025) as answer:
            assert answer.status == 413
        assert rig.queue.jobs == []
        body = pieces(b"x" * 1025, after=asyncio.Event())
        async with rig.client.post("/talk", data=body, headers={"X-Talk": "silent"}) as answer:
            assert answer.status == 413
        assert (await rig.ended()).state is RequestState.CANCELLED


async def test_a_body_that_is_not_well_formed_ends_the_call(rig: Rig) -> None:
    async with rig.sidecar():
        reader, writer = await asyncio.open_connection(rig.client._base_url.host, rig.client._base_url.port)
        writer.write(b"POST /talk HTTP/1.1\r\nHost: h\r\nX-Talk: silent\r\nTransfer-Encoding: chunked\r\n\r\n")
        await rig.said("start")
        writer.write(b"zz\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()
        assert (await rig.ended()).state is RequestState.CANCELLED
        await rig.said("aborted")


# -- slow readers ------------------------------------------------------------------------------


async def stands_still(rig: Rig) -> int:
    """How much the container has got rid of, once it gets rid of no more."""
    before = -1
    while before != rig.talker.poured:
        before = rig.talker.poured
        await asyncio.sleep(0.3)
    return before


async def test_a_client_that_does_not_read_holds_the_container_up(rig: Rig) -> None:
    async with rig.sidecar(), rig.client.get("/talk", headers={"X-Talk": "pour"}) as answer:
        poured = await stands_still(rig)
        assert 0 < poured < 32 * 1024 * 1024
        await answer.content.readexactly(poured)
        assert await eventually(lambda: asyncio.sleep(0, rig.talker.poured), lambda seen: seen > poured)


async def test_a_client_that_does_not_read_its_websocket_holds_the_container_up(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws:
        await ws.send_str("flood 10000")
        poured = await stands_still(rig)
        assert 0 < poured < 32 * 1024 * 1024
        while poured > 0:
            poured -= len(await ws.receive_bytes())


async def test_a_container_that_does_not_read_holds_the_client_up(rig: Rig) -> None:
    sent = 0

    async def flood(ws: aiohttp.ClientWebSocketResponse) -> None:
        nonlocal sent
        while True:
            await ws.send_bytes(b"x" * 10_000)
            sent += 10_000

    async with rig.sidecar(), rig.ws("/ws?deaf=1") as ws:
        flooding = asyncio.create_task(flood(ws))
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        flooding.cancel()
        assert 0 < sent < 32 * 1024 * 1024


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
    connecting = asyncio.ensure_future(rig.ws())
    await eventually(lambda: asyncio.sleep(0, len(rig.queue.jobs)), lambda seen: seen == 1)
    connecting.cancel()
    assert (await rig.ended()).state is RequestState.CANCELLED
    async with rig.sidecar():
        await eventually(lambda: rig.queue.take(VERSION_ID), lambda found: found is None)
    assert not rig.talker.said


async def test_a_call_that_nobody_picks_up_is_taken_out_of_the_queue(rig: Rig) -> None:
    for given in ({"Upgrade": "websocket"}, {}):
        with contextlib.suppress(aiohttp.WSServerHandshakeError):
            if given:
                await rig.ws(headers={"NVCF-POLL-SECONDS": "1"})
        async with rig.client.post("/talk", headers={"NVCF-POLL-SECONDS": "1"}, data=b"x") as answer:
            problem = await answer.json()
            assert (answer.status, problem["type"]) == (504, "urn:fnqueue:problem-details:timed-out")
            assert problem["requestId"] == answer.headers["NVCF-REQID"] == rig.queue.jobs[-1].id
        break
    for job in rig.queue.jobs:
        assert (await rig.record(job)).state is RequestState.CANCELLED


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
        assert (await rig.ended()).state is RequestState.EXPIRED
        await rig.said("aborted")
        async with rig.ws() as ws:
            assert (await ws.receive()).data == 1011


async def test_a_channel_on_which_nothing_happens_is_closed(tmp_path: Path, memory_broker: Broker) -> None:
    async with opened(tmp_path, memory_broker, channel_idle_s=0.3) as rig, rig.sidecar():
        async with rig.ws() as ws:
            message = await ws.receive()
            assert (message.data, message.extra) == (1001, "nothing was sent or received for 0.3 s")
        assert (await rig.ended()).state is RequestState.CANCELLED
        async with rig.client.post("/talk", data=b"x", headers={"X-Talk": "silent"}) as answer:
            assert answer.status == 504


async def test_a_front_end_that_stops_lets_channels_end_and_closes_the_rest(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ends, rig.ws() as stays:
        for ws in (ends, stays):
            await ws.send_str("hi")
            await ws.receive_str()
        draining = asyncio.create_task(rig.front.channels.drain())
        await ends.send_str("still here")
        assert await ends.receive_str() == "echo still here"
        await ends.close()
        message = await stays.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
        await draining
        states = {(await rig.ended(job)).state for job in rig.queue.jobs}
    assert states == {RequestState.FULFILLED, RequestState.CANCELLED}


async def test_a_front_end_that_stops_answers_who_is_queued(rig: Rig) -> None:
    asking = asyncio.ensure_future(rig.client.post("/talk", data=b"x"))
    await eventually(lambda: asyncio.sleep(0, len(rig.queue.jobs)), lambda seen: seen == 1)
    rig.front.calls.interrupt()
    async with await asking as answer:
        assert answer.status == 503
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


async def test_a_sidecar_that_dies_is_told_to_the_client(rig: Rig) -> None:
    ...


# -- front ends that have gone -----------------------------------------------------------------


@pytest.mark.parametrize("gone", ["restarted", "refusing"])
async def test_a_job_whose_front_end_has_gone_ends_and_its_container_is_left_alone(
    rig: Rig, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = channels.new_token()
    url = rig.front.channels.url if gone == "restarted" else "http://127.0.0.1:9/attach"
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
    assert (record.outcome.status, GONE in record.outcome.body.decode()) == (500, True)
    assert not rig.talker.said
    assert await rig.queue.take(VERSION_ID) is None
    assert token not in "".join(str(vars(line)) for line in caplog.records)


# -- the sidecars' door ------------------------------------------------------------------------


async def test_a_token_opens_a_channel_once_and_nothing_else_does(rig: Rig) -> None:
    async with rig.sidecar(), rig.ws() as ws, aiohttp.ClientSession() as anybody:
        await ws.send_str("hi")
        await ws.receive_str()
        channel = rig.queue.jobs[0].channel
        assert channel is not None
        seen = set()
        for sent in (channel.token, "nvapi-admin", "", "é"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await anybody.ws_connect(channel.url, headers={"Authorization": f"Bearer {sent}"})
            seen.add(refused.value.status)
        assert seen == {401}
        bodies = set()
        for sent in (channel.token, "wrong"):
            given = {"Authorization": f"Bearer {sent}", "Upgrade": "websocket", "Connection": "Upgrade"}
            given |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
            async with anybody.get(channel.url, headers=given) as answer:
                bodies.add((answer.status, await answer.read()))
        assert len(bodies) == 1
        async with anybody.get(channel.url.replace(attach.PATH, "/health")) as answer:
            assert (answer.status, answer.headers["Server"]) == (404, "fnqueue")
        await ws.send_str("hi")
        assert await ws.receive_str() == "echo hi"


async def test_a_token_is_good_only_while_its_call_waits(rig: Rig) -> None:
    async with rig.client.post("/talk", headers={"NVCF-POLL-SECONDS": "1"}, data=b"x") as answer:
        assert answer.status == 504
    channel = rig.queue.jobs[0].channel
    assert channel is not None
    assert rig.front.channels.redeem(channel.token) is None


async def test_more_channels_than_a_front_end_may_hold_are_refused(tmp_path: Path, memory_broker: Broker) -> None:
    async with opened(tmp_path, memory_broker, max_channels=1) as rig, rig.sidecar():
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
