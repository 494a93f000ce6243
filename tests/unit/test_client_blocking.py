"""The blocking client: one loop in a thread, shared by any number of threads, ended in good order."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

import fnqueue
from fnqueue.blocking import Client, Handle
from fnqueue.errors import ClientClosed, ConfigurationError
from fnqueue.events import Done, Running
from fnqueue.inputs import File
from fnqueue.portal import Portal
from tests.unit.service import (
    FUNCTION_ID,
    KEY,
    REQUEST_ID,
    Service,
    ended,
    event,
    events,
    hang_up,
    never,
    pending,
    serving,
)

T = TypeVar("T")

TIMEOUT_S = 30.0


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as found:
        yield found


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal(on_close=_nothing)
    yield made
    made.close()


async def _nothing() -> None:
    pass


async def _identity(value: int) -> int:
    return value


async def test_it_calls_as_the_asynchronous_one_does(service: Service) -> None:
    service.tells = True
    service.will(
        hang_up,
        pending(**{"Retry-After": "0"}),
        ended("read"),
        events(event("started", attempt=1), event("done", statusCode=200)),
    )

    def work() -> None:
        with Client(service.url, KEY) as fnq:
            handle = fnq.function(FUNCTION_ID).spawn(message="hello")
            assert Handle.from_id(handle.id, fnq).get(timeout_s=TIMEOUT_S).json() == "read"
            found = list(fnq.handle(REQUEST_ID).events())
            assert found == [Running(attempt=1), Done(status="in-progress", status_code=200)]

    await asyncio.to_thread(work)
    assert len(service.heard) == 4


async def test_a_map_takes_its_values_in_the_callers_thread_and_as_there_is_room(service: Service) -> None:
    service.will(*(ended("x") for _ in range(5)))
    threads: set[int] = set()

    def values() -> Iterator[int]:
        for value in range(5):
            threads.add(threading.get_ident())
            yield value

    def work() -> tuple[int, list[int]]:
        with Client(service.url, KEY) as fnq:
            found = [each.index for each in fnq.function(FUNCTION_ID).map(values(), concurrency=1)]
        return threading.get_ident(), found

    thread, found = await asyncio.to_thread(work)
    assert found == list(range(5))
    assert threads == {thread}


async def test_leaving_a_map_waits_until_its_requests_are_cancelled(service: Service) -> None:
    service.will(ended("x"), pending(**{"Retry-After": "0"}), never, pending())

    def work() -> None:
        with Client(service.url, KEY) as fnq:
            results = fnq.function(FUNCTION_ID).map(range(2), concurrency=1)
            assert next(results).ok
            asyncio.run_coroutine_threadsafe(service.heard_of(3), loop).result(TIMEOUT_S)
            results.close()

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(work)
    assert service.calls[-1] == f"DELETE /requests/{REQUEST_ID}"


async def test_an_upload_tells_its_progress_from_another_thread_which_must_not_call(service: Service) -> None:
    said: list[Exception] = []

    def work() -> None:
        with Client(service.url, KEY) as fnq:

            def progress(_: object) -> None:
                try:
                    fnq.assets()
                except RuntimeError as exc:
                    said.append(exc)

            fnq.upload(File(b"x", upload=True), progress=progress)

    asset = {"assetId": REQUEST_ID, "uploadUrl": f"{service.url}/put", "contentType": "a/b", "description": "d"}
    service.will(ended(asset), ended())
    await asyncio.to_thread(work)
    assert [str(exc) for exc in said] == ["a callback cannot call the client that calls it"]


async def test_closing_ends_what_other_threads_wait_for(service: Service) -> None:
    service.will(never)
    with ThreadPoolExecutor(1) as threads:
        fnq = Client(service.url, KEY)
        waiting = threads.submit(fnq.handle(REQUEST_ID).get)
        await service.heard_of(1)
        await asyncio.to_thread(fnq.close)
        with pytest.raises(ClientClosed):
            await asyncio.wrap_future(waiting)
    await asyncio.wait_for(service.left.wait(), TIMEOUT_S)
    with pytest.raises(ClientClosed):
        fnq.assets()
    fnq.close()


def test_any_number_of_threads_may_call(portal: Portal) -> None:
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda value: portal.call(_identity(value)), range(500)))
    assert found == list(range(500))


def test_an_interrupted_call_is_cancelled(portal: Portal) -> None:
    """As Ctrl-C does it: an exception in the thread that waits."""
    cancelled = threading.Event()
    begun = threading.Event()

    async def endless() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    future = portal.submit(endless())
    assert begun.wait(TIMEOUT_S)
    future.cancel()
    assert cancelled.wait(TIMEOUT_S)


def test_an_iterator_that_is_left_is_closed(portal: Portal) -> None:
    closed = threading.Event()

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            for number in range(10):
                yield number
        finally:
            closed.set()

    for number in portal.each(numbers()):
        if number == 3:
            break
    assert closed.wait(TIMEOUT_S)


def test_an_iterator_that_is_interrupted_is_closed_once_its_step_has_ended(portal: Portal) -> None:
    """As Ctrl-C does it: an exception in the thread that waits for the next one."""
    ending, closed = threading.Event(), threading.Event()

    class Interrupted(Portal):
        def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
            if getattr(coroutine, "__name__", "") != "following":
                return portal.call(coroutine)
            portal.submit(coroutine)
            assert ending.wait(TIMEOUT_S)
            raise KeyboardInterrupt

    async def slow() -> AsyncGenerator[int, None]:
        try:
            ending.set()
            await asyncio.Event().wait()
            yield 1
        finally:
            await asyncio.sleep(0.05)
            closed.set()

    with pytest.raises(KeyboardInterrupt):
        next(Interrupted(_nothing).each(slow()))
    assert closed.is_set()


def test_an_iterator_that_is_interrupted_as_it_asks_is_closed_where_it_runs(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come when the loop has the step, and the thread has not yet what to wait for."""
    begun, ended_in = threading.Event(), list[str]()
    hand_over = asyncio.run_coroutine_threadsafe

    async def endless() -> AsyncGenerator[int, None]:
        try:
            begun.set()
            await asyncio.Event().wait()
            yield 1
        finally:
            ended_in.append(threading.current_thread().name)

    def interrupted(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Any:
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", hand_over)
        hand_over(coroutine, loop)
        assert begun.wait(TIMEOUT_S)
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(portal.each(endless()))
    assert ended_in == ["fnqueue"]


def test_closing_lets_what_runs_tidy_up() -> None:
    tidied = threading.Event()
    last = threading.Event()
    begun = threading.Event()

    async def closing() -> None:
        assert tidied.is_set()
        last.set()

    async def endless() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tidied.set()

    portal = Portal(on_close=closing)
    portal.submit(endless())
    assert begun.wait(TIMEOUT_S)
    portal.close()
    assert last.is_set()


def test_one_that_was_never_used_has_no_thread() -> None:
    before = threading.active_count()
    with Client("http://127.0.0.1:9", KEY):
        assert threading.active_count() == before


def test_a_fork_of_one_that_was_used_says_so_instead_of_waiting_for_ever(portal: Portal) -> None:
    portal.call(_identity(1))
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def child() -> None:
        try:
            portal.call(_identity(1))
        except ClientClosed as exc:
            theirs.send(str(exc))
        portal.close()

    process = fork.Process(target=child)
    process.start()
    try:
        assert ours.poll(TIMEOUT_S)
        assert "forked" in ours.recv()
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_whoever_does_not_use_the_client_does_not_pay_for_it() -> None:
    """A sidecar imports the wire's models, and every command the command line."""
    look = "import sys, fnqueue.cli, fnqueue.wire; sys.exit('httpx2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False, timeout=TIMEOUT_S).returncode == 0


def test_who_uses_the_client_imports_nothing_of_a_server() -> None:
    """They are installed with it, and are not to be waited for."""
    look = (
        "import sys, fnqueue.blocking; "
        "sys.exit(' '.join({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:])) or 0)"
    )
    servers = ("aio_pika", "aiodocker", "aiohttp", "aiormq", "api", "boto3", "broker", "click", "lightkube", "orjson")
    command = [sys.executable, "-c", look, *servers, "prometheus_client", "psutil", "redis", "uvloop", "workers"]
    done = subprocess.run(command, check=False, timeout=TIMEOUT_S, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_public_name_is_there() -> None:
    assert all(getattr(fnqueue, name) is not None for name in fnqueue.__all__)
    assert set(fnqueue.__all__) <= set(dir(fnqueue))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = fnqueue.Nothing


def test_without_a_key_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name in ("FNQUEUE_API_KEY", "FNQUEUE_ADMIN_KEY", "FNQUEUE_KEY", "FNQUEUE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError):
        Client()
