from __future__ import annotations

import asyncio
import gzip
import json
import math
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from broker.model import Job, Outcome, RequestState
from tests.eventually import eventually
from tests.unit.container import Container, a_job, answer, container, keeping, raw_container, settings_for
from workers import connections
from workers.connections import BRIEFLY_S, SHORT_S
from workers.inference import Answer, AttemptFailed, ContainerLost, Inference, RunTimedOut, problem
from workers.inference import Refused as ContainerRefused


class Bench:
    """An Inference before a container, and the place where it spills."""

    def __init__(self, inference: Inference, box: Container, folder: Path) -> None:
        self.inference = inference
        self.box = box
        self.spill = folder / "spill"

    async def infer(
        self,
        job: Job | None = None,
        headers: Iterable[tuple[str, str]] = (),
        *,
        body: bytes | Path = b"{}",
    ) -> Answer:
        return await self.inference.infer(job or a_job(), headers, body=body, spill=lambda: self.spill)

    def answers(self, body: bytes, **given: Any) -> None:
        self.box.handler = lambda _: answer(body, **given)


@asynccontextmanager
async def benched(folder: Path, **given: Any) -> AsyncIterator[Bench]:
    async with container() as box, Inference(settings_for(folder, box.port, **given)) as inference:
        yield Bench(inference, box, folder)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with benched(tmp_path, max_response_bytes=1024, max_artifact_bytes=4 * 1024 * 1024) as made:
        yield made


async def infer_raw(folder: Path, reply: bytes) -> Answer:
    async with raw_container(reply) as port, Inference(settings_for(folder, port)) as inference:
        return await inference.infer(a_job(), (), body=b"{}", spill=lambda: folder / "spill")


async def test_body_and_headers_reach_the_configured_path_unchanged(bench: Bench) -> None:
    await bench.infer(headers=[("X-Mixed-Case", "v"), ("Content-Type", "text/plain")], body=b"\x00\xff")
    assert bench.box.paths == ["/infer"]
    assert bench.box.bodies == [b"\x00\xff"]
    names = [name for name, _ in bench.box.headers[-1]]
    assert sorted(names) == ["Content-Length", "Content-Type", "Host", "X-Mixed-Case"]


@pytest.mark.parametrize(
    ("configured", "sent"),
    [
        ("infer", "/infer"),
        ("", "/"),
        ("//evil.example/x", "/evil.example/x"),
        ("@evil.example:80/x", "/@evil.example:80/x"),
        ("/a%2Fb?model=m", "/a%2Fb?model=m"),
        ("/a/../../b", "/b"),
    ],
)
async def test_no_path_leads_to_another_host(tmp_path: Path, configured: str, sent: str) -> None:
    async with benched(tmp_path, inference_url=configured) as bench:
        await bench.infer()
        assert bench.box.paths == [sent]


async def test_an_empty_body_is_sent_as_one(bench: Bench) -> None:
    await bench.infer(body=b"")
    assert bench.box.bodies == [b""]
    assert bench.box.header("Content-Length") == ["0"]


async def test_a_body_in_a_file_is_streamed_with_its_length(bench: Bench, tmp_path: Path) -> None:
    body = tmp_path / "body.txt"
    body.write_bytes(b"x" * 3_000_000)
    await bench.infer(body=body)
    assert bench.box.bodies == [b"x" * 3_000_000]
    assert bench.box.header("Content-Length") == ["3000000"]
    assert bench.box.header("Content-Type") == []


async def test_status_body_and_headers_come_back(bench: Bench) -> None:
    bench.answers(b"made", status=201, content_type="text/plain", headers={"X-Own": "1"})
    got = await bench.infer()
    assert (got.status, got.body) == (201, b"made")
    assert ("X-Own", "1") in got.headers
    assert ("Content-Type", "text/plain") in got.headers


