"""Pipes to measure fnqueue against: what has to happen to a request anyway, and nothing else.

HTTP → durable publish with confirm → worker → POST to the function → result stored → the front told → answer. There are
no records, leases, limits, keys, signatures or headers. `plain` uses aio-pika, redis-py and aiohttp's client as their
manuals show; `lean` the same clients as fnqueue. What lies between fnqueue and `lean` is what fnqueue does more.

    python -m benchmarks.pipes front plain     python -m benchmarks.pipes worker lean

One process each, told everything by the environment: PIPE_QUEUE_URL, PIPE_STORE_URL, PIPE_QUEUE, PIPE_SLOTS, and
PIPE_PORT of the front, PIPE_FUNCTION of the worker: the URL of the function.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import aio_pika
import aiohttp
from aio_pika.abc import AbstractIncomingMessage
from aiohttp import web
from pamqp.common import FieldTable
from redis.asyncio import Redis
from yarl import URL

from broker.backends.rabbitmq import wire
from broker.backends.redis.connection import Connection
from broker.settings import Settings
from workers.connections import MAX_PLAIN_BYTES, Connections
from workers.connections import Plain as PlainAnswer

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

RESULT_S = 300
ANSWER_S = 60.0
QUORUM: FieldTable = {"x-queue-type": "quorum"}
JSON = "application/json"

Work = Callable[[bytes], Awaitable[bytes]]


class Clients(Protocol):
    async def publish(self, request_id: str, body: bytes) -> None:
        """Return once the broker has it for good."""

    async def result(self, request_id: str) -> bytes | None: ...

    async def listen(self, told: Callable[[str], None]) -> None:
        """Call `told` with each request whose result is there, from when this returns on."""

    async def serve(self, work: Work) -> None:
        """Have what comes worked on, `PIPE_SLOTS` at a time, until cancelled."""

    async def post(self, body: bytes) -> bytes: ...


class Plain:
    """The libraries, used plainly."""

    def __init__(
        self, publishing: aio_pika.abc.AbstractChannel, consuming: aio_pika.abc.AbstractChannel, store: Redis,
        session: aiohttp.ClientSession,
    ) -> None:  # fmt: skip
        self._publishing = publishing
        self._consuming = consuming
        self._store = store
        self._session = session
        self._listening: asyncio.Task[None] | None = None

    async def publish(self, request_id: str, body: bytes) -> None:
        message = aio_pika.Message(body, message_id=request_id, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await self._publishing.default_exchange.publish(message, routing_key=os.environ["PIPE_QUEUE"])

    async def result(self, request_id: str) -> bytes | None:
        found = await self._store.get(f"pipe:{request_id}")
        return found if isinstance(found, bytes) else None

    async def listen(self, told: Callable[[str], None]) -> None:
        pubsub = self._store.pubsub()
        await pubsub.subscribe(os.environ["PIPE_QUEUE"])

        async def hear() -> None:
            async for message in pubsub.listen():
                if message["type"] == "message":
                    told(message["data"].decode())

        self._listening = asyncio.create_task(hear())

    async def serve(self, work: Work) -> None:
        queue = await self._consuming.get_queue(os.environ["PIPE_QUEUE"])

        async def received(message: AbstractIncomingMessage) -> None:
            result = await work(message.body)
            pipeline = self._store.pipeline(transaction=False)
            pipeline.set(f"pipe:{message.message_id}", result, ex=RESULT_S)
            pipeline.publish(os.environ["PIPE_QUEUE"], message.message_id or "")
            await pipeline.execute()
            await message.ack()

        await queue.consume(received)
        await asyncio.Event().wait()

    async def post(self, body: bytes) -> bytes:
        url = os.environ["PIPE_FUNCTION"]
        async with self._session.post(url, data=body, headers={"Content-Type": JSON}) as answer:
            return await answer.read()


class Lean:
    """The clients of fnqueue's hot path."""

    def __init__(self, queue: wire.Channel, store: Connection, function: Connections | None) -> None:
        self._queue = queue
        self._store = store
        self._function = function
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Task[None] | None = None

    async def publish(self, request_id: str, body: bytes) -> None:
        properties = wire.properties(
            {}, content_type=JSON, expiration=str(RESULT_S * 1000), message_id=request_id, app_id="pipe"
        )
        await self._queue.publish(os.environ["PIPE_QUEUE"], request_id, properties, body)

    async def result(self, request_id: str) -> bytes | None:
        [found] = await self._store.run(("GET", f"pipe:{request_id}"))
        return bytes(found) if found is not None else None

    async def listen(self, told: Callable[[str], None]) -> None:
        listening = asyncio.Event()
        self._listening = asyncio.create_task(
            self._store.listen(os.environ["PIPE_QUEUE"], lambda said: told(said.decode()), gap=listening.set)
        )
        await listening.wait()

    async def serve(self, work: Work) -> None:
        async def handle(message: wire.Message) -> None:
            result = await work(message.body)
            await self._store.run(
                ("SET", f"pipe:{message.message_id}", result, "EX", RESULT_S),
                ("PUBLISH", os.environ["PIPE_QUEUE"], message.message_id),
            )
            self._queue.ack(message.delivery_tag)

        def received(message: wire.Message) -> None:
            task = asyncio.create_task(handle(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        await self._queue.consume(os.environ["PIPE_QUEUE"], received, tag="pipe")
        await asyncio.Event().wait()

    async def post(self, body: bytes) -> bytes:
        assert self._function is not None, "a worker has one"
        url = URL(os.environ["PIPE_FUNCTION"])
        answer = await self._function.post(url, [("Content-Type", JSON)], body, keep=True, plain_bytes=MAX_PLAIN_BYTES)
        if isinstance(answer, PlainAnswer):
            return answer.body
        try:
            return await answer.content.read()
        finally:
            answer.release()


@asynccontextmanager
async def plain() -> AsyncIterator[Clients]:
    async with AsyncExitStack() as opened:
        queue_url = os.environ["PIPE_QUEUE_URL"]
        connections = [await opened.enter_async_context(await aio_pika.connect_robust(queue_url)) for _ in range(2)]
        publishing, consuming = [await connection.channel() for connection in connections]
        await consuming.set_qos(prefetch_count=int(os.environ["PIPE_SLOTS"]))
        store = await opened.enter_async_context(Redis.from_url(os.environ["PIPE_STORE_URL"]))
        session = await opened.enter_async_context(aiohttp.ClientSession())
        await consuming.declare_queue(os.environ["PIPE_QUEUE"], durable=True, arguments=QUORUM)
        yield Plain(publishing, consuming, store, session)


@asynccontextmanager
async def lean() -> AsyncIterator[Clients]:
    queue_url = os.environ["PIPE_QUEUE_URL"]
    async with await aio_pika.connect(queue_url) as topology:
        declared = await (await topology.channel()).declare_queue(
            os.environ["PIPE_QUEUE"], durable=True, arguments=QUORUM
        )
    assert declared.name, "it was declared"
    connection, store = wire.Wire(queue_url, "pipe"), Connection(os.environ["PIPE_STORE_URL"], Settings())
    function = None
    if target := os.environ.get("PIPE_FUNCTION"):
        function = Connections(URL(target).host or "", URL(target).port or 80, kept_s=10, connect_s=5)
    await connection.connect()
    try:
        channel = await connection.channel()
        await channel.confirm()
        await channel.prefetch(int(os.environ["PIPE_SLOTS"]))
        yield Lean(channel, store, function)
    finally:
        await connection.close()
        await store.close()
        if function is not None:
            function.close()


KINDS = {"plain": plain, "lean": lean}


async def front(clients: Clients) -> None:
    waiting: dict[str, asyncio.Event] = {}

    def told(request_id: str) -> None:
        if request_id in waiting:
            waiting[request_id].set()

    async def invoke(request: web.Request) -> web.Response:
        request_id = str(uuid.uuid4())
        there = waiting[request_id] = asyncio.Event()
        try:
            await clients.publish(request_id, await request.read())
            async with asyncio.timeout(ANSWER_S):
                await there.wait()
            return web.Response(body=await clients.result(request_id), content_type=JSON)
        finally:
            del waiting[request_id]

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    await clients.listen(told)
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.add_routes([web.post("/invoke", invoke), web.get("/health", health)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(os.environ["PIPE_PORT"]), backlog=1024).start()
    await asyncio.Event().wait()


async def worker(clients: Clients) -> None:
    await clients.serve(clients.post)


async def main(role: str, kind: str) -> None:
    async with KINDS[kind]() as clients:
        await {"front": front, "worker": worker}[role](clients)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
