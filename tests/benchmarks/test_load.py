"""A load generator that finds no faults must be able to find some."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

from benchmarks.load import Accepted, Burst, Kind, echoed, message, play

REQUEST_ID = "5b0c8b33-0f4e-4a57-9d0e-5f3f8a1c2d3e"

Answers = Callable[[bytes], Iterable[bytes]]


async def test_every_exchange_is_answered_and_timed() -> None:
    async with server(echo) as port:
        tally = await play(burst(port, requests=20))
    assert (tally.completed, tally.errors, tally.polls) == (20, {}, 0)
    assert 0 < tally.percentile_ms(50) <= tally.percentile_ms(99)


async def test_paths_are_asked_in_turn() -> None:
    asked: list[bytes] = []

    def echo_of(request: bytes) -> Iterable[bytes]:
        asked.append(request.split(b" ", 2)[1])
        return echo(request)

    async with server(echo_of) as port:
        await play(replace(burst(port, requests=5, concurrency=1), path="/a", more_paths=("/b",)))
    assert asked == [b"/a", b"/b", b"/a", b"/b", b"/a"]


async def test_an_answer_in_pieces_is_one_answer() -> None:
    async with server(lambda request: [bytes([byte]) for byte in b"".join(echo(request))]) as port:
        tally = await play(burst(port, requests=3, body_bytes=64))
    assert (tally.completed, tally.errors) == (3, {})


async def test_an_answer_to_another_request_is_an_error() -> None:
    async with server(lambda _: [ok(echoed(1024) % 999)]) as port:
        tally = await play(burst(port, requests=4))
    assert (tally.completed, tally.errors) == (0, {"wrong body": 4})


async def test_a_refusal_is_an_error_told_with_its_body() -> None:
    async with server(lambda _: [answer(503, b"no room")]) as port:
        tally = await play(burst(port, requests=1))
    assert tally.errors == {"status 503": 1}
    assert tally.examples == ["status 503: no room"]


async def test_a_lost_connection_is_an_error_and_ends_its_caller() -> None:
    async with server(lambda _: []) as port:
        tally = await play(burst(port, concurrency=1))
    assert tally.errors == {"connection closed by the server": 1}


async def test_silence_is_an_error_once_the_grace_is_over() -> None:
    async with server(lambda _: [b"HTTP/1.1 200 OK\r\n"]) as port:
        tally = await play(burst(port, seconds=0.1, grace_s=0.1))
    assert tally.errors == {"no answer within 0.1 s": 2}
    assert tally.elapsed_s < 5


async def test_a_202_is_polled_and_stays_one_exchange() -> None:
    def slow(request: bytes) -> list[bytes]:
        if request.startswith(b"POST"):
            return [accepted()]
        assert request.startswith(b"GET /status/" + REQUEST_ID.encode())
        return [accepted()] if next(polls) < 3 else [ok(echoed(1024) % 7)]

    polls = itertools.count(1)
    async with server(slow) as port:
        tally = await play(burst(port, requests=1, first_serial=7, concurrency=1))
    assert (tally.completed, tally.polls, tally.errors) == (1, 3, {})


async def test_what_was_accepted_is_kept_with_its_serial_number() -> None:
    async with server(lambda _: [accepted()]) as port:
        tally = await play(burst(port, kind=Kind.SUBMIT, requests=1, first_serial=7))
    assert tally.accepted == [Accepted(id=REQUEST_ID, serial=7)]


async def test_an_accepted_request_without_a_result_is_missing() -> None:
    kept = (Accepted(id=REQUEST_ID, serial=7), Accepted(id="forgotten", serial=8))

    def forgetful(request: bytes) -> list[bytes]:
        return [answer(404, b"")] if b"forgotten" in request else [ok(echoed(1024) % 7)]

    async with server(forgetful) as port:
        tally = await play(burst(port, kind=Kind.COLLECT, accepted=kept))
    assert (tally.completed, tally.missing, tally.errors) == (1, 1, {"status 404": 1})


def test_a_request_is_json_of_the_size_that_was_asked_for() -> None:
    body = message(64) % 12
    assert len(body) == 64
    assert json.loads(body)["message"].startswith("000000000012")


def burst(port: int, **changes: object) -> Burst:
    usual = Burst(
        kind=Kind.INVOKE, port=port, concurrency=2, seconds=5, grace_s=5, path="/echo", status_path="/status/"
    )
    return replace(usual, **changes)  # type: ignore[arg-type]  # fields of Burst, by name


def echo(request: bytes) -> list[bytes]:
    return [ok(request.partition(b"\r\n\r\n")[2].replace(b"message", b"echo", 1))]


def ok(body: bytes) -> bytes:
    return answer(200, body)


def accepted() -> bytes:
    return answer(202, b"", f"NVCF-REQID: {REQUEST_ID}\r\n")


def answer(status: int, body: bytes, fields: str = "") -> bytes:
    return f"HTTP/1.1 {status} Whatever\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def server(answers: Answers) -> AsyncIterator[int]:
    """Sends what `answers` says to each request; closes the connection when that is nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                parts = list(answers(head + await reader.readexactly(int(length or 0))))
                if not parts:
                    return
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield int(listening.sockets[0].getsockname()[1])