async def test_the_containers_redirect_is_a_result_without_its_location(bench: Bench) -> None:
    bench.answers(b"", status=302, headers={"Location": "http://169.254.169.254/"})
    got = await bench.infer()
    assert got.status == 302
    assert "location" not in {name.lower() for name, _ in got.headers}
    assert len(bench.box.bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed_from_a_handshake_either(bench: Bench, status: int) -> None:
    async with container() as elsewhere:
        location = f"http://127.0.0.1:{elsewhere.port}/latest/meta-data"
        bench.answers(b"", status=status, headers={"Location": location, "X-Own": "1"})
        with pytest.raises(ContainerRefused) as refused:
            await bench.inference.connect(
                a_job(method="GET", target="/ws", passthrough=True), (), protocols=(), largest_bytes=1024
            )
        assert (elsewhere.paths, len(bench.box.paths)) == ([], 1)
    assert refused.value.status == status
    assert ("Location", location) in refused.value.headers
    assert ("X-Own", "1") in refused.value.headers


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example/x", "/..%2f..%2fx", "/@evil.example/x", "/\\evil.example", "/%5c%5cevil.example", "/../../x",
        "http://evil.example/x", "@evil.example", "evil.example:80", "?x", "", "/.", "/;@evil.example", "/%00", "/a b",
    ],
)  # fmt: skip
async def test_no_target_leads_to_another_host(bench: Bench, target: str) -> None:
    """Nor one that no front end would have let pass."""
    try:
        await bench.infer(a_job(method="GET", target=target, passthrough=True), body=b"")
    except AttemptFailed:
        assert " " in target
    assert len(bench.box.paths) == (" " not in target)


async def test_headers_that_are_not_the_containers_to_set_are_dropped(bench: Bench) -> None:
    forbidden = {
        "Set-Cookie": "a=b",
        "NVCF-REQID": "forged",
        "nvcf_status": "fulfilled",
        "Connection": "close, X-Named",
        "X-Named": "1",
        "Keep-Alive": "timeout=5",
        "Refresh": "0; url=http://evil.example",
        "Access-Control-Allow-Origin": "*",
    }
    bench.answers(b"{}", headers=forbidden | {"X-Own": "1"})
    got = await bench.infer()
    assert sorted(name for name, _ in got.headers) == ["Content-Type", "X-Own"]


