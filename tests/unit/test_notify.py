"""Webhooks on their way: who sends which of them, when again, and what keeps one receiver from holding up another."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from broker import webhooks
from broker.backends.memory.results import MemoryResults
from broker.backends.memory.webhooks import MemoryWebhooks
from broker.errors import StoreUnavailable
from broker.keyring import Keyring
from broker.model import (
    Callback,
    DeliveryState,
    Draft,
    Principal,
    WebhookDelivery,
    WebhookLoan,
    WebhookTry,
)
from broker.ports import Broker
from broker.settings import ControllerSettings
from broker.telemetry.metrics import Metrics
from broker.webhooks import RETRIES_S, Answer
from tests.eventually import eventually
from tests.receiver import verify
from tests.unit.scrapes import Scrape
from workers.controller import notify
from workers.controller.notify import NOTE_S, PER_HOST, Notifier

T = TypeVar("T")

SETTINGS = ControllerSettings(webhook_calls=32)
LEASE_S = SETTINGS.webhook_timeout_s + NOTE_S
OK = Answer(status=204)
VAIN = Answer(status=500, error="answered 500")


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Posts:
    """Stands for all receivers. Each POST is answered by the next of `answers`, and 204 once there are none left; those
    to hosts in `stuck` wait for `freed`."""

    answers: deque[Answer | Exception] = field(default_factory=deque)
    stuck: set[str] = field(default_factory=set)
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    busy: dict[str, int] = field(default_factory=dict)

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> Answer:
        host = str(urlsplit(url).hostname)
        self.sent.append((url, headers, content))
        self.busy[host] = self.busy.get(host, 0) + 1
        try:
            if host in self.stuck:
                await self.freed.wait()
            answer = self.answers.popleft() if self.answers else OK
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            self.busy[host] -= 1

    def hosts(self) -> list[str]:
        return [str(urlsplit(url).hostname) for url, _, _ in self.sent]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def posts() -> Posts:
    return Posts()


@pytest.fixture
async def broker(memory_broker: Broker, clock: Clock) -> Broker:
    results = MemoryResults(SETTINGS, now=clock)
    made = replace(
        memory_broker,
        results=results,
        webhooks=MemoryWebhooks(results, SETTINGS),
        keyring=Keyring.parse(f"k:{'1a' * 32}"),
    )
    await secret(made, "acme")
    return made


async def secret(broker: Broker, account: str) -> str:
    _, text = await webhooks.create_secret(broker, Principal(account=account, subject="me", scopes=frozenset()))
    return text


async def ended(broker: Broker, *, host: str = "one.example", account: str = "acme") -> str:
    """The ID of a request that has ended, and whose callback is to be told."""
    draft = Draft(
        id=str(uuid.uuid4()),
        account=account,
        function_id="f",
        version_id="v",
        digest="",
        deadline_s=86_400,
        callback=Callback(url=f"https://{host}/hook"),
    )
    await broker.results.create(draft, queue_limit=100_000, watch=False)
    await broker.results.cancel(draft.id, reason="why")
    return draft.id


async def turn(broker: Broker, posts: Posts, clock: Clock) -> None:
    """Send what is due, and wait for all of it."""
    async with asyncio.TaskGroup() as group:
        await Notifier(broker, SETTINGS, posts.post, group, now=clock).step()


class _Group(asyncio.TaskGroup):
    """One whose tasks can be ended as those of a process are that is killed."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: list[asyncio.Task[Any]] = []

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        self._begun.append(task)
        return task

    def kill(self) -> None:
        for task in self._begun:
            task.cancel()


@asynccontextmanager
async def sending(broker: Broker, posts: Posts, clock: Clock) -> AsyncIterator[Notifier]:
    """One whose sending does not have to end."""
    async with _Group() as group:
        yield Notifier(broker, SETTINGS, posts.post, group, now=clock)
        group.kill()


async def found(broker: Broker, request_id: str) -> WebhookDelivery:
    delivery = await broker.webhooks.read(request_id)
    assert delivery is not None
    return delivery


async def test_what_is_due_is_sent_signed_and_noted(broker: Broker, posts: Posts, clock: Clock) -> None:
    text = await secret(broker, "acme")
    request_id = await ended(broker)
    await turn(broker, posts, clock)
    [(url, headers, content)] = posts.sent
    assert url == "https://one.example/hook"
    assert verify(text, headers, content, now=clock.now)["data"]["requestId"] == request_id
    delivery = await found(broker, request_id)
    assert (delivery.state, delivery.tries[0].status) == (DeliveryState.DELIVERED, 204)
    await turn(broker, posts, clock)
    assert len(posts.sent) == 1


