"""Sends webhooks: every controller takes those that are due, one loan each, and notes what came of them.

A loan that is not ended lapses, and somebody else sends the message, perhaps once more, under the same ID: so a
controller may die at any time. No receiver can keep others waiting: to each host a few are sent at once, for each
account a part of all, and what finds no room is put back for a while.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial

from broker import webhooks
from broker.egress import Egress, host_of
from broker.errors import ConfigurationError, RecordDamaged, StoreUnavailable
from broker.model import DeliveryState, WebhookBacklog, WebhookDelivery, WebhookLoan, WebhookTry
from broker.ports import Broker
from broker.settings import ControllerSettings
from broker.telemetry.metrics import (
    WEBHOOK_DELIVERY,
    WEBHOOK_TRIES,
    WEBHOOKS,
    WEBHOOKS_DUE,
    WEBHOOKS_LATE,
    Reading,
)
from broker.webhooks import Answer
from workers.controller.receivers import open_receivers
from workers.loops import Fault, every, guard, insist

logger = logging.getLogger(__name__)

POLL_S = 1.0
# How often is looked at what is due, and for how long that is shown.
LOOK_S = 5.0
BLIND_S = 15.0
# How long a loan lasts behind the try itself, to note what came of that.
NOTE_S = 10.0
_MOST_AT_ONCE = 256
PER_HOST = 4
# Of a host that has failed so often in a row, one at a time is sent.
SILENT_AFTER = 3
_MOST_HOSTS = 10_000
# How long one is put back that finds no room.
_BUSY_S = (1.0, 3.0)
_SILENT_S = (30.0, 60.0)


Post = Callable[[str, Mapping[str, str], bytes], Awaitable[Answer]]
"""As `Receivers.post`."""


async def serve(broker: Broker, settings: ControllerSettings) -> None:
    """Send webhooks until cancelled. Raises ConfigurationError: where they may go cannot be read."""
    egress = Egress.of(settings)
    async with (
        open_receivers(egress, timeout_s=settings.webhook_timeout_s, calls=settings.webhook_calls) as receivers,
        asyncio.TaskGroup() as group,
    ):
        notifier = Notifier(broker, settings, receivers.post, group)
        with broker.metrics.reading(notifier.read):
            group.create_task(every(LOOK_S, notifier.look, name="webhooks_backlog"))
            await every(POLL_S, notifier.step, name="webhooks")


class Notifier:
    """`step` sends all that is due; what it began ends in `group`. `now` is the time in unix seconds."""

    def __init__(
        self,
        broker: Broker,
        settings: ControllerSettings,
        post: Post,
        group: asyncio.TaskGroup,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._post = post
        self._group = group
        self._now = now
        self._lease_s = settings.webhook_timeout_s + NOTE_S
        self._calls = 0
        self._hosts: Counter[str] = Counter()
        self._accounts: Counter[str] = Counter()
        self._failures: dict[str, int] = {}
        self._freed = asyncio.Event()
        self._backlog: WebhookBacklog | None = None
        self._looked_at = 0.0

    async def step(self) -> None:
        """Raises StoreUnavailable."""
        more = True
        while more:
            while (room := self._settings.webhook_calls - self._calls) <= 0:
                self._freed.clear()
                await self._freed.wait()
            loans, more = await self._broker.webhooks.take(limit=min(room, _MOST_AT_ONCE), lease_s=self._lease_s)
            for loan in loans:
                if (wait_s := self._full(loan)) is not None:
                    await self._broker.webhooks.put_back(loan, wait_s=wait_s)
                else:
                    self._begin(loan)

    async def look(self) -> None:
        """See what is due. Raises StoreUnavailable."""
        self._backlog = await self._broker.webhooks.backlog()
        self._looked_at = self._now()

    def read(self) -> Iterator[Reading]:
        """What the last look saw, while that is still so."""
        if self._backlog is not None and self._now() - self._looked_at < BLIND_S:
            yield Reading(WEBHOOKS_DUE, self._backlog.count)
            yield Reading(WEBHOOKS_LATE, self._backlog.late_s)

    def _full(self, loan: WebhookLoan) -> float | None:
        """For how long a delivery has to wait for others, None if it need not."""
        host = host_of(loan.delivery.callback.url)
        silent = self._failures.get(host, 0) >= SILENT_AFTER
        if self._hosts[host] >= (1 if silent else PER_HOST):
            return random.uniform(*(_SILENT_S if silent else _BUSY_S))  # noqa: S311  spreads load
        if self._accounts[loan.delivery.account] >= self._settings.webhook_calls // 4:
            return random.uniform(*_BUSY_S)  # noqa: S311
        return None

    def _begin(self, loan: WebhookLoan) -> None:
        host, account = host_of(loan.delivery.callback.url), loan.delivery.account
        self._calls += 1
        self._hosts[host] += 1
        self._accounts[account] += 1

        def ended(_: asyncio.Task[None]) -> None:
            self._calls -= 1
            for counter, key in ((self._hosts, host), (self._accounts, account)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
            self._freed.set()

        task = self._group.create_task(self._send(loan, host))
        task.add_done_callback(ended)

    async def _send(self, loan: WebhookLoan, host: str) -> None:
        delivery, began = loan.delivery, time.monotonic()
        # Whatever goes wrong here, the loan lapses, and it is sent again.
        with suppress(StoreUnavailable, TimeoutError, Fault):
            answer = await guard(self._answer(loan), expected=(StoreUnavailable,), request_id=delivery.request_id)
            self._remember(host, answer)
            state, wait_s = webhooks.judge(answer, delivery.series)
            tried = WebhookTry(took_s=time.monotonic() - began, status=answer.status, error=answer.error)
            note = partial(self._broker.webhooks.note, loan, tried, state=state, wait_s=wait_s)
            async with asyncio.timeout(NOTE_S):
                noted = await insist(note, on=StoreUnavailable, name="webhooks")
            self._count(delivery, answer, state if noted else DeliveryState.PENDING)
            if noted and state is not DeliveryState.PENDING:
                event = "webhook_delivered" if state is DeliveryState.DELIVERED else "webhook_failed"
                logger.info(
                    event,
                    extra={
                        "request_id": delivery.request_id,
                        "host": host,
                        "tries": delivery.tried + 1,
                        "status": answer.status,
                        "cause": answer.error,
                    },
                )

    async def _answer(self, loan: WebhookLoan) -> Answer:
        delivery = loan.delivery
        content = webhooks.body(delivery, public_url=self._settings.public_url)
        try:
            keys = await webhooks.signing_keys(self._broker, delivery.account)
        except (ConfigurationError, RecordDamaged) as exc:
            logger.warning("webhook_secret_unreadable", extra={"account": delivery.account, "cause": str(exc)})
            return Answer(error="the account's secrets cannot be opened")
        if not keys:
            return Answer(error="the account has no secret to sign with")
        headers = webhooks.headers(delivery, content, keys, now=self._now(), public_url=self._settings.public_url)
        return await self._post(delivery.callback.url, headers, content)

    def _count(self, delivery: WebhookDelivery, answer: Answer, state: DeliveryState) -> None:
        metrics = self._broker.metrics
        metrics.count(WEBHOOK_TRIES, f"{answer.status // 100}xx" if answer.status else "none")
        if state is not DeliveryState.PENDING:
            metrics.count(WEBHOOKS, delivery.function_id, delivery.version_id, state.value)
        if state is DeliveryState.DELIVERED and delivery.series == delivery.tried:
            metrics.observe(WEBHOOK_DELIVERY, max(0.0, self._now() - delivery.finished_at))

    def _remember(self, host: str, answer: Answer) -> None:
        """Only what says that a host is away: whoever answers is there."""
        if answer.status:
            self._failures.pop(host, None)
            return
        self._failures[host] = self._failures.pop(host, 0) + 1
        if len(self._failures) > _MOST_HOSTS:
            del self._failures[next(iter(self._failures))]