async def test_the_containers_hop_by_hop_headers_go_no_further(tmp_path: Path) -> None:
    head = b"Connection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nTrailer: X-T\r\nX-Own: 1\r\nContent-Length: 2"
    found = await infer_raw(tmp_path, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n{}")
    assert found.headers == (("X-Own", "1"),)


@pytest.mark.parametrize(
    ("headers", "fits"),
    [
        ({f"X-{n}": "v" for n in range(63)}, True),
        ({f"X-{n}": "v" for n in range(64)}, False),
        ({f"X-{n}": "v" * 8000 for n in range(51)}, True),
        ({f"X-{n}": "v" * 8000 for n in range(52)}, False),
    ],
    ids=["as many as may", "one too many", "as large as may", "too large"],
)
async def test_an_answer_has_a_bounded_number_of_headers(bench: Bench, headers: dict[str, str], fits: bool) -> None:
    """One more is the content type."""
    bench.answers(b"{}", headers=headers)
    if fits:
        assert len((await bench.infer()).headers) == len(headers) + 1
        return
    with pytest.raises(AttemptFailed) as failed:
        await bench.infer()
    assert failed.value.outcome.status == 500
    assert b"64 headers or 409600 bytes" in failed.value.outcome.body


@pytest.mark.parametrize("bad", [b"X-Bad: \xff\xfe", b"X-Bad: a\x01", b"X-Bad: \x7f", b"Set_Cookie: a", b"nvcf_sub: a"])
async def test_a_header_that_is_not_text_or_not_its_own_is_dropped(tmp_path: Path, bad: bytes) -> None:
    got = await infer_raw(tmp_path, b"HTTP/1.1 200 OK\r\n" + bad + b"\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\nok")
    assert got == Answer(status=200, headers=(("X-Own", "1"),), body=b"ok")


# -- in the container's own name ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PROPFIND", "PUT", "DELETE", "PATCH"])
async def test_any_method_and_target_reach_the_container_as_they_were_sent(tmp_path: Path, method: str) -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    target = "//a/../b%2F%zz/%C3%BC?x=%20+;&&=@"
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Inference(settings_for(tmp_path, port)) as inference:
            job = a_job(method=method, target=target, body=b"", passthrough=True)
            got = await inference.infer(job, (), body=b"", spill=lambda: tmp_path / "spill")
    assert got.status == 204
    assert heads[0].startswith(f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode())
    assert (b"Content-Length" in heads[0]) is (method in ("PROPFIND", "PUT", "DELETE", "PATCH"))


async def test_in_its_own_name_a_container_may_say_more(bench: Bench) -> None:
    bench.answers(
        b"",
        status=302,
        headers=[
            ("Location", "http://elsewhere.example/"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("Refresh", "1"),
            ("Access-Control-Allow-Origin", "*"),
            ("Strict-Transport-Security", "max-age=1"),
            ("NVCF-REQID", "forged"),
            ("Keep-Alive", "timeout=5"),
        ],
    )
    got = await bench.infer(a_job(target="/", passthrough=True))
    assert [pair for pair in got.headers if not pair[0].startswith("Content-")] == [
        ("Location", "http://elsewhere.example/"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
        ("Refresh", "1"),
        ("Access-Control-Allow-Origin", "*"),
    ]


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        ("{origin}/a?b", "/a?b"),
        ("{origin}", "/"),
        ("{origin}?a", "/?a"),
        ("/relative", "/relative"),
        ("{origin}0/a", "{origin}0/a"),
        ("{origin}@elsewhere.example/", "{origin}@elsewhere.example/"),
        # Without the origin, this would lead to another host.
        ("{origin}//elsewhere.example/", "{origin}//elsewhere.example/"),
    ],
)
async def test_a_redirect_to_the_containers_own_address_leads_there_from_outside(
    bench: Bench, said: str, seen: str
) -> None:
    origin = f"http://127.0.0.1:{bench.box.port}"
    bench.answers(b"", status=307, headers={"Location": said.format(origin=origin)})
    got = await bench.infer(a_job(target="/", passthrough=True))
    assert dict(got.headers)["Location"] == seen.format(origin=origin)


@pytest.mark.parametrize(("method", "body"), [("HEAD", b""), ("GET", b"x" * 500)])
async def test_the_length_of_an_answer_is_told_even_where_it_does_not_come(
    bench: Bench, method: str, body: bytes
) -> None:
    bench.answers(b"x" * 500)
    got = await bench.infer(a_job(method=method, target="/", passthrough=True))
    assert (got.body, dict(got.headers)["Content-Length"]) == (body, "500")


async def test_an_encoded_body_passes_untouched(bench: Bench) -> None:
    packed = gzip.compress(b"hello")
    bench.answers(packed, headers={"Content-Encoding": "gzip"})
    got = await bench.infer()
    assert got.body == packed
    assert ("Content-Encoding", "gzip") in got.headers


async def test_a_stated_error_becomes_a_problem(bench: Bench) -> None:
    job = a_job()
    bench.answers(b'{"error": "no such model"}', status=422, headers={"X-Own": "1"})
    got = await bench.infer(job)
    assert got.status == 422
    assert got.headers == (("Content-Type", "application/problem+json"),)
    assert json.loads(got.body) == {
        "type": "urn:inference-service:problem-details:unprocessable-entity",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "no such model",
        "requestId": job.id,
    }


@pytest.mark.parametrize(
    "body", [b"oops", b"", b'{"error": {"code": 1}}', b'{"error": ""}', b"[1]", b"[" * 100_000, b"\xff", b"x" * 5000]
)
async def test_an_error_that_is_not_stated_is_named_so(bench: Bench, body: bytes) -> None:
    bench.answers(body, status=500)
    got = await bench.infer()
    assert json.loads(got.body)["detail"] == "Inference error"
    assert got.spilled is None


async def test_an_unknown_status_has_an_empty_suffix_and_no_title(bench: Bench) -> None:
    bench.answers(b"{}", status=599)
    found = json.loads((await bench.infer()).body)
    assert found["type"] == "urn:inference-service:problem-details:"
    assert "title" not in found


async def test_passthrough_keeps_an_error_as_it_is(bench: Bench) -> None:
    bench.answers(b'{"error": "mine"}', status=418, headers={"X-Own": "1"})
    got = await bench.infer(a_job(passthrough=True))
    assert (got.status, got.body) == (418, b'{"error": "mine"}')
    assert ("X-Own", "1") in got.headers


async def test_a_body_at_the_limit_stays_in_memory_and_one_byte_more_is_spilled(bench: Bench) -> None:
    bench.answers(b"x" * 1024)
    assert (await bench.infer()).body == b"x" * 1024
    bench.answers(b"x" * 1025)
    got = await bench.infer()
    assert (got.body, got.spilled) == (b"", bench.spill)
    assert bench.spill.read_bytes() == b"x" * 1025


async def test_a_body_above_every_limit_is_an_error(bench: Bench) -> None:
    bench.answers(b"x" * (4 * 1024 * 1024 + 1))
    with pytest.raises(AttemptFailed) as failed:
        await bench.infer()
    assert json.loads(failed.value.outcome.body)["detail"] == "The answer is larger than 4194304 bytes"


async def test_a_refused_connection_is_lost_before_it_was_sent(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    async with Inference(settings_for(tmp_path, port)) as inference:
        with pytest.raises(ContainerLost) as lost:
            await inference.infer(a_job(), (), body=b"", spill=lambda: tmp_path / "spill")
    assert not lost.value.sent


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    ],
)
async def test_a_connection_cut_at_any_point_is_lost_after_it_was_sent(tmp_path: Path, reply: bytes) -> None:
    with pytest.raises(ContainerLost) as lost:
        await infer_raw(tmp_path, reply)
    assert lost.value.sent


