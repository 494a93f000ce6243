"""Queue in one process. What waits is lost with the process, and the order is the order of publishing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from broker.errors import PublishRejected, QueueMissing
from broker.model import Job
from broker.ports import Delivery

RESIDENCE_S = 60.0  # how long past its deadline a message may stay, as on RabbitMQ
MAX_LENGTH = 125_000  # as in infra/rabbitmq/definitions.json


@dataclass(slots=True, kw_only=True)
class _Message:
    """`number` is its place in the order; `expires_at` is loop time."""

    number: int
    job: Job
    death: str = ""
    expires_at: float = float("inf")


@dataclass(slots=True)
class _Pile:
    """The messages of one queue that wait. The timer is for the one at the head: only there do they expire."""

    waiting: deque[_Message] = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None


class MemoryQueue:
    """A queue that holds `max_length` jobs refuses the next one; those on loan do not count."""

    def __init__(self, *, max_length: int = MAX_LENGTH) -> None:
        self._max_length = max_length
        self._piles: dict[str, _Pile] = {}
        self._dead = _Pile()
        self._count = 0
        self._changed = asyncio.Event()

    async def declare(self, version_id: str) -> None:
        if version_id not in self._piles:
            self._piles[version_id] = _Pile()
            self._changed.set()

    async def delete(self, version_id: str) -> None:
        pile = self._piles.pop(version_id, None)
        if pile is not None and pile.timer is not None:
            pile.timer.cancel()

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        pile = self._piles.get(job.version_id)
        if pile is None:
            raise QueueMissing("the function version has no queue")
        if len(pile.waiting) >= self._max_length:
            raise PublishRejected("the queue takes no more jobs")
        residence_s = max(0.0, job.deadline_at - job.created_at + RESIDENCE_S)
        expires_at = asyncio.get_running_loop().time() + residence_s
        self._put(pile, _Message(number=self._next(), job=job, expires_at=expires_at))

    @asynccontextmanager
    async def consume(self, version_id: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        deliveries = _Deliveries(self, version_id, prefetch)
        try:
            yield deliveries
        finally:
            deliveries.close()

    @asynccontextmanager
    async def dead_letters(self, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        async with self.consume("", prefetch=prefetch) as deliveries:
            yield deliveries

    async def take(self, version_id: str) -> Delivery | None:
        return self.lend(version_id, None)

    async def depth(self, version_id: str) -> int | None:
        pile = self._pile(version_id)
        if pile is None:
            return None
        self._expire(pile)
        return len(pile.waiting)

    async def ping(self) -> None:
        return

    def lend(self, version_id: str, borrower: _Deliveries | None) -> _Loan | None:
        """The message at the head, if there is one; "" is the version of the dead letters."""
        pile = self._pile(version_id)
        if pile is None:
            return None
        self._expire(pile)
        if not pile.waiting:
            return None
        message = pile.waiting.popleft()
        self._arm(pile)
        return _Loan(self, pile, message, borrower)

    def give_back(self, pile: _Pile, message: _Message) -> None:
        """To its old place; nowhere when its queue was deleted."""
        if pile is self._pile(message.job.version_id) or pile is self._dead:
            self._put(pile, message)

    def bury(self, pile: _Pile, message: _Message, death: str) -> None:
        """To the dead letters; away for good when it is there already or its queue was deleted."""
        if pile is not self._dead and pile is self._pile(message.job.version_id):
            self._put(self._dead, _Message(number=self._next(), job=message.job, death=death))

    def notify(self) -> None:
        self._changed.set()

    async def changed(self) -> None:
        """Return when something changed after this call."""
        self._changed.clear()
        await self._changed.wait()

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _pile(self, version_id: str) -> _Pile | None:
        return self._piles.get(version_id) if version_id else self._dead

    def _put(self, pile: _Pile, message: _Message) -> None:
        waiting = pile.waiting
        if not waiting or waiting[-1].number < message.number:
            waiting.append(message)
        else:
            later = next(place for place, other in enumerate(waiting) if other.number > message.number)
            waiting.insert(later, message)
        self._arm(pile)
        self._changed.set()

    def _arm(self, pile: _Pile) -> None:
        if pile is self._dead:
            return
        if pile.timer is not None:
            pile.timer.cancel()
        loop = asyncio.get_running_loop()
        pile.timer = loop.call_at(pile.waiting[0].expires_at, self._expire, pile) if pile.waiting else None

    def _expire(self, pile: _Pile) -> None:
        now = asyncio.get_running_loop().time()
        while pile.waiting and pile.waiting[0].expires_at <= now:
            self.bury(pile, pile.waiting.popleft(), "expired")
            self._arm(pile)


class _Deliveries:
    """Lends one message each time it is asked, while fewer than `prefetch` are out."""

    def __init__(self, queue: MemoryQueue, version_id: str, prefetch: int) -> None:
        self.loans = 0
        self._queue = queue
        self._version_id = version_id
        self._prefetch = prefetch
        self._closed = False

    def __aiter__(self) -> _Deliveries:
        return self

    async def __anext__(self) -> Delivery:
        while not self._closed:
            if self.loans < self._prefetch:
                loan = self._queue.lend(self._version_id, self)
                if loan is not None:
                    self.loans += 1
                    return loan
            await self._queue.changed()
        raise StopAsyncIteration

    def close(self) -> None:
        self._closed = True
        self._queue.notify()


class _Loan:
    """The port's Delivery. Its second verb does nothing."""

    __slots__ = ("_borrower", "_message", "_open", "_pile", "_queue")

    def __init__(self, queue: MemoryQueue, pile: _Pile, message: _Message, borrower: _Deliveries | None) -> None:
        self._queue = queue
        self._pile = pile
        self._message = message
        self._borrower = borrower
        self._open = True

    @property
    def job(self) -> Job:
        return self._message.job

    @property
    def death(self) -> str:
        return self._message.death

    async def ack(self) -> None:
        self._end()

    async def requeue(self) -> None:
        if self._end():
            self._queue.give_back(self._pile, self._message)

    async def reject(self) -> None:
        if self._end():
            self._queue.bury(self._pile, self._message, "rejected")

    def _end(self) -> bool:
        """Whether this is the loan's first verb."""
        first, self._open = self._open, False
        if first and self._borrower is not None:
            self._borrower.loans -= 1
            self._queue.notify()
        return first
