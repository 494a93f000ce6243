"""The load generator: a closed loop of callers over keep-alive connections, in a process of its own.

A caller sends one exchange, waits for the end of its answer, checks it, and only then sends the next. Every
request holds a serial number that its answer must hold too, so an answer that reaches the wrong caller, or an
old one, counts as an error. Loopback only; bounded in count and in time.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import multiprocessing
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, cast

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

LOOPBACK = "127.0.0.1"
SERIAL_DIGITS = 12
CONNECT_S = 10.0
EXAMPLES = 5  # errors told in full
EXAMPLE_BYTES = 300
REPLY_S = 30.0  # for the other process to answer, beyond the time that the burst may take


class LoadFailed(Exception):
    """A burst could not be sent at all; the message says why."""


class Kind(StrEnum):
    """What one exchange is, and when it is over."""

    INVOKE = "invoke"  # POST; each 202 is followed by a poll until the result is there
    SUBMIT = "submit"  # POST; the 202 is the answer
    COLLECT = "collect"  # GET an accepted request until its result is there; each of `accepted` once
    STATUS = "status"  # GET a finished request; those of `accepted` over and over


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A request that was answered 202."""

    id: str
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What to send. `headers` go with every request; `first_serial` and those that follow are used once. `more_paths`
    are asked in turn with `path`."""

    kind: Kind
    port: int
    concurrency: int
    seconds: float
    grace_s: float = 30.0
    requests: int = 1_000_000
    first_serial: int = 0
    body_bytes: int = 1024
    path: str = "/"
    more_paths: tuple[str, ...] = ()
    status_path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    accepted: tuple[Accepted, ...] = ()


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came back. `latencies_s` has one entry per completed exchange, its polls included; `missing` counts
    accepted requests that were asked for and never came to an end."""

    elapsed_s: float = 0.0
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    polls: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    accepted: list[Accepted] = field(default_factory=list)
    missing: int = 0

    @property
    def completed(self) -> int:
        return len(self.latencies_s)

    @property
    def per_second(self) -> float:
        return self.completed / self.elapsed_s if self.elapsed_s else 0.0

    def percentile_ms(self, percent: float) -> float:
        """By nearest rank; 0 when nothing was completed."""
        if not self.latencies_s:
            return 0.0
        rank = math.ceil(percent / 100 * len(self.latencies_s)) - 1
        return sorted(self.latencies_s)[max(0, rank)] * 1000

    def fault(self, name: str, detail: str = "") -> None:
        self.errors[name] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{name}: {detail}" if detail else name)


class Send(Protocol):
    def __call__(self, burst: Burst) -> Tally: ...


