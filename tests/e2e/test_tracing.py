"""Tracing over the whole product: real processes, real servers, and a receiver that decodes what a collector would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local.servers import S3, RabbitMQ, Redis
from tests.e2e import dev
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, House, Reply, running, users
from tests.otlp import Receiver, Seen, receiving

pytestmark = pytest.mark.servers

DATABASE = 1
CALLERS = "4bf92f3577b34da6a3ce929d0e0e4736"
RUN = ("accept", "queue wait", "claim", "inputs", "settle")


@dataclass(frozen=True, slots=True)
class Traced:
    house: House
    receiver: Receiver
    caller: Caller
    recorder: Function
    told: dict[str, str]

    @property
    def route(self) -> str:
        return "POST /v2/nvcf/pexec/functions/{function_id}"

    @property
    def send(self) -> str:
        return f"send {self.recorder.version_id}"

    @property
    def process(self) -> str:
        return f"process {self.recorder.version_id}"


@pytest.fixture(scope="module")
async def traced(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    async with receiving() as receiver:
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        servers = users(product_rabbitmq, redis_server, s3, database=DATABASE)
        house = House(folder, *servers, fronts=1, **told)
        # Entered in a thread, since starting waits and the receiver has to answer meanwhile.
        stack = running(house)
        await asyncio.to_thread(stack.__enter__)
        try:
            async with house.caller() as caller:
                yield Traced(house, receiver, caller, await caller.deploy(RECORDER), told)
        finally:
            await asyncio.to_thread(stack.__exit__, None, None, None)


def only(spans: list[Seen]) -> Seen:
    [span] = spans
    return span


async def test_a_request_is_one_trace_from_the_client_to_its_container(traced: Traced) -> None:
    environment = dev.environment(
        FNQUEUE_URL=traced.house.fronts[0].url, FNQUEUE_API_KEY=traced.house.key, **traced.told
    )
    words = ["invoke", traced.recorder.id, "--data", '{"id": "whole"}', "--json"]
    done = await asyncio.to_thread(dev.fnqueue, *words, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    spawn = f"spawn {traced.recorder.id}"
    found = await traced.receiver.trace(
        spawn, traced.route, traced.send, traced.process, *RUN, messaging__message__id=answer["requestId"]
    )
    assert len({span.trace_id for spans in found.values() for span in spans}) == 1

    served, accept, sent = only(found[traced.route]), only(found["accept"]), only(found[traced.send])
    process, wait = only(found[traced.process]), only(found["queue wait"])
    posts = {span.service: span for span in found["POST"]}
    parents = [
        (posts["fnqueue-cli"], only(found[spawn])),
        (served, posts["fnqueue-cli"]),
        (accept, served),
        (sent, accept),
        (wait, sent),
        (process, sent),
        (posts["fnqueue-sidecar"], process),
        *((only(found[name]), process) for name in ("claim", "inputs", "settle")),
    ]
    assert [(child.name, child.parent_id) for child, _ in parents] == [
        (child.name, parent.span_id) for child, parent in parents
    ]
    assert process.links == (sent.span_id,)
    assert (served.kind, sent.kind, process.kind) == ("SERVER", "PRODUCER", "CONSUMER")
    assert {span.service for span in (served, accept, sent)} == {"fnqueue-api"}
    assert {span.service for span in (process, wait)} == {"fnqueue-sidecar"}
    assert sent.attributes["messaging.system"] == "rabbitmq"
    assert process.attributes["fnqueue.state"] == "fulfilled"
    assert not [span.name for spans in found.values() for span in spans if span.failed]
    assert sent.began_ns <= process.began_ns <= posts["fnqueue-sidecar"].began_ns

    carried = answer["result"]["headers"]
    named = {name.lower(): value for name, value in carried.items()}
    assert named["traceparent"].split("-")[1:3] == [process.trace_id, posts["fnqueue-sidecar"].span_id]


async def test_a_callers_own_trace_goes_on_and_lines_have_its_id(traced: Traced) -> None:
    parent = f"00-{CALLERS}-00f067aa0ba902b7-01"
    reply = await traced.caller.invoke(traced.recorder.id, headers={"traceparent": parent, "tracestate": "vendor=1"})
    found = await traced.receiver.trace(traced.route, traced.process, *RUN, messaging__message__id=reply.request_id)
    served = only(found[traced.route])
    assert (served.trace_id, served.parent_id, served.state) == (CALLERS, "00f067aa0ba902b7", "vendor=1")
    assert only(found[traced.process]).state == "vendor=1"
    assert served.attributes["fnqueue.request.id"] == reply.request_id
    lines = [json.loads(line) for line in traced.house.fronts[0].log.read_text().splitlines() if "answered" in line]
    assert [line["trace_id"] for line in lines if line.get("request_id") == reply.request_id] == [CALLERS]


@pytest.mark.parametrize("parent", [f"00-{CALLERS}-00f067aa0ba902b7-01-more", f"00-{'0' * 32}-00f067aa0ba902b7-01"])
async def test_what_is_no_trace_context_is_nobodys(traced: Traced, parent: str) -> None:
    reply = await traced.caller.invoke(traced.recorder.id, headers={"traceparent": parent})
    found = await traced.receiver.trace(traced.route, traced.process, *RUN, messaging__message__id=reply.request_id)
    served = only(found[traced.route])
    assert (served.trace_id != CALLERS, served.parent_id) == (True, "")
    assert sent_to_container(reply).split("-")[1] == served.trace_id


async def test_what_its_caller_does_not_sample_is_not_sent(traced: Traced) -> None:
    unsampled, sampled = "5" * 32, "6" * 32
    ids = []
    for trace_id, flag in ((unsampled, "00"), (sampled, "01")):
        parent = f"00-{trace_id}-00f067aa0ba902b7-{flag}"
        reply = await traced.caller.invoke(traced.recorder.id, headers={"traceparent": parent})
        assert sent_to_container(reply).split("-")[1::2] == [trace_id, flag]
        ids.append(reply.request_id)
    # The second one's were behind the first one's in every queue.
    await traced.receiver.trace(traced.route, traced.process, *RUN, messaging__message__id=ids[1])
    assert traced.receiver.of(unsampled) == []


async def test_each_attempt_is_a_span_of_the_same_trace(traced: Traced, tmp_path: Path) -> None:
    cure = tmp_path / "cure"
    request_id = await traced.caller.submit(traced.recorder.id, {"id": "twice", "cured": str(cure)})
    await traced.house.record.saw("start", "twice")
    cure.touch()
    reply = await traced.caller.result(request_id)
    assert reply.status == 200, reply
    found = await traced.receiver.trace(*[traced.process] * 2, *RUN, messaging__message__id=request_id)
    attempts = [span for span in found[traced.process] if span.attributes["messaging.message.id"] == request_id]
    assert [span.attributes["fnqueue.attempt"] for span in attempts] == list(range(1, len(attempts) + 1))
    assert all(span.failed and span.attributes["error.type"] == "container_lost" for span in attempts[:-1])
    assert attempts[-1].attributes["fnqueue.state"] == "fulfilled"
    sent = only(found[traced.send])
    assert {(span.parent_id, *span.links) for span in attempts} == {(sent.span_id, sent.span_id)}


async def test_a_cancelled_request_says_so_and_is_no_failure(traced: Traced, tmp_path: Path) -> None:
    request_id = await traced.caller.submit(traced.recorder.id, {"id": "held", "gate": str(tmp_path / "never")})
    await traced.house.record.saw("start", "held")
    assert (await traced.caller.cancel(request_id)).status < 300
    found = await traced.receiver.trace(traced.process, messaging__message__id=request_id)
    process = only(found[traced.process])
    assert (process.attributes["fnqueue.state"], process.failed) == ("cancelled", False)


async def test_a_run_that_times_out_has_failed(traced: Traced, tmp_path: Path) -> None:
    reply = await traced.caller.invoke(
        traced.recorder.id, {"gate": str(tmp_path / "never")}, headers={"NVCF-RUN-TIMEOUT-SECONDS": "1"}
    )
    found = await traced.receiver.trace(traced.route, traced.process, *RUN, messaging__message__id=reply.request_id)
    process, served = only(found[traced.process]), only(found[traced.route])
    assert (process.failed, process.attributes["error.type"]) == (True, "timed-out")
    assert served.failed == (reply.status >= 500)


async def test_a_receiver_that_hangs_holds_nobody_up(traced: Traced) -> None:
    hanging = traced.receiver.hanging = asyncio.Event()
    posts = traced.receiver.posts
    replies = [await traced.caller.invoke(traced.recorder.id) for _ in range(3)]

    async def asked() -> int:
        return traced.receiver.posts

    await eventually(asked, lambda seen: seen > posts, within_s=60)
    replies += [await traced.caller.invoke(traced.recorder.id) for _ in range(3)]
    assert [reply.status for reply in replies] == [200] * 6
    traced.receiver.hanging = None
    hanging.set()


def sent_to_container(reply: Reply) -> str:
    named = {name.lower(): value for name, value in reply.json["headers"].items()}
    return str(named["traceparent"])