@pytest.mark.parametrize(
    "reply",
    [
        b"not http at all\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nNo colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    ],
)
async def test_what_is_not_http_is_an_errored_outcome(tmp_path: Path, reply: bytes) -> None:
    with pytest.raises(AttemptFailed) as failed:
        await infer_raw(tmp_path, reply)
    found = json.loads(failed.value.outcome.body)
    assert (found["status"], found["type"], found["detail"]) == (
        500,
        "urn:inference-connection:problem-details:internal-server-error",
        "Inference connection error while making inference request",
    )
    assert failed.value.state is RequestState.ERRORED


async def test_a_broken_chunk_is_an_error_and_no_crash(tmp_path: Path) -> None:
    with pytest.raises((AttemptFailed, ContainerLost)):
        await infer_raw(tmp_path, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n")


async def test_an_answer_that_comes_before_the_body_was_read_counts(bench: Bench) -> None:
    reply = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
    async with raw_container(reply) as port, Inference(settings_for(bench.spill.parent, port)) as inference:
        got = await inference.infer(a_job(), (), body=b"x" * 100_000, spill=lambda: bench.spill)
    assert got.status == 413


async def test_the_budget_ends_a_slow_call_and_the_container_is_told(bench: Bench) -> None:
    bench.box.handler = never
    with pytest.raises(RunTimedOut) as timed_out:
        async with bench.inference.exchange(a_job(), (), body=b"{}", budget_s=0.05):
            pass
    await asyncio.wait_for(bench.box.left.wait(), 20)
    assert timed_out.value.state is RequestState.EXPIRED
    assert timed_out.value.outcome.status == 504


async def test_a_cancelled_call_hangs_up(bench: Bench) -> None:
    bench.box.handler = never
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.infer())
        await bench.box.called.wait()
        task.cancel()
    await asyncio.wait_for(bench.box.left.wait(), 20)


async def test_a_header_with_a_line_break_is_never_sent(bench: Bench) -> None:
    with pytest.raises(AttemptFailed):
        await bench.infer(headers=[("X-Own", "1\r\nNVCF-SUB: forged")])
    assert bench.box.bodies == []


# -- kept connections --------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def once_and_again(inference: Inference, attempt: int = 1) -> bytes:
    return (await inference.infer(a_job(), (), body=b"{}", spill=lambda: Path("unused"), attempt=attempt)).body


async def ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(OK)
    return True


@pytest.mark.parametrize(
    ("settings", "attempts", "opened"),
    [
        ({}, (1, 1, 1), 1),
        ({"keep_connections": "never"}, (1, 1, 1), 3),
        ({"max_attempts": 1}, (1, 1, 1), 3),  # nothing could be tried again
        ({}, (1, 2, 3, 1), 3),
    ],
)
async def test_only_a_first_attempt_goes_over_a_kept_connection(
    tmp_path: Path, settings: dict[str, Any], attempts: tuple[int, ...], opened: int
) -> None:
    async with (
        keeping(ok) as box,
        Inference(settings_for(tmp_path, box.port, **{"keep_connections": "always", **settings})) as inference,
    ):
        for attempt in attempts:
            assert await once_and_again(inference, attempt) == b"ok"
        assert (box.opened, len(box.seen)) == (opened, len(attempts))


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.0 200 OK\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        OK,  # without a word of it
    ],
)
async def test_a_container_may_close_after_each_answer(tmp_path: Path, reply: bytes) -> None:
    async def reply_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(reply)
        return False

    async with (
        keeping(reply_and_close) as box,
        Inference(settings_for(tmp_path, box.port, keep_connections="always")) as inference,
    ):
        for _ in range(20):
            assert await once_and_again(inference) == b"ok"
            await asyncio.sleep(0.002)  # so that it is closed before the next one
        assert (box.opened, len(box.seen)) == (20, 20)