async def test_it_is_tried_at_its_times_under_one_id_and_then_given_up(
    broker: Broker, posts: Posts, clock: Clock
) -> None:
    request_id = await ended(broker)
    posts.answers.extend([VAIN] * (len(RETRIES_S) + 1))
    for tries in range(1, len(RETRIES_S) + 1):
        await turn(broker, posts, clock)
        assert len(posts.sent) == tries
        delivery = await found(broker, request_id)
        wait_s = delivery.next_at - clock.now
        assert RETRIES_S[tries - 1] * 0.8 <= wait_s <= RETRIES_S[tries - 1]
        clock.now = delivery.next_at - 0.001
        await turn(broker, posts, clock)
        assert len(posts.sent) == tries
        clock.now = delivery.next_at
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.FAILED
    clock.now += 2 * RETRIES_S[-1]
    await turn(broker, posts, clock)
    assert len(posts.sent) == len(RETRIES_S) + 1
    assert len({headers["webhook-id"] for _, headers, _ in posts.sent}) == 1
    assert len({content for _, _, content in posts.sent}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in posts.sent}) > 2


async def test_who_is_gone_is_left_alone_until_he_is_asked_for_again(
    broker: Broker, posts: Posts, clock: Clock
) -> None:
    request_id = await ended(broker)
    posts.answers.append(Answer(status=410, error="answered 410"))
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.FAILED
    await broker.webhooks.again(request_id)
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.DELIVERED


async def test_one_who_dies_while_he_sends_is_replaced(broker: Broker, posts: Posts, clock: Clock) -> None:
    posts.stuck.add("one.example")
    request_id = await ended(broker)
    async with sending(broker, posts, clock) as dying:
        await dying.step()
        await eventually(lambda: _len(posts.sent), bool)
    posts.stuck.clear()
    await turn(broker, posts, clock)
    assert len(posts.sent) == 1
    clock.now += LEASE_S
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.DELIVERED
    (_, before, _), (_, after, _) = posts.sent
    assert before["webhook-id"] == after["webhook-id"]


async def test_one_who_dies_before_he_sends_is_replaced(broker: Broker, posts: Posts, clock: Clock) -> None:
    request_id = await ended(broker)
    assert len((await broker.webhooks.take(limit=10, lease_s=LEASE_S))[0]) == 1
    await turn(broker, posts, clock)
    assert posts.sent == []
    clock.now += LEASE_S
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.DELIVERED


async def test_a_fault_of_ours_loses_nothing_and_ends_nobody_else(broker: Broker, posts: Posts, clock: Clock) -> None:
    ids = [await ended(broker), await ended(broker, host="two.example")]
    posts.answers.append(RuntimeError("a bug"))
    await turn(broker, posts, clock)
    assert sorted([(await found(broker, each)).state for each in ids]) == ["delivered", "pending"]
    clock.now += LEASE_S
    await turn(broker, posts, clock)
    assert [(await found(broker, each)).state for each in ids] == [DeliveryState.DELIVERED] * 2


async def test_a_receiver_that_never_answers_holds_up_nobody_else(broker: Broker, posts: Posts, clock: Clock) -> None:
    posts.stuck.add("dead.example")
    for _ in range(3 * PER_HOST):
        await ended(broker, host="dead.example")
    alive = await ended(broker, host="alive.example")
    async with sending(broker, posts, clock) as notifier:
        await notifier.step()
        await eventually(lambda: found(broker, alive), lambda delivery: delivery.state is DeliveryState.DELIVERED)
        assert posts.busy["dead.example"] == PER_HOST
        assert posts.hosts().count("dead.example") == PER_HOST


async def test_what_found_no_room_is_sent_later(broker: Broker, posts: Posts, clock: Clock) -> None:
    ids = [await ended(broker) for _ in range(3 * PER_HOST)]

    async def all_delivered() -> bool:
        await turn(broker, posts, clock)
        clock.now += notify._BUSY_S[1]
        return all([(await found(broker, each)).state is DeliveryState.DELIVERED for each in ids])

    await eventually(all_delivered, bool)
    assert len(posts.sent) == len(ids)


async def test_a_host_that_was_silent_is_sent_one_at_a_time(broker: Broker, posts: Posts, clock: Clock) -> None:
    async with sending(broker, posts, clock) as notifier:
        posts.answers.extend([Answer(error="no connection")] * notify.SILENT_AFTER)
        for _ in range(notify.SILENT_AFTER):
            request_id = await ended(broker)
            await notifier.step()
            await eventually(partial(found, broker, request_id), lambda delivery: delivery.tried == 1)
        posts.sent.clear()
        posts.stuck.add("one.example")
        for _ in range(PER_HOST):
            await ended(broker)
        await notifier.step()
        await eventually(lambda: _len(posts.sent), bool)
        assert posts.hosts() == ["one.example"]


