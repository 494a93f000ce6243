"""How Redis has requests: ledgers of many, and records as releases before the present one left them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis as Client

from broker.backends.redis import keys, scripts
from broker.backends.redis.store import open_store
from broker.errors import AccountFull, QueueFull
from broker.model import DeadLetterFilter, Draft, Job, Outcome, RequestFilter, RequestState, Verdict
from broker.ports import Store
from broker.settings import Settings, SidecarSettings
from infra.local.servers import Redis
from tests.contract.records import job_of

S = RequestState
MANY = 400
SETTINGS = Settings(version_requests=MANY, account_requests=MANY)
DONE = Outcome(status=200, body=b"done")


@dataclass(frozen=True, slots=True)
class Site:
    """A version and an account of the test's own, which may have `MANY` requests each."""

    store: Store
    client: Client
    account: str
    function_id: str
    version_id: str

    def draft(self, request_id: str = "", size_bytes: int = 10) -> Draft:
        return Draft(
            id=request_id or str(uuid.uuid4()),
            account=self.account,
            function_id=self.function_id,
            version_id=self.version_id,
            digest="",
            deadline_s=600,
            size_bytes=size_bytes,
        )

    async def submit(self, request_id: str = "") -> Job:
        record = await self.store.results.create(self.draft(request_id), queue_limit=10_000, watch=False)
        return job_of(record, body=b"0123456789")

    async def fill(self) -> Sequence[Job]:
        return await asyncio.gather(*(self.submit() for _ in range(MANY)))

    async def ledgers(self) -> list[str]:
        """What is left of both, pages included."""
        found = [keys.ledger(self.version_id), keys.ledger(self.account)]
        for whose in (self.version_id, self.account):
            found += [keys.ledger_page(whose, number) for number in range(scripts.LEDGER_PAGES)]
        async with self.client.pipeline(transaction=False) as pipeline:
            for key in found:
                pipeline.exists(key)
            there = await pipeline.execute()
        return [key for key, is_there in zip(found, there, strict=True) if is_there]

    async def sums(self, whose: str) -> tuple[int, int]:
        """How many, and their bytes."""
        ledger = keys.ledger(whose)
        total, paged = await self.client.hmget(ledger, ["*", "#"])
        names = await self.client.hkeys(ledger)
        return len([name for name in names if len(name) == 16]) + int(paged or 0), int(total or 0)

    async def page_of(self, job: Job) -> str:
        """Where the version's ledger has it."""
        number = int(job.id[-4:], 16) % scripts.LEDGER_PAGES
        page = keys.ledger_page(self.version_id, number)
        assert await self.client.hexists(page, uuid.UUID(job.id).bytes)
        return page

    async def paged(self, jobs: Sequence[Job]) -> Job:
        here = await self.client.hkeys(keys.ledger(self.version_id))
        return next(job for job in jobs if uuid.UUID(job.id).bytes not in here)


@pytest.fixture
async def site(redis_server: Redis) -> AsyncIterator[Site]:
    async with open_store(redis_server.url, SETTINGS) as store, Client.from_url(redis_server.url) as client:
        yield Site(store, client, uuid.uuid4().hex, str(uuid.uuid4()), str(uuid.uuid4()))


async def test_a_ledger_of_many_counts_each_once_and_is_gone_with_the_last(site: Site) -> None:
    jobs = await site.fill()
    for whose in (site.version_id, site.account):
        assert await site.sums(whose) == (MANY, 10 * MANY)
    again = await site.paged(jobs)
    await site.submit(again.id)
    assert await site.sums(site.version_id) == (MANY, 10 * MANY)
    with pytest.raises(QueueFull):
        await site.submit()
    await site.store.results.cancel(again.id, reason="")
    await site.store.results.cancel(again.id, reason="")
    for whose in (site.version_id, site.account):
        assert await site.sums(whose) == (MANY - 1, 10 * (MANY - 1))
    await site.submit()
    await asyncio.gather(*(site.store.results.cancel(job.id, reason="") for job in reversed(jobs)))
    assert await site.sums(site.account) == (1, 10)
    [last] = (await site.store.results.page(site.account, RequestFilter(states=frozenset({S.QUEUED})), limit=5)).records
    await site.store.results.cancel(last.id, reason="")
    assert await site.ledgers() == []


async def test_requests_without_a_body_hold_their_ledgers_until_the_last_has_left(site: Site) -> None:
    first, second = [
        await site.store.results.create(site.draft(size_bytes=0), queue_limit=10_000, watch=False) for _ in range(2)
    ]
    await site.store.results.cancel(first.id, reason="")
    for whose in (site.version_id, site.account):
        assert await site.sums(whose) == (1, 0)
    await site.store.results.cancel(second.id, reason="")
    assert await site.ledgers() == []


async def test_the_last_to_leave_takes_a_damaged_sum_along(site: Site) -> None:
    job = await site.submit()
    for whose in (site.version_id, site.account):
        await site.client.hincrby(keys.ledger(whose), "*", 1000)
    await site.store.results.cancel(job.id, reason="")
    assert await site.ledgers() == []


async def test_an_account_is_full_at_its_limit_whatever_version_has_its_requests(site: Site) -> None:
    await site.fill()
    other = Site(site.store, site.client, site.account, site.function_id, str(uuid.uuid4()))
    with pytest.raises(AccountFull):
        await other.submit()


async def test_pages_of_an_account_live_no_shorter_than_its_requests(site: Site) -> None:
    await site.fill()
    pages = [key for key in await site.ledgers() if key.startswith(f"{keys.ledger(site.account)}:")]
    assert pages
    for page in pages:
        assert await site.client.pttl(page) > 600_000


