"""Progress on polls and the events of a request, over HTTP and the back ends in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker import events
from broker.backends.memory.results import MemoryResults
from broker.errors import StoreUnavailable
from broker.events import Event, Kind, Places, Seen
from broker.model import Claim, Interest, Job, Lease, Outcome, Progress, Record, RequestState
from broker.settings import Settings
from tests.contract.test_results import accept, granted
from tests.eventually import eventually
from tests.sse import Listening, listening
from tests.unit.test_server import NOBODYS, NVCF, VERSION, House, caller, opened

QUICK = (0.01, 0.02)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


def path_of(request_id: str) -> str:
    return f"{NVCF}/requests/{request_id}/events"


@asynccontextmanager
async def listener(house: House, request_id: str, *, last_id: str = "") -> AsyncIterator[Listening]:
    async with asyncio.timeout(20), listening(house.client, path_of(request_id), last_id=last_id) as found:
        assert found.response.status == 200
        yield found


async def start(house: House) -> tuple[Job, Lease]:
    """Claim the next job, as a sidecar would."""
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    claim: Claim = await house.broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
    assert claim.lease is not None
    return delivery.job, claim.lease


async def report(house: House, lease: Lease, *percents: int, partial: bytes = b"null", after: int = 0) -> None:
    for sequence, percent in enumerate(percents, start=after + 1):
        progress = Progress(percent=percent, partial=partial)
        await house.broker.results.report(lease, progress, sequence=sequence)


async def settle(house: House, job: Job, lease: Lease, status: int = 200) -> None:
    state = RequestState.FULFILLED if status < 400 else RequestState.ERRORED
    await house.broker.results.settle(lease, job, state, Outcome(status=status, body=b"done"))


# -- progress on polls -------------------------------------------------------------------------


async def test_progress_ends_a_wait_with_202_and_what_is_done_so_far(house: House) -> None:
    invoking = asyncio.create_task(house.invoke({"NVCF-POLL-SECONDS": "120"}))
    await house.some_queued()
    job, lease = await start(house)
    await report(house, lease, 40, partial=b'{"text":"half"}')
    status, headers, body = await asyncio.wait_for(invoking, 20)
    assert (status, headers["NVCF-STATUS"], headers["NVCF-PERCENT-COMPLETE"]) == (202, "in-progress", "40")
    assert (headers["Content-Type"], body) == ("application/json", b'{"text":"half"}')
    assert headers["Retry-After"] == "1"
    location = headers["Location"]
    polling = asyncio.create_task(get(house, location))
    await report(house, lease, 50, after=1)
    assert await asyncio.wait_for(polling, 20) == (202, "50", b"null")
    assert await get(house, location, wait_s=1) == (202, "50", b"null")
    await settle(house, job, lease)
    assert await get(house, location) == (200, None, b"done")


async def get(house: House, url: str, *, wait_s: int = 20) -> tuple[int, str | None, bytes]:
    async with house.client.get(url, headers={"NVCF-POLL-SECONDS": str(wait_s)}) as response:
        return response.status, response.headers.get("NVCF-PERCENT-COMPLETE"), await response.read()


async def test_each_update_is_one_answer_and_a_listener_takes_none(house: House) -> None:
    request_id = await house.submit()
    job, lease = await start(house)
    async with listener(house, request_id) as found:
        await report(house, lease, 10, 20, 30)
        assert [(await found.until("progress")).data["percentComplete"] for _ in range(3)] == [10, 20, 30]
        await house.client.get(f"{NVCF}/queues/{request_id}/position")
        url = f"{NVCF}/pexec/status/{request_id}"
        assert [(await get(house, url))[1] for _ in range(3)] == ["10", "20", "30"]
        await settle(house, job, lease)


# -- the stream --------------------------------------------------------------------------------


async def test_a_requests_whole_life_is_told(house: House) -> None:
    request_id = await house.submit()
    async with listener(house, request_id) as found:
        response = found.response
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        assert (response.headers["NVCF-REQID"], response.headers["Server"]) == (request_id, "fnqueue")
        queued = await found.next()
        job, lease = await start(house)
        started = await found.next()
        await report(house, lease, 25, partial=b'{"text": "a\\nb"}')
        progress = await found.next()
        await settle(house, job, lease)
        assert [queued, started, progress] == found.seen
        done = await found.next()
        assert await found.next() is None
    assert done is not None
    assert [(event.name, event.id) for event in found.seen] == [
        ("queued", ""), ("started", "1.0"), ("progress", "1.1"), ("done", "1.1.done"),
    ]  # fmt: skip
    told = {"requestId": request_id}
    assert [event.data for event in found.seen] == [
        told | {"status": "pending-evaluation", "positionInQueue": 1, "queueLength": 1},
        told | {"status": "in-progress", "attempt": 1},
        told | {"status": "in-progress", "attempt": 1, "percentComplete": 25, "partialResponse": {"text": "a\nb"}},
        told | {"status": "fulfilled", "statusCode": 200, "location": done.data["location"]},
    ]
    assert (await get(house, done.data["location"])) == (200, None, b"done")


@pytest.mark.parametrize(
    ("last_id", "names"),
    [
        ("", ["started", "progress", "progress", "done"]),
        ("1.0", ["progress", "progress", "done"]),
        ("1.1", ["progress", "done"]),
        ("1.2", ["done"]),
        ("nonsense", ["started", "progress", "progress", "done"]),
        ("1.1.dome", ["started", "progress", "progress", "done"]),
        ("9" * 400, ["started", "progress", "progress", "done"]),
    ],
)
async def test_who_comes_back_goes_on_where_it_was(house: House, last_id: str, names: list[str]) -> None:
    request_id = await house.submit()
    job, lease = await start(house)
    await report(house, lease, 10, 20)
    await settle(house, job, lease)
    async with listener(house, request_id, last_id=last_id) as found:
        assert [event.name for event in await found.rest()] == names


async def test_who_knows_the_end_is_told_not_to_come_back(house: House) -> None:
    request_id = await house.submit()
    await house.finish()
    async with listener(house, request_id) as found:
        await found.rest()
    async with house.client.get(path_of(request_id), headers={"Last-Event-ID": found.last_id}) as response:
        assert (response.status, await response.read()) == (204, b"")


async def test_places_change_as_others_start(house: House) -> None:
    ids = [await house.submit() for _ in range(3)]
    async with listener(house, ids[2]) as found:
        for rank in (3, 2, 1):
            event = await found.until("queued")
            assert (event.data["positionInQueue"], event.data["queueLength"]) == (rank, rank)
            if rank > 1:
                await house.finish()
        await house.finish()
        assert [event.name for event in await found.rest()] == ["started", "done"]


@pytest.mark.parametrize(("status", "word"), [(200, "fulfilled"), (422, "errored")])
async def test_the_end_names_the_status_of_the_answer(house: House, status: int, word: str) -> None:
    request_id = await house.submit()
    job, lease = await start(house)
    await settle(house, job, lease, status)
    async with listener(house, request_id) as found:
        done = await found.until("done")
    assert (done.data["status"], done.data["statusCode"]) == (word, status)


async def test_a_cancelled_request_is_done(house: House) -> None:
    request_id = await house.submit()
    async with listener(house, request_id) as found:
        await found.until("queued")
        await house.client.delete(f"{NVCF}/requests/{request_id}")
        done = await found.until("done")
    assert (done.data["status"], done.data["statusCode"]) == ("rejected", 410)
    assert done.data["detail"] == "cancelled by its caller"


async def test_a_foreign_request_is_an_unknown_one(house: House) -> None:
    request_id = await house.submit()

    async def ask(client: aiohttp.ClientSession, asked: str) -> tuple[int, list[tuple[str, str]], bytes]:
        async with client.get(path_of(asked)) as response:
            shown = [pair for pair in response.headers.items() if pair[0] != "Date"]
            return response.status, shown, await response.read()

    async with caller(house, "other") as stranger:
        assert await ask(stranger, request_id) == await ask(stranger, NOBODYS)
        assert (await ask(stranger, request_id))[0] == 404
    async with caller(house, "default", "queue_details") as other:
        assert (await ask(other, request_id))[0] == 403
    assert (await ask(house.client, "x"))[0] == 400


async def test_one_listener_too_many_is_503_with_when_to_come_back(tmp_path: Path) -> None:
    async with opened(tmp_path, max_event_streams=1) as house:
        request_id = await house.submit()
        async with listener(house, request_id) as found:
            await found.until("queued")
            async with house.client.get(path_of(request_id)) as response:
                assert (response.status, response.headers["Retry-After"]) == (503, "5")
        await house.finish()

        async def again() -> int:
            async with house.client.get(path_of(request_id)) as response:
                return response.status

        await eventually(again, lambda status: status == 200)


async def test_a_server_that_stops_ends_the_stream(tmp_path: Path) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer admin-key"}) as client:
        async with opened(tmp_path) as house:
            request_id = await house.submit()
            stream = listening(client, house.url + path_of(request_id))
            found = await stream.__aenter__()
            await found.until("queued")
        async with asyncio.timeout(20):
            assert await found.rest() == []
        await stream.__aexit__(None, None, None)


async def test_a_page_may_listen(house: House) -> None:
    request_id = await house.submit()
    await house.finish()
    async with house.client.get(path_of(request_id), headers={"Origin": "https://page.example"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    async with house.client.head(path_of(request_id)) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")


async def test_a_client_that_leaves_is_forgotten(house: House) -> None:
    request_id = await house.submit()
    async with listener(house, request_id) as found:
        await found.until("queued")
    # What is left of it would hold up the shutdown, or be the one listener too many.
    await house.finish()
    async with listener(house, request_id) as found:
        assert (await found.until("done")).data["statusCode"] == 200


# -- one listener, from the inside -------------------------------------------------------------


class Store(MemoryResults):
    """Reads are away while `away` is set."""

    away = False

    async def _read(self, request_id: str, interest: Interest) -> Record | None:
        if self.away:
            raise StoreUnavailable("the store is away")
        return await super()._read(request_id, interest)


@pytest.fixture
def store() -> Store:
    return Store(Settings())


@asynccontextmanager
async def following(store: Store, job: Job, seen: Seen | None = None) -> AsyncIterator[Any]:
    """A function that waits for the next event, `None` for silence left out."""
    record = await store.read(job.id)
    assert record is not None
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        places = Places(store, group.create_task)
        async with aclosing(events.follow(store, places, record, seen or Seen(), quiet_s=QUICK)) as found:

            async def following_event() -> Event | None:
                async for event in found:
                    if event is not None:
                        return event
                return None

            yield following_event


async def test_an_attempt_that_is_given_back_is_queued_and_started_again(store: Store) -> None:
    job = await accept(store, VERSION)
    async with following(store, job) as following_event:
        kinds = [(await following_event()).kind]
        for refund in (True, False):
            lease = await granted(store, job)
            kinds.append((await following_event()).kind)
            await store.release(lease, refund=refund)
            kinds.append((await following_event()).kind)
        lease = await granted(store, job)
        started = await following_event()
    assert kinds == [Kind.QUEUED, Kind.STARTED, Kind.QUEUED, Kind.STARTED, Kind.QUEUED]
    assert (started.kind, str(started.seen)) == (Kind.STARTED, "2.0")


async def test_a_new_attempts_progress_follows_that_of_the_old_one(store: Store) -> None:
    job = await accept(store, VERSION)
    lease = await granted(store, job)
    await store.report(lease, Progress(percent=50), sequence=1)
    async with following(store, job) as following_event:
        seen = [str((await following_event()).seen) for _ in range(2)]
        await store.release(lease, refund=False)
        seen.append(str((await following_event()).seen))
        lease = await granted(store, job)
        await store.report(lease, Progress(percent=5), sequence=1)
        seen += [str((await following_event()).seen) for _ in range(2)]
    assert seen == ["1.0", "1.1", "1.1", "2.1", "2.2"]


async def test_many_updates_come_in_order_before_the_end(store: Store) -> None:
    job = await accept(store, VERSION)
    lease = await granted(store, job)
    for sequence in range(1, 101):
        await store.report(lease, Progress(percent=sequence), sequence=sequence)
    await store.settle(lease, job, RequestState.FULFILLED, Outcome(status=200))
    async with following(store, job) as following_event:
        seen = [await following_event() for _ in range(102)]
        assert await following_event() is None
    assert [event.progress.percent for event in seen[1:-1]] == list(range(1, 101))
    assert seen[-1].kind is Kind.DONE


async def test_a_store_that_is_away_ends_nothing(store: Store) -> None:
    job = await accept(store, VERSION)
    async with following(store, job) as following_event:
        await following_event()
        store.away = True
        lease = await granted(store, job)
        next_event = asyncio.create_task(following_event())
        await asyncio.sleep(0.1)
        assert not next_event.done()
        store.away = False
        assert (await next_event).kind is Kind.STARTED
        await store.settle(lease, job, RequestState.FULFILLED, Outcome(status=200))
        assert (await following_event()).kind is Kind.DONE


async def test_silence_is_told_now_and_then_and_a_forgotten_request_ends_it(store: Store) -> None:
    job = await accept(store, VERSION)
    record = await store.read(job.id)
    assert record is not None
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        places = Places(store, group.create_task)
        async with aclosing(events.follow(store, places, record, Seen(), quiet_s=QUICK)) as found:
            assert [event and event.kind for event in [await anext(found) for _ in range(3)]] == [
                Kind.QUEUED, None, None,
            ]  # fmt: skip
            lease = await granted(store, job)
            await store.settle(lease, job, RequestState.FULFILLED, Outcome(status=200))
            await store.forget(job.id)
            assert [event async for event in found] == []


async def test_a_request_that_a_worker_brings_back_is_followed(store: Store) -> None:
    job = await accept(MemoryResults(Settings()), VERSION)
    lost = Record(
        id=job.id, account="acme", function_id="", version_id="", state=RequestState.QUEUED, created_at=1, deadline_at=2
    )
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        places = Places(store, group.create_task)
        async with aclosing(events.follow(store, places, lost, Seen(), quiet_s=QUICK)) as found:
            first = await anext(found)
            assert first is not None
            assert (first.kind, first.position) == (Kind.QUEUED, None)
            await granted(store, job)
            kinds = [event.kind async for event in _some(found)]
    assert kinds == [Kind.STARTED]


async def _some(found: AsyncIterator[Event | None]) -> AsyncIterator[Event]:
    async for event in found:
        if event is not None:
            yield event
            return