async def test_an_account_with_many_dead_receivers_leaves_room_for_others(
    broker: Broker, posts: Posts, clock: Clock
) -> None:
    await secret(broker, "other")
    hosts = [f"dead{number}.example" for number in range(SETTINGS.webhook_calls * 2)]
    posts.stuck.update(hosts)
    for host in hosts:
        await ended(broker, host=host)
    others = await ended(broker, host="alive.example", account="other")
    async with sending(broker, posts, clock) as notifier:
        await notifier.step()
        await eventually(lambda: found(broker, others), lambda delivery: delivery.state is DeliveryState.DELIVERED)
        assert sum(posts.busy.values()) == SETTINGS.webhook_calls // 4


async def test_without_a_secret_nothing_is_sent_and_it_is_tried_again(
    broker: Broker, posts: Posts, clock: Clock
) -> None:
    request_id = await ended(broker, account="none")
    await turn(broker, posts, clock)
    delivery = await found(broker, request_id)
    assert (posts.sent, delivery.state) == ([], DeliveryState.PENDING)
    assert "secret" in delivery.tries[0].error
    await secret(broker, "none")
    clock.now = delivery.next_at
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.DELIVERED


async def test_a_secret_that_does_not_open_is_said_and_nothing_is_sent(
    broker: Broker, posts: Posts, clock: Clock
) -> None:
    request_id = await ended(broker)
    await turn(replace(broker, keyring=Keyring({})), posts, clock)
    delivery = await found(broker, request_id)
    assert (posts.sent, delivery.state) == ([], DeliveryState.PENDING)
    assert "opened" in delivery.tries[0].error


class _Forgetful(MemoryWebhooks):
    """Whose store is away for the first notes."""

    def __init__(self, results: MemoryResults, away: int) -> None:
        super().__init__(results, SETTINGS)
        self.away = away

    async def note(self, loan: WebhookLoan, tried: WebhookTry, *, state: DeliveryState, wait_s: float = 0.0) -> bool:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")
        return await super().note(loan, tried, state=state, wait_s=wait_s)


async def test_what_was_sent_is_noted_once_the_store_is_back(broker: Broker, posts: Posts, clock: Clock) -> None:
    assert isinstance(broker.results, MemoryResults)
    broker = replace(broker, webhooks=_Forgetful(broker.results, away=2))
    request_id = await ended(broker)
    await turn(broker, posts, clock)
    assert (await found(broker, request_id)).state is DeliveryState.DELIVERED
    assert len(posts.sent) == 1


async def _len(sent: list[tuple[str, Mapping[str, str], bytes]]) -> int:
    return len(sent)


async def test_what_is_sent_and_what_became_of_it_is_counted(broker: Broker, posts: Posts, clock: Clock) -> None:
    told = replace(broker, metrics=Metrics())
    kept = await ended(told)
    posts.answers.extend([VAIN, Answer(error="no connection"), OK])
    for wait_s in (0.0, *RETRIES_S[:2]):
        clock.now += wait_s
        await turn(told, posts, clock)
    posts.answers.append(Answer(status=410))
    await ended(told, host="gone.example")
    await turn(told, posts, clock)
    page = Scrape.of(told.metrics.read().text().decode())
    tries = {
        answer: page.value("fnqueue_webhook_tries_total", answer=answer) for answer in ("2xx", "4xx", "5xx", "none")
    }
    assert tries == {"2xx": 1, "4xx": 1, "5xx": 1, "none": 1}
    for state in ("delivered", "failed"):
        assert page.value("fnqueue_webhooks_total", function_version_id="v", state=state) == 1
    assert page.value("fnqueue_webhook_delivery_seconds_sum") == sum(RETRIES_S[:2])
    await told.webhooks.again(kept)
    await turn(told, posts, clock)
    page = Scrape.of(told.metrics.read().text().decode())
    assert page.value("fnqueue_webhook_tries_total", answer="2xx") == 2
    assert page.value("fnqueue_webhook_delivery_seconds_count") == 1


async def test_what_is_due_is_shown_while_it_is_known(broker: Broker, posts: Posts, clock: Clock) -> None:
    for _ in range(3):
        await ended(broker)
    clock.now += 7.0
    async with sending(broker, posts, clock) as notifier:
        assert list(notifier.read()) == []
        await notifier.look()
        assert [reading.value for reading in notifier.read()] == [3, 7.0]
        clock.now += notify.BLIND_S
        assert list(notifier.read()) == []
        await notifier.step()
        await notifier.look()
        assert [reading.value for reading in notifier.read()] == [0, 0.0]
