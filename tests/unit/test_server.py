"""The front end over back ends in memory: what only shows on the inside or takes two tenants."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from pydantic import SecretStr

from api.server import serving
from broker import ports
from broker.accounts import SCOPES, create_key
from broker.backends.hints import Hints, RecordWatch
from broker.connect import open_broker
from broker.errors import CircuitOpen, StoreUnavailable
from broker.model import FunctionStatus, Interest, Job, Outcome, Record, RequestState, Verdict, Version
from broker.ports import Broker
from broker.settings import ApiSettings
from tests.eventually import eventually

NVCF = "/v2/nvcf"
FUNCTION = "5636b912-ecc0-493d-ab0c-1f702b96d75c"
VERSION = "65721e80-9b32-4396-9bec-8c08256297cf"
NOBODYS = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
INVOKE = f"{NVCF}/pexec/functions/{FUNCTION}"
KEY = "admin-key"
NOW = {"Prefer": "respond-async"}


@dataclass(slots=True, kw_only=True)
class House:
    broker: Broker
    url: str
    client: aiohttp.ClientSession

    async def invoke(self, headers: Mapping[str, str] | None = None, body: bytes = b"{}") -> tuple[int, Any, bytes]:
        async with self.client.post(INVOKE, data=body, headers=headers) as response:
            return response.status, response.headers, await response.read()

    async def submit(self) -> str:
        status, headers, _ = await self.invoke(NOW)
        assert status == 202
        return str(headers["NVCF-REQID"])

    async def connect(self, line: str, *headers: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which a request has begun: its head is sent."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = [line, "Host: h", f"Authorization: Bearer {KEY}", *headers]
        writer.write(("\r\n".join(head) + "\r\n\r\n").encode())
        await writer.drain()
        return reader, writer

    async def finish(self, outcome: Outcome | None = None) -> Job:
        """Run the next job, as a sidecar would."""
        delivery = await self.broker.queue.take(VERSION)
        assert delivery is not None
        claim = await self.broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
        assert claim.verdict is Verdict.GRANTED
        assert claim.lease is not None
        done = outcome or Outcome(status=200, body=b"done")
        await self.broker.results.settle(claim.lease, delivery.job, RequestState.FULFILLED, done)
        await delivery.ack()
        return delivery.job

    async def queued(self) -> int:
        (load,) = await self.broker.results.load([VERSION])
        return load.queued

    async def some_queued(self, count: int = 1) -> None:
        await eventually(self.queued, lambda seen: seen == count)


class Failing:
    """A back end in memory, but for what a test says fails."""

    def __init__(self, inner: ports.Results | ports.Queue, **failing: Exception) -> None:
        self._inner = inner
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        if name not in self._failing:
            return getattr(self._inner, name)

        async def fail(*_: object, **__: object) -> None:
            raise self._failing[name]

        return fail


class Replicated(Failing):
    """While `replica_away`, no record can be shown."""

    def __init__(self, inner: ports.Results, **failing: Exception) -> None:
        super().__init__(inner, **failing)
        self.results = inner
        self.replica_away = False

    def __getattr__(self, name: str) -> Any:
        if self.replica_away and name in ("read", "watch"):
            return self._read if name == "read" else self._watch
        return super().__getattr__(name)

    async def _read(self, *_: object) -> Record | None:
        raise StoreUnavailable("no replica has it")

    def _watch(self, request_id: str, interest: Interest = Interest.END) -> RecordWatch:
        return RecordWatch(Hints(), request_id, interest, self._read)


@asynccontextmanager
async def opened(
    folder: Path,
    *,
    failing: Mapping[str, Exception] | None = None,
    failing_queue: Mapping[str, Exception] | None = None,
    kind: type[ApiSettings] = ApiSettings,
    **settings: Any,
) -> AsyncIterator[House]:
    chosen = kind(
        port=0, data_dir=folder, admin_key=SecretStr(KEY), shutdown_grace_s=2, **{"queue_limit": 10, **settings}
    )
    async with open_broker(chosen) as whole:
        broker = replace(
            whole,
            results=cast("ports.Results", Replicated(whole.results, **(failing or {}))),
            queue=cast("ports.Queue", Failing(whole.queue, **(failing_queue or {}))),
        )
        await broker.queue.declare(VERSION)
        await broker.catalog.versions.put(
            Version(
                id=VERSION,
                function_id=FUNCTION,
                account="default",
                name="f",
                inference_url="/",
                container_image="i",
                created_at=1.0,
                status=FunctionStatus.ACTIVE,
            )
        )
        async with (
            serving(broker, chosen) as url,
            aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {KEY}"}) as client,
        ):
            yield House(broker=broker, url=url, client=client)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


@asynccontextmanager
async def caller(house: House, account: str, *scopes: str) -> AsyncIterator[aiohttp.ClientSession]:
    token, _ = await create_key(house.broker, account=account, scopes=scopes or SCOPES)
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"}) as client:
        yield client


def slug(body: bytes) -> str:
    return str(json.loads(body)["type"]).rpartition(":")[2]


# -- what reaches the function -----------------------------------------------------------------


async def test_body_and_headers_reach_the_job_as_they_were_sent(house: House) -> None:
    await house.invoke(NOW | {"Content-Encoding": "gzip", "X-Mine": "ü", "NVCF-SUB": "x"}, b"\x00\xff gzip? no")
    job = await house.finish()
    sent = dict(job.headers)
    assert job.body == b"\x00\xff gzip? no"
    assert (sent["Content-Encoding"], sent["X-Mine"], job.subject) == ("gzip", "ü", "admin")
    assert not {name.lower() for name in sent} & {"authorization", "nvcf-sub", "prefer", "host", "content-length"}


async def test_an_event_stream_is_passed_through(house: House) -> None:
    await house.invoke(NOW | {"Accept": "text/event-stream"})
    assert (await house.finish()).passthrough


async def test_a_large_result_is_a_link_and_a_202_of_the_function_is_a_result(house: House) -> None:
    first = await house.submit()
    await house.finish(Outcome(status=302, blob_key="results/default/x/1.zip"))
    async with house.client.get(f"{NVCF}/pexec/status/{first}", allow_redirects=False) as moved:
        assert (moved.status, moved.headers["Content-Length"]) == (302, "0")
        assert moved.headers["Location"].startswith(f"{house.url}/v2/nvcf/blobs/results/default/x/1.zip?")
    second = await house.submit()
    await house.finish(Outcome(status=202, body=b"accepted"))
    async with house.client.get(f"{NVCF}/pexec/status/{second}") as found:
        assert (found.status, await found.read()) == (200, b"accepted")


async def test_a_pending_answer_has_no_body_and_no_type(house: House) -> None:
    status, headers, body = await house.invoke(NOW)
    assert (status, body, headers["Content-Length"]) == (202, b"", "0")
    assert "Content-Type" not in headers
    assert headers["Location"] == f"{house.url}{NVCF}/pexec/status/{headers['NVCF-REQID']}"


# -- tenants -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{NVCF}/pexec/status/{{id}}"),
        ("GET", f"{NVCF}/requests/{{id}}"),
        ("DELETE", f"{NVCF}/requests/{{id}}"),
        ("GET", f"{NVCF}/queues/{{id}}/position"),
    ],
)
async def test_a_foreign_request_reads_like_one_that_never_was(house: House, method: str, path: str) -> None:
    request_id = await house.submit()
    async with caller(house, "other") as stranger:
        answers = []
        for each in (request_id, NOBODYS):
            async with stranger.request(method, path.format(id=each)) as response:
                told = {name: value for name, value in response.headers.items() if name != "Date"}
                answers.append((response.status, told, await response.read()))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404


async def test_a_foreign_function_cannot_be_invoked_or_seen(house: House) -> None:
    async with caller(house, "other") as stranger:
        for method, path in [
            ("POST", INVOKE),
            ("GET", f"{NVCF}/functions/{FUNCTION}/versions/{VERSION}"),
            ("DELETE", f"{NVCF}/functions/{FUNCTION}/versions/{VERSION}"),
            ("GET", f"{NVCF}/queues/functions/{FUNCTION}"),
        ]:
            async with stranger.request(method, path) as response:
                assert response.status == 404, (method, path)


async def test_an_idempotency_key_is_its_accounts_own(house: House) -> None:
    mine = (await house.invoke(NOW | {"Idempotency-Key": "k"}))[1]["NVCF-REQID"]
    async with (
        caller(house, "default") as colleague,
        colleague.post(INVOKE, data=b"{}", headers=NOW | {"Idempotency-Key": "k"}) as theirs,
    ):
        assert theirs.headers["NVCF-REQID"] == mine
    async with (
        caller(house, "other") as stranger,
        stranger.post(INVOKE, data=b"{}", headers=NOW | {"Idempotency-Key": "k"}) as foreign,
    ):
        assert foreign.status == 404


SPARE = f"functions/{FUNCTION}/versions/{VERSION}"
GUARDED = [
    ("POST", INVOKE, "invoke_function"),
    ("GET", f"{NVCF}/pexec/status/{NOBODYS}", "invoke_function"),
    ("DELETE", f"{NVCF}/requests/{NOBODYS}", "invoke_function"),
    ("GET", f"{NVCF}/assets", "invoke_function"),
    ("POST", f"{NVCF}/functions", "register_function"),
    ("GET", f"{NVCF}/functions", "list_functions"),
    ("GET", f"{NVCF}/functions", "list_functions_details"),
    ("GET", f"{NVCF}/{SPARE}", "list_functions"),
    ("DELETE", f"{NVCF}/functions/{FUNCTION}/versions/{NOBODYS}", "delete_function"),
    ("POST", f"{NVCF}/deployments/{SPARE}", "deploy_function"),
    ("DELETE", f"{NVCF}/deployments/{SPARE}", "deploy_function"),
    ("GET", f"{NVCF}/queues/functions/{FUNCTION}", "queue_details"),
    ("GET", f"{NVCF}/queues/{NOBODYS}/position", "queue_details"),
    ("GET", f"{NVCF}/{SPARE}/activity", "queue_details"),
]


@pytest.mark.parametrize(("method", "path", "scope"), GUARDED)
async def test_each_route_asks_for_its_scope(house: House, method: str, path: str, scope: str) -> None:
    others = set(SCOPES) - {scope}
    if scope.startswith("list_functions"):
        others -= {"list_functions", "list_functions_details"}
    async with caller(house, "default", *others) as without, without.request(method, path, headers=NOW) as refused:
        assert refused.status == 403
        assert scope in (await refused.json(content_type="application/problem+json"))["detail"]
    async with caller(house, "default", scope) as holder, holder.request(method, path, headers=NOW) as passed:
        assert passed.status not in (401, 403)


async def test_instances_are_details(house: House) -> None:
    for scope, shown in (("list_functions", False), ("list_functions_details", True)):
        async with caller(house, "default", scope) as client, client.get(f"{NVCF}/{SPARE}") as response:
            assert ("activeInstances" in (await response.json())["function"]) is shown


# -- limits ------------------------------------------------------------------------------------


async def test_a_full_queue_is_429_with_retry_after(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=1) as house:
        await house.submit()
        status, headers, body = await house.invoke(NOW)
        assert (status, slug(body), headers["Retry-After"]) == (429, "queue-full", "1")


async def test_a_body_over_the_limit_is_413_and_names_it(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1024

    async with opened(tmp_path, max_body_bytes=2048) as house:
        declared = await house.invoke(NOW, b"x" * 4096)
        async with house.client.post(INVOKE, data=endless(), headers=NOW) as streamed:
            found = (streamed.status, streamed.headers, await streamed.read())
        for status, _, body in (declared, found):
            assert (status, slug(body)) == (413, "payload-too-large")
            assert "2048 bytes" in json.loads(body)["detail"]
            assert "assets" in json.loads(body)["detail"]
        assert await house.queued() == 0


async def test_bodies_in_memory_have_a_budget_and_give_it_back(tmp_path: Path) -> None:
    async with opened(tmp_path, inflight_body_bytes=5 * 1024 * 1024, inline_body_bytes=16 * 1024 * 1024) as house:
        large = b"x" * (3 * 1024 * 1024)
        _, writer = await house.connect(f"POST {INVOKE} HTTP/1.1", f"Content-Length: {len(large)}")

        async def refused() -> int:
            return (await house.invoke(NOW, large))[0]

        await eventually(refused, lambda seen: seen == 503)
        writer.close()
        await writer.wait_closed()
        await eventually(refused, lambda seen: seen == 202)


async def test_as_many_requests_are_accepted_at_once_as_set_and_those_that_wait_are_none_of_them(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path, inflight_bodies=1) as house:
        waiting = asyncio.create_task(house.invoke())
        await house.some_queued()
        _, writer = await house.connect(f"POST {INVOKE} HTTP/1.1", "Content-Length: 10")

        async def refused() -> tuple[int, Any]:
            return (await house.invoke(NOW))[:2]

        _, told = await eventually(refused, lambda seen: seen[0] == 503)
        assert told["Retry-After"] == "1"
        writer.close()
        await writer.wait_closed()
        await eventually(refused, lambda seen: seen[0] == 202)
        await house.finish()
        assert (await asyncio.wait_for(waiting, 30))[0] == 200


@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
async def test_a_body_that_does_not_come_is_408(tmp_path: Path, framing: str) -> None:
    async with opened(tmp_path, body_timeout_s=0.2) as house:
        reader, writer = await house.connect(f"POST {INVOKE} HTTP/1.1", framing)
        answer = await asyncio.wait_for(reader.readuntil(b"}"), 20)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"Connection: close" in answer
        writer.close()


async def test_a_body_that_is_cut_off_is_refused_and_nothing_is_queued(house: House) -> None:
    reader, writer = await house.connect(f"POST {INVOKE} HTTP/1.1", "Transfer-Encoding: chunked")
    writer.write(b"5\r\nhello\r\nzz\r\n")
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    assert await house.queued() == 0


# -- waiting -----------------------------------------------------------------------------------


async def test_a_waiting_caller_is_answered_as_soon_as_there_is_a_result(house: House) -> None:
    waiting = asyncio.create_task(house.invoke())
    await house.some_queued()
    await house.finish()
    status, _, body = await asyncio.wait_for(waiting, 20)
    assert (status, body) == (200, b"done")


async def test_still_queued_is_202_by_default_and_504_for_who_asks_for_it(house: House) -> None:
    patience = {"NVCF-POLL-SECONDS": "1"}
    kept, given_up = await asyncio.gather(
        house.invoke(patience), house.invoke(patience | {"nvcf-feature-enable-gateway-timeout": "true"})
    )
    assert (kept[0], kept[1]["NVCF-STATUS"]) == (202, "pending-evaluation")
    assert (given_up[0], given_up[1]["NVCF-STATUS"], given_up[2]) == (504, "errored", b"")
    assert given_up[1]["NVCF-REQID"]
    assert await house.queued() == 1


async def test_the_504_mode_is_a_setting_too_and_leaves_respond_async_alone(tmp_path: Path) -> None:
    async with opened(tmp_path, gateway_timeout=True) as house:
        assert (await house.invoke({"NVCF-POLL-SECONDS": "1"}))[0] == 504
        assert (await house.invoke(NOW))[0] == 202


async def test_one_shot_results_are_gone_once_delivered(tmp_path: Path) -> None:
    async with opened(tmp_path, one_shot_results=True) as house:
        request_id = await house.submit()
        await house.finish()
        for expected in (200, 404):
            async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
                assert response.status == expected


@pytest.mark.parametrize(("policy", "left"), [("continue", 1), ("cancel", 0)])
async def test_a_caller_that_leaves_is_treated_as_set(tmp_path: Path, policy: str, left: int) -> None:
    async with opened(tmp_path, on_disconnect=policy) as house:
        leaving = asyncio.create_task(house.invoke())
        await house.some_queued()
        leaving.cancel()
        await asyncio.wait([leaving])
        await house.submit()  # behind the one that was left
        await house.some_queued(left + 1)


async def test_a_poller_that_leaves_cancels_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, on_disconnect="cancel") as house:
        request_id = await house.submit()
        _, writer = await house.connect(f"GET {NVCF}/pexec/status/{request_id} HTTP/1.1")
        await house.submit()  # read after the poll, which is held by now
        writer.close()
        await writer.wait_closed()
        await house.submit()
        assert await house.queued() == 3


@pytest.mark.parametrize("policy", ["continue", "cancel"])
async def test_who_waits_is_answered_202_when_the_server_stops(tmp_path: Path, policy: str) -> None:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as client:
        async with opened(tmp_path, on_disconnect=policy, queue_limit=1000) as house:
            waiting = [asyncio.create_task(_invoke(client, house.url)) for _ in range(50)]
            await house.some_queued(50)
        answers = await asyncio.gather(*waiting)
    assert set(answers) == {(202, "pending-evaluation")}
    assert await house.queued() == 50


async def _invoke(client: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with client.post(url + INVOKE, data=b"{}") as response:
        return response.status, response.headers["NVCF-STATUS"]


# -- errors and the rest -----------------------------------------------------------------------


async def test_a_preflight_needs_no_key(house: House) -> None:
    asks = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,nvcf-poll-seconds",
    }
    async with aiohttp.ClientSession(house.url) as page:
        for path, allowed in ((INVOKE, "POST"), (f"{NVCF}/pexec/status/x", "GET,HEAD")):
            async with page.options(path, headers=asks) as response:
                assert (response.status, response.headers["Allow"].replace(" ", "")) == (200, allowed)
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                assert response.headers["Access-Control-Allow-Headers"] == asks["Access-Control-Request-Headers"]
                assert response.headers["Access-Control-Max-Age"] == "86400"
                assert "Access-Control-Allow-Credentials" not in response.headers


async def test_a_page_may_read_what_tells_when_to_come_again(house: House) -> None:
    """Of results and errors alike."""
    page = {"Origin": "https://page.example"}
    async with house.client.post(INVOKE, data=b"{}", headers=NOW | page) as response:
        exposed = response.headers.getall("Access-Control-Expose-Headers")
    assert len(exposed) == 1
    assert exposed[0].split(", ")[0] == "nvcf-reqid"
    async with house.client.get(f"{NVCF}/functions/x/versions", headers=page) as response:
        assert response.status == 400
        exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"nvcf-reqid", "nvcf-status", "retry-after", "location", "ratelimit", "ratelimit-policy"} <= set(exposed)


async def test_only_listed_origins_may_call_when_there_is_a_list(tmp_path: Path) -> None:
    async with opened(tmp_path, cors_origins="https://good.example, https://fine.example") as house:
        for origin, allowed in (("https://fine.example", "https://fine.example"), ("https://bad.example", None)):
            async with house.client.get("/health", headers={"Origin": origin}) as response:
                assert response.headers.get("Access-Control-Allow-Origin") == allowed


async def test_a_wrong_method_is_told_the_right_one(house: House) -> None:
    async with house.client.put(INVOKE) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_management_problems_name_their_path_and_invocations_do_not(house: House) -> None:
    for path, instance in (
        (f"{NVCF}/assets/{NOBODYS}", f"{NVCF}/assets/{NOBODYS}"),
        (f"{NVCF}/pexec/status/{NOBODYS}", None),
    ):
        async with house.client.get(path) as response:
            problem = await response.json(content_type="application/problem+json")
            assert (response.status, problem.get("instance")) == (404, instance)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[logging.LogRecord]]:
    caplog.set_level(logging.DEBUG)
    return lambda event: [line for line in caplog.records if line.getMessage() == event]


async def test_an_invocation_is_one_line_without_secrets(
    house: House, lines: Callable[[str], list[logging.LogRecord]], caplog: pytest.LogCaptureFixture
) -> None:
    async with house.client.post(INVOKE, data=b"canary-body", headers=NOW) as response:
        request_id = response.headers["NVCF-REQID"]
    (line,) = [line for line in lines("answered") if line.levelno == logging.INFO]
    facts = vars(line)
    assert (facts["request_id"], facts["status"], facts["account"]) == (request_id, 202, "default")
    everything = " ".join(str(vars(record)) for record in caplog.records)
    assert "canary-body" not in everything
    assert KEY not in everything


async def test_a_fault_of_ours_is_500_without_its_inside_and_logged_once(
    tmp_path: Path, lines: Callable[[str], list[logging.LogRecord]]
) -> None:
    async with (
        opened(tmp_path, failing={"load": RuntimeError("canary-secret")}) as house,
        house.client.get(f"{NVCF}/queues/functions/{FUNCTION}") as response,
    ):
        body = await response.read()
    assert (response.status, slug(body)) == (500, "internal")
    assert b"canary" not in body
    assert len(lines("fault")) == 1


async def test_a_store_that_is_away_is_503_and_health_tells(tmp_path: Path) -> None:
    away = StoreUnavailable("the store does not answer", retry_after_s=2)
    async with opened(tmp_path, failing={"ping": away, "create": away}) as house:
        status, headers, body = await house.invoke(NOW)
        assert (status, slug(body), headers["Retry-After"]) == (503, "unavailable", "2")
        for path, expected in (("/health", 500), ("/readyz", 503), ("/livez", 200)):
            async with house.client.get(path) as response:
                assert response.status == expected


async def test_a_server_without_its_queue_is_ready_says_so_and_answers_polls(tmp_path: Path) -> None:
    """All front ends lose it at once, and without them there are no results either."""
    away = CircuitOpen("the job queue does not answer", retry_after_s=2)
    async with opened(tmp_path, failing_queue={"ping": away}) as house:
        async with house.client.get("/readyz") as response:
            assert (response.status, await response.json()) == (200, {"status": "OK", "away": ["queue"]})
        async with house.client.get("/health") as response:
            assert response.status == 500
        request_id = await house.submit()
        await house.finish()
        async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
            assert response.status == 200
