"""Many inputs at once, with a bound on how many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fnqueue.errors import FnqueueError
from fnqueue.results import Result

V = TypeVar("V")

# What may go wrong with one input and leaves the others alone: an answer, a file, a value that is no JSON.
FAULTS = (FnqueueError, OSError, TypeError, ValueError)
# Results that may wait for an earlier one in a map that keeps the order, per input that runs.
AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped(Generic[V]):
    """What became of one input of a map: a result, or an error."""

    index: int
    value: V = field(repr=False)
    result: Result | None = None
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def get(self) -> Result:
        """Raises the error, if it is one."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class Order(Generic[V]):
    """Which results may be given, and whether one more input may be taken: at most `concurrency` run, and no more than
    AHEAD times as many are held. Pure."""

    def __init__(self, *, concurrency: int, ordered: bool) -> None:
        self._concurrency = concurrency
        self._ordered = ordered
        self._next = 0
        self._waiting: dict[int, Mapped[V]] = {}
        self.running = 0
        self.taken = 0

    @property
    def room(self) -> bool:
        return self.running < self._concurrency and self.running + len(self._waiting) < AHEAD * self._concurrency

    def take(self) -> int:
        """The index of one more input, which now runs."""
        self.running += 1
        self.taken += 1
        return self.taken - 1

    def ended(self, one: Mapped[V]) -> None:
        self.running -= 1
        self._waiting[one.index] = one

    def ready(self) -> Mapped[V] | None:
        """The next result to give; None while it is not there."""
        at = self._next if self._ordered else next(iter(self._waiting), -1)
        one = self._waiting.pop(at, None)
        if one is not None:
            self._next += 1
        return one


async def one(index: int, value: V, work: Callable[[V], Awaitable[Result]]) -> Mapped[V]:
    try:
        return Mapped(index=index, value=value, result=await work(value))
    except FAULTS as exc:
        return Mapped(index=index, value=value, error=exc)


async def mapped(
    values: Iterable[V] | AsyncIterable[V], work: Callable[[V], Awaitable[Result]], order: Order[V]
) -> AsyncGenerator[Mapped[V], None]:
    """Results as `order` gives them. Closing it early cancels what runs, and waits for that."""
    source, exhausted = _each(values), False
    taking: asyncio.Task[V | _End] | None = None
    running: set[asyncio.Task[Mapped[V]]] = set()
    try:
        while True:
            if taking is None and not exhausted and order.room:
                taking = asyncio.create_task(_next(source))
            if taking is None and not running:
                return
            waited = {*running, *([taking] if taking else [])}
            done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if taking in done:
                value = taking.result()
                taking = None
                exhausted = isinstance(value, _End)
                if not isinstance(value, _End):
                    running.add(asyncio.create_task(one(order.take(), value, work)))
            for task in running & done:
                running.remove(task)
                order.ended(task.result())
            while (found := order.ready()) is not None:
                yield found
    finally:
        await ended([*running, *([taking] if taking else [])])


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel them, and wait until they have ended."""
    cancelled = [task for task in tasks if task.cancel()]
    await asyncio.gather(*cancelled, return_exceptions=True)


class _End:
    """There are no more values."""


async def _next(source: AsyncIterator[V]) -> V | _End:
    return await anext(source, _End())


async def _each(values: Iterable[V] | AsyncIterable[V]) -> AsyncIterator[V]:
    if isinstance(values, AsyncIterable):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value