async def test_what_waits_is_packed_by_redis(site: Site) -> None:
    """Anything that is not takes two to three times the memory."""
    jobs = await site.fill()
    kept = [keys.record(jobs[0].id), await site.page_of(await site.paged(jobs)), keys.ledger(site.account)]
    for key in kept:
        assert await site.client.object("encoding", key) == b"listpack"
    assert set(await site.client.hkeys(keys.record(jobs[0].id))) == {b"s", b"a", b"f", b"v", b"c", b"d", b"o"}
    assert await site.client.hmget(keys.record(jobs[0].id), ["f", "v"]) == [
        uuid.UUID(site.function_id).bytes,
        uuid.UUID(site.version_id).bytes,
    ]


async def test_what_a_crash_left_on_a_page_is_found_by_the_sweep(site: Site) -> None:
    jobs = await site.fill()
    lost = await site.paged(jobs)
    await site.client.delete(keys.record(lost.id))
    await site.client.zrem(keys.waiting(site.version_id), lost.id)
    swept = 0
    for _ in range(3 * scripts.LEDGER_PAGES // 256):  # once around, whatever the last one stopped at
        swept += await site.store.results.sweep(site.version_id, limit=100)
    assert swept == 1
    for whose in (site.version_id, site.account):
        assert await site.sums(whose) == (MANY - 1, 10 * (MANY - 1))


async def test_a_sidecars_user_takes_what_it_settles_off_its_pages(site: Site, redis_server: Redis) -> None:
    job = await site.paged(await site.fill())
    settings = SidecarSettings.model_construct(**SETTINGS.model_dump())
    async with open_store(redis_server.url_for("sidecar", 0), settings) as sidecar:
        claim = await sidecar.results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claim.lease is not None
        assert await sidecar.results.settle(claim.lease, job, S.FULFILLED, DONE) is S.FULFILLED
    for whose in (site.version_id, site.account):
        assert await site.sums(whose) == (MANY - 1, 10 * (MANY - 1))


async def test_a_page_that_is_no_hash_is_put_right_with_the_sums(site: Site) -> None:
    jobs = await site.fill()
    damaged = await site.paged(jobs)
    page = await site.page_of(damaged)
    held = int(await site.client.hlen(page))
    await site.client.set(page, "x")
    assert await site.store.results.cancel(damaged.id, reason="") is S.QUEUED
    assert await site.sums(site.version_id) == (MANY - held, 10 * (MANY - held))
    assert await site.sums(site.account) == (MANY - 1, 10 * (MANY - 1))


async def test_pages_whose_ledger_is_lost_count_for_nothing(site: Site) -> None:
    jobs = await site.fill()
    await site.client.delete(keys.ledger(site.version_id))
    await asyncio.gather(*(site.store.results.cancel(job.id, reason="") for job in jobs))
    assert await site.sums(site.version_id) == (0, 0)
    await asyncio.gather(*(site.submit() for _ in range(3)))
    assert await site.sums(site.version_id) == (3, 30)


async def older(site: Site, job: Job) -> None:
    """Its record as releases that had text in every field left it."""
    key = keys.record(job.id)
    fields = {"f": site.function_id, "v": site.version_id, "p": "1", "h": ""}
    if not await site.client.hexists(key, "n"):
        fields["n"] = "0"
    await site.client.hset(key, mapping=fields)  # type: ignore[arg-type]  # text will do


async def test_what_an_older_release_accepted_is_read_found_and_run(site: Site) -> None:
    results = site.store.results
    job = await site.submit()
    await older(site, job)
    for record in (await results.read(job.id), (await results.page(site.account, RequestFilter(), limit=5)).records[0]):
        assert record is not None
        assert (record.function_id, record.version_id, record.attempt) == (site.function_id, site.version_id, 0)
    assert (await site.submit(job.id)).version_id == site.version_id
    claim = await results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert claim.verdict is Verdict.GRANTED
    assert claim.lease is not None
    assert await results.settle(claim.lease, job, S.FULFILLED, DONE) is S.FULFILLED
    ended = await results.read(job.id)
    assert ended is not None
    assert (ended.function_id, ended.version_id, ended.attempt) == (site.function_id, site.version_id, 1)


async def test_what_an_older_release_set_aside_takes_its_place_again(site: Site) -> None:
    job = await site.submit()
    await older(site, job)
    assert await site.store.upkeep.set_aside(site.version_id, older_than_s=-1, limit=5) == 1
    await site.submit(job.id)
    assert await site.client.zscore(keys.waiting(site.version_id), job.id) is not None
    assert (await site.sums(site.version_id))[0] == 1


@pytest.mark.parametrize("is_older", [True, False])
async def test_a_letter_tells_whose_it_is_however_its_record_has_it(site: Site, is_older: bool) -> None:
    job = await site.submit()
    if is_older:
        await older(site, job)
    await site.store.results.end(job, S.DEAD, reason="x", cause="attempts-exhausted")
    assert await site.store.dead_letters.keep(job, size_bytes=10)
    letters = (await site.store.dead_letters.page(site.account, DeadLetterFilter(), limit=5)).letters
    assert [(letter.function_id, letter.version_id, letter.attempts) for letter in letters] == [
        (site.function_id, site.version_id, 0)
    ]


@pytest.mark.parametrize(
    "known_id",
    ["f", "0123456789abcdefg", "3edd25a4-34cd-411a-b1a4-642f0bc342c1", "E074157F-6383-4BA3-A051-23C97D92BE46", ""],
)
def test_any_id_comes_back_as_it_was(known_id: str) -> None:
    kept = keys.packed(known_id)
    assert keys.unpacked(kept if isinstance(kept, bytes) else kept.encode()) == known_id