@contextmanager
def generator() -> Iterator[Send]:
    """A process that runs bursts, one at a time, until the block ends."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:

        def send(burst: Burst) -> Tally:
            limit_s = CONNECT_S + burst.seconds + burst.grace_s + REPLY_S
            try:
                return pool.apply_async(run, (burst,)).get(limit_s)
            except multiprocessing.TimeoutError as exc:
                raise LoadFailed(f"the load generator's process did not answer within {limit_s:g} s") from exc
            except OSError as exc:
                raise LoadFailed(f"{burst.concurrency} connections could not be opened: {exc!r}") from exc

        yield send


def run(burst: Burst) -> Tally:
    """Run one burst in this process."""
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(play(burst))
    finally:
        gc.enable()


async def play(burst: Burst) -> Tally:
    """Run one burst on this event loop."""
    tally = Tally()
    shift = _Shift(burst, tally)
    loop = asyncio.get_running_loop()
    callers = []
    try:
        async with asyncio.timeout(CONNECT_S):
            for _ in range(burst.concurrency):
                _, caller = await loop.create_connection(lambda: Caller(shift), LOOPBACK, burst.port)
                callers.append(caller)
        await shift.work(callers)
    finally:
        for caller in callers:
            caller.leave()
    return tally


@dataclass(slots=True, kw_only=True)
class Exchange:
    request: bytes
    serial: int
    began_at: float = 0.0


class _Shift:
    """What all callers of a burst share: the exchanges still to be made, the time, and the tally."""

    def __init__(self, burst: Burst, tally: Tally) -> None:
        self.burst = burst
        self.tally = tally
        self.exchanges = itertools.islice(_exchanges(burst), burst.requests)
        self.follows = burst.kind in (Kind.INVOKE, Kind.COLLECT)
        self._echoed = echoed(burst.body_bytes)
        self._ends_at = 0.0
        self._busy = 0
        self._over = asyncio.get_running_loop().create_future()

    async def work(self, callers: list[Caller]) -> None:
        """Until every caller has stopped, or what is outstanding has had its grace."""
        began_at = time.perf_counter()
        self._ends_at = began_at + self.burst.seconds
        self._busy = len(callers)
        for caller in callers:
            caller.proceed()
        try:
            async with asyncio.timeout(self.burst.seconds + self.burst.grace_s):
                await self._over
        except TimeoutError:
            for caller in callers:
                caller.give_up(f"no answer within {self.burst.grace_s:g} s")
        self.tally.elapsed_s = time.perf_counter() - began_at
        if self.burst.kind is Kind.COLLECT:
            self.tally.missing = len(self.burst.accepted) - self.tally.completed

    def next(self) -> Exchange | None:
        """None when the time is over or everything was asked."""
        return next(self.exchanges, None) if time.perf_counter() < self._ends_at else None

    def stopped(self) -> None:
        self._busy -= 1
        if not self._busy and not self._over.done():
            self._over.set_result(None)

    def check(self, exchange: Exchange, answer: Answer) -> None:
        """Count the end of an exchange."""
        wanted = 202 if self.burst.kind is Kind.SUBMIT else 200
        if answer.status != wanted:
            self.tally.fault(f"status {answer.status}", answer.text())
        elif wanted == 202:
            self._keep(exchange, answer)
        elif answer.body != self._echoed % exchange.serial:
            self.tally.fault("wrong body", answer.text())
        else:
            self.tally.latencies_s.append(time.perf_counter() - exchange.began_at)

    def _keep(self, exchange: Exchange, answer: Answer) -> None:
        request_id = answer.header(b"nvcf-reqid")
        if request_id:
            self.tally.latencies_s.append(time.perf_counter() - exchange.began_at)
            self.tally.accepted.append(Accepted(id=request_id, serial=exchange.serial))
        else:
            self.tally.fault("no NVCF-REQID", answer.text())


class Caller(asyncio.Protocol):
    """One keep-alive connection with one exchange at a time."""

    def __init__(self, shift: _Shift) -> None:
        self._shift = shift
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parts: list[bytes] = []  # of an answer whose end has not come yet
        self._missing = 0
        self._leaving = False

    def proceed(self) -> None:
        """Send the next exchange, or stop."""
        self._exchange = self._shift.next()
        if self._exchange is None:
            self.leave()
            self._shift.stopped()
            return
        self._exchange.began_at = time.perf_counter()
        self._send(self._exchange.request)

    def give_up(self, why: str) -> None:
        """Count the exchange that is under way, if any, as failed."""
        if self._exchange is not None:
            self._shift.tally.fault(why)
            self._exchange = None
            self.leave()
            self._shift.stopped()

    def leave(self) -> None:
        self._leaving = True
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._leaving:
            self.give_up(f"connection lost ({type(exc).__name__})" if exc else "connection closed by the server")

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._parts)
            self._parts.clear()
            self._missing = 0
        try:
            answer = Answer.parse(data)
        except ValueError as exc:
            self.give_up(str(exc))
            return
        if isinstance(answer, int):
            self._parts.append(data)
            self._missing = answer
        else:
            self._answered(answer)

    def _answered(self, answer: Answer) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if answer.status == 202 and self._shift.follows:
            self._poll(exchange, answer)
            return
        self._shift.check(exchange, answer)
        self.proceed()

    def _poll(self, exchange: Exchange, answer: Answer) -> None:
        """Ask again about the same request: it stays one exchange."""
        request_id = answer.header(b"nvcf-reqid")
        if not request_id:
            self.give_up("no NVCF-REQID")
            return
        self._shift.tally.polls += 1
        exchange.request = get(self._shift.burst, request_id)
        self._send(exchange.request)

    def _send(self, request: bytes) -> None:
        assert self._transport is not None
        self._transport.write(request)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    @classmethod
    def parse(cls, received: bytes) -> Answer | int:
        """The answer, or how many bytes it lacks at least. Raises ValueError: not what a server here sends."""
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return 1
        head = received[: end + 2]
        if not head.startswith(b"HTTP/1.1 "):
            raise ValueError(f"not HTTP/1.1: {head[:40]!r}")
        length = _header(head, b"content-length")
        if not length.isdigit():
            raise ValueError(f"no Content-Length: {head[:EXAMPLE_BYTES]!r}")
        missing = end + 4 + int(length) - len(received)
        return missing if missing > 0 else cls(int(head[9:12]), head, received[end + 4 :])

    def header(self, name: bytes) -> str:
        """Its value, "" if there is none; `name` in lower case."""
        return _header(self.head, name).decode("latin-1")

    def text(self) -> str:
        return self.body[:EXAMPLE_BYTES].decode(errors="replace")


def _header(head: bytes, name: bytes) -> bytes:
    at = head.lower().find(b"\r\n" + name + b":")
    if at < 0:
        return b""
    at += len(name) + 3
    return head[at : head.index(b"\r\n", at)].strip()


def _exchanges(burst: Burst) -> Iterator[Exchange]:
    match burst.kind:
        case Kind.INVOKE | Kind.SUBMIT:
            return _posts(burst)
        case Kind.COLLECT:
            return _gets(burst, burst.accepted)
        case Kind.STATUS:
            return _gets(burst, itertools.cycle(burst.accepted))


def _posts(burst: Burst) -> Iterator[Exchange]:
    fields = f"Content-Type: application/json\r\nContent-Length: {burst.body_bytes}\r\n"
    heads = [_head(burst, "POST", path, fields) for path in (burst.path, *burst.more_paths)]
    requests = [head.replace(b"%", b"%%") + message(burst.body_bytes) for head in heads]
    for serial, request in zip(itertools.count(burst.first_serial), itertools.cycle(requests), strict=False):
        yield Exchange(request=request % serial, serial=serial)


def _gets(burst: Burst, accepted: Iterator[Accepted] | tuple[Accepted, ...]) -> Iterator[Exchange]:
    for one in accepted:
        yield Exchange(request=get(burst, one.id), serial=one.serial)


def get(burst: Burst, request_id: str) -> bytes:
    return _head(burst, "GET", f"{burst.status_path}{request_id}", "")


def _head(burst: Burst, method: str, path: str, more: str) -> bytes:
    fields = "".join(f"{name}: {value}\r\n" for name, value in burst.headers)
    return f"{method} {path} HTTP/1.1\r\nHost: {LOOPBACK}:{burst.port}\r\n{fields}{more}\r\n".encode()


def message(body_bytes: int) -> bytes:
    """A request's JSON body of `body_bytes`, with a place for the serial number.

    Raises ValueError when it cannot be as short as that.
    """
    before, place, end = b'{"message":"', b"%%0%dd" % SERIAL_DIGITS, b'"}'
    padding_bytes = body_bytes - len(before) - SERIAL_DIGITS - len(end)
    if padding_bytes < 0:
        raise ValueError(f"a body takes {body_bytes - padding_bytes} bytes at least")
    return before + place + b"." * padding_bytes + end


def echoed(body_bytes: int) -> bytes:
    """What the echo function answers, with a place for the serial number."""
    return message(body_bytes).replace(b"message", b"echo", 1)