async def test_what_a_container_says_out_of_turn_is_no_answer_to_the_next_job(tmp_path: Path) -> None:
    async def say_more(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        await writer.drain()
        await asyncio.sleep(0.001)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        return True

    async with (
        keeping(say_more) as box,
        Inference(settings_for(tmp_path, box.port, keep_connections="always")) as inference,
    ):
        for _ in range(20):
            assert await once_and_again(inference) == b"ok"
            await asyncio.sleep(0.005)
        assert (box.opened, len(box.seen)) == (20, 20)


async def trusted(inference: Inference) -> None:
    """Once this returns, the container was seen to leave a connection open."""
    await once_and_again(inference)
    await asyncio.sleep(3 * BRIEFLY_S)


async def test_short_jobs_share_a_connection_once_the_container_left_one_open(tmp_path: Path) -> None:
    async with keeping(ok) as box, Inference(settings_for(tmp_path, box.port)) as inference:
        await trusted(inference)
        opened = box.opened
        for _ in range(20):
            assert await once_and_again(inference) == b"ok"
        # More than one only where this machine stood still for as long as a connection is kept.
        assert opened < box.opened < opened + 20


async def test_a_container_that_closes_without_a_word_is_given_fresh_connections(tmp_path: Path) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(OK)
        return False

    async with keeping(close) as box, Inference(settings_for(tmp_path, box.port)) as inference:
        await trusted(inference)
        for _ in range(20):
            assert await once_and_again(inference) == b"ok"
        assert (box.opened, len(box.seen)) == (21, 21)


async def test_the_connection_of_a_long_job_is_not_kept(tmp_path: Path) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(2 * SHORT_S)
        return await ok(reader, writer)

    async with keeping(slow) as box, Inference(settings_for(tmp_path, box.port)) as inference:
        await trusted(inference)
        for _ in range(3):
            assert await once_and_again(inference) == b"ok"
        assert box.opened == 4


async def test_a_connection_that_keeps_nobody_waiting_grows_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "OLD_S", 0.0)
    async with keeping(ok) as box, Inference(settings_for(tmp_path, box.port)) as inference:
        await trusted(inference)
        opened = box.opened
        for _ in range(20):
            assert await once_and_again(inference) == b"ok"
        # More than one only where this machine stood still for as long as a connection is kept.
        assert opened < box.opened < opened + 20
        opened = box.opened
        inference._connections.make_way()
        await once_and_again(inference)
        await once_and_again(inference)
        assert box.opened > opened, "what was old makes way"


async def test_no_job_starves_before_a_container_that_serves_one_connection_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(connections, "OLDEST_S", math.inf)
    begun, over, turn = asyncio.Event(), asyncio.Event(), asyncio.Lock()
    served: asyncio.StreamReader | None = None
    closings: list[asyncio.Task[None]] = []

    async def one_by_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        nonlocal served
        if served is not reader:
            await turn.acquire()
            served = reader
            closings.append(asyncio.create_task(closed(reader)))
        return await ok(reader, writer)

    async def closed(reader: asyncio.StreamReader) -> None:
        async def ended() -> bool:
            return reader.at_eof()

        await eventually(ended, bool)
        turn.release()

    async def work() -> None:
        nonlocal now_s
        while not over.is_set():
            await once_and_again(inference)
            now_s += 0.1
            if now_s > 102:
                begun.set()
            assert now_s < 110, "it starves"

    async with keeping(one_by_one) as box, Inference(settings_for(tmp_path, box.port)) as inference:
        inference._connections._trusted = True
        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            async with asyncio.timeout(30):
                await begun.wait()
                await once_and_again(inference)
            over.set()
        inference._connections.close()
        await asyncio.gather(*closings)


async def test_after_a_kept_connection_died_none_is_kept(tmp_path: Path) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        return len(box.seen) != 3 and await ok(reader, writer)

    async with keeping(die) as box, Inference(settings_for(tmp_path, box.port)) as inference:
        await trusted(inference)
        await once_and_again(inference)
        with pytest.raises(ContainerLost):
            await once_and_again(inference)
        for _ in range(3):
            await once_and_again(inference)
        # Four where this machine stood still between the two jobs, so that none was kept that could die.
        assert len(box.seen) == 6
        assert box.opened in (4, 5)


async def test_a_job_whose_kept_connection_dies_is_sent_once_and_lost(tmp_path: Path) -> None:
    answers = iter([True, False])

    async def answer_the_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        again = next(answers)
        if again:
            writer.write(OK)
        return again

    async with (
        keeping(answer_the_first) as box,
        Inference(settings_for(tmp_path, box.port, keep_connections="always")) as inference,
    ):
        await once_and_again(inference)
        with pytest.raises(ContainerLost) as lost:
            await once_and_again(inference)
        assert lost.value.sent
        assert (box.opened, len(box.seen)) == (1, 2)


def test_a_problem_of_the_sidecar_names_its_source() -> None:
    found: Outcome = problem(a_job(), 500, "Internal error")
    assert json.loads(found.body)["type"] == "urn:nvcf-worker-service:problem-details:internal-server-error"


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_broken_answer_is_told_from_what_became_of_the_rest_of_the_body(tmp_path: Path) -> None:
    answered, sent = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"the beginning"
        await answered.wait()
        sent.set()

    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf an answer"
    async with (
        raw_container(reply) as port,
        Inference(settings_for(tmp_path, port)) as inference,
        inference.exchange(a_job(), (), body=body(), budget_s=10) as response,
    ):
        with pytest.raises(ContainerLost):
            await response.read()
        answered.set()
        await sent.wait()  # the end of the body goes to a connection that is closed
