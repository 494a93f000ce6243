"""Dead letters over HTTP, and a redrive that is cut off at each of its steps."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker import dead_letters
from broker.connect import open_broker
from broker.invocations import Submission, invoke
from broker.model import (
    Channel,
    DeadCause,
    DeadLetter,
    FunctionStatus,
    Outcome,
    Principal,
    Rate,
    RequestState,
    Taken,
    Version,
    Window,
)
from broker.ports import Broker
from broker.settings import Settings
from fnqueue.cli import cli
from infra.local.servers import Redis
from tests.unit.test_server import FUNCTION, KEY, NOBODYS, NVCF, VERSION, House, caller, opened
from workers.controller import undertaker

LETTERS = f"{NVCF}/dead-letters"
OTHER_VERSION = "33333333-3333-4333-8333-333333333333"
LARGE = dead_letters.KEPT_INLINE_BYTES + 1
ME = Principal(account="default", subject="me", scopes=frozenset({"invoke_function"}))
THE_VERSION = Version(
    id=VERSION,
    function_id=FUNCTION,
    account="default",
    name="f",
    inference_url="/",
    container_image="i",
    created_at=1.0,
    status=FunctionStatus.ACTIVE,
)
END = undertaker.End(RequestState.DEAD, "a worker refused it", DeadCause.REJECTED)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


async def ask(house: House, method: str, path: str, content: Any = None) -> tuple[int, Any]:
    async with house.client.request(method, path, json=content) as response:
        body = await response.read()
        return response.status, json.loads(body) if body else None


async def die(house: House, body: bytes = b"{}", end: undertaker.End = END) -> str:
    """A request that the undertaker buried."""
    status, headers, _ = await house.invoke({"Prefer": "respond-async", "X-Mark": "kept"}, body)
    assert status == 202
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    assert await undertaker.bury(house.broker, delivery, end)
    return str(headers["NVCF-REQID"])


async def listed(house: House, query: str = "") -> list[str]:
    status, found = await ask(house, "GET", LETTERS + query)
    assert status == 200
    return [letter["requestId"] for letter in found["deadLetters"]]


async def redriven(house: House, request_id: str, content: Any = None) -> str:
    status, found = await ask(house, "POST", f"{LETTERS}/{request_id}/redrive", content or {})
    assert status == 202, found
    assert found["requestId"] == request_id
    return str(found["redrivenAs"])


# -- what there is -----------------------------------------------------------------------------


async def test_a_dead_request_is_listed_with_its_cause(house: House) -> None:
    request_id = await die(house)
    _, found = await ask(house, "GET", LETTERS)
    [letter] = found["deadLetters"]
    assert (letter["requestId"], letter["cause"], letter["reason"]) == (request_id, "rejected", "a worker refused it")
    assert (letter["functionId"], letter["functionVersionId"], letter["sizeBytes"]) == (FUNCTION, VERSION, 2)
    created, died, kept_until = (datetime.fromisoformat(letter[name]) for name in ("createdAt", "diedAt", "keptUntil"))
    assert created <= died < kept_until
    assert not {"redrivenAs", "redrivenAt", "input"} & letter.keys()


async def test_its_receipt_and_its_problem_name_the_cause(house: House) -> None:
    request_id = await die(house)
    _, receipt = await ask(house, "GET", f"{NVCF}/requests/{request_id}")
    status, problem = await ask(house, "GET", f"{NVCF}/pexec/status/{request_id}")
    assert (receipt["status"], receipt["cause"]) == ("dead", "rejected")
    assert (status, problem["cause"]) == (500, "rejected")


@pytest.mark.parametrize("size_bytes", [3, LARGE, 300_000], ids=["small", "parked", "never in a message"])
async def test_its_owner_is_shown_the_input(house: House, size_bytes: int) -> None:
    body = b"x" * size_bytes
    request_id = await die(house, body)
    _, letter = await ask(house, "GET", f"{LETTERS}/{request_id}")
    assert letter["sizeBytes"] == size_bytes
    given = letter["input"]
    assert {"name": "X-Mark", "value": "kept"} in [
        {"name": each["name"].title(), "value": each["value"]} for each in given["headers"]
    ]
    if size_bytes < LARGE:
        assert base64.b64decode(given["body"]) == body
    else:
        async with house.client.get(given["bodyUrl"], headers={"Authorization": ""}) as response:
            assert await response.read() == body


async def test_who_acts_for_another_account_is_not_shown_the_input(house: House) -> None:
    request_id = await die(house)
    status, letter = await ask(house, "GET", f"{NVCF}/accounts/default/dead-letters/{request_id}")
    assert (status, letter["requestId"]) == (200, request_id)
    assert "input" not in letter


async def test_the_list_is_narrowed_and_paged(house: House) -> None:
    ids = [await die(house) for _ in range(3)]
    full = await die(house, end=undertaker.End(RequestState.DEAD, "full", DeadCause.QUEUE_FULL))
    everyone = {*ids, full}
    for query, found in {
        "": everyone,
        f"?functionId={FUNCTION}": everyone,
        f"?functionVersionId={NOBODYS}": set(),
        "?cause=queue-full": {full},
        "?cause=QUEUE-FULL,rejected": everyone,
        "?diedAfter=2020-01-01T00:00:00Z": everyone,
        "?diedBefore=2020-01-01T00:00:00Z": set(),
        "?redriven=true": set(),
        "?redriven=false": everyone,
    }.items():
        assert set(await listed(house, query)) == found, query
    _, first = await ask(house, "GET", f"{LETTERS}?limit=3")
    _, second = await ask(house, "GET", f"{LETTERS}?limit=3&cursor={first['cursor']}")
    assert {each["requestId"] for each in first["deadLetters"] + second["deadLetters"]} == everyone


@pytest.mark.parametrize("query", ["cause=bad-luck", "limit=0", "cursor=x", "diedAfter=never", "redriven=perhaps"])
async def test_a_wrong_parameter_is_named(house: House, query: str) -> None:
    status, problem = await ask(house, "GET", f"{LETTERS}?{query}")
    assert (status, problem["detail"].startswith(query.partition("=")[0])) == (400, True)


async def test_causes_are_counted(house: House) -> None:
    await die(house, end=undertaker.End(RequestState.DEAD, "full", DeadCause.QUEUE_FULL))
    for _ in range(2):
        await die(house)
    _, found = await ask(house, "GET", f"{LETTERS}/causes")
    assert [(group["cause"], group["count"]) for group in found["causes"]] == [("rejected", 2), ("queue-full", 1)]
    assert found["causes"][0]["versions"] == [{"functionId": FUNCTION, "functionVersionId": VERSION, "count": 2}]


async def test_foreign_and_unknown_letters_are_told_apart_nowhere(house: House, tmp_path: Path) -> None:
    request_id = await die(house)
    async with caller(house, account="stranger") as stranger:
        for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/redrive")):
            seen = set()
            for each in (request_id, NOBODYS):
                content: dict[str, str] | None = {} if method == "POST" else None
                async with stranger.request(method, f"{LETTERS}/{each}{suffix}", json=content) as response:
                    body = (await response.read()).replace(each.encode(), b"")
                    seen.add((response.status, body))
            assert len(seen) == 1
            assert seen.pop()[0] == 404
        async with stranger.get(LETTERS) as response:
            assert (await response.json())["deadLetters"] == []
    assert await listed(house) == [request_id]


# -- starting again ----------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [3, LARGE, 300_000])
async def test_a_redrive_runs_the_same_input_once_under_one_id(house: House, size_bytes: int) -> None:
    body = b"y" * size_bytes
    request_id = await die(house, body)
    new_id = await redriven(house, request_id)
    assert await redriven(house, request_id) == new_id
    job = await house.finish(Outcome(status=200, body=b"well"))
    assert (job.id, job.version_id) == (new_id, VERSION)
    assert ("X-Mark", "kept") in [(name.title(), value) for name, value in job.headers]
    sent = await house.broker.blobs.get(job.body_key, limit_bytes=10**6) if job.body_key else job.body
    assert sent == body
    assert await house.broker.queue.take(VERSION) is None
    assert await redriven(house, request_id) == new_id
    async with house.client.get(f"{NVCF}/pexec/status/{new_id}") as response:
        assert (response.status, await response.read()) == (200, b"well")


async def test_record_and_letter_name_the_new_request(house: House) -> None:
    request_id = await die(house)
    new_id = await redriven(house, request_id)
    _, receipt = await ask(house, "GET", f"{NVCF}/requests/{request_id}")
    _, letter = await ask(house, "GET", f"{LETTERS}/{request_id}")
    assert (receipt["status"], receipt["redrivenAs"]) == ("dead", new_id)
    assert letter["redrivenAs"] == new_id
    assert await listed(house, "?redriven=false") == []


async def test_the_input_of_the_letter_is_its_own(house: House) -> None:
    request_id = await die(house, b"z" * LARGE)
    await redriven(house, request_id)
    job = await house.finish()
    await house.broker.blobs.delete(job.body_key)  # as its sidecar does
    _, letter = await ask(house, "GET", f"{LETTERS}/{request_id}")
    async with house.client.get(letter["input"]["bodyUrl"], headers={"Authorization": ""}) as response:
        assert response.status == 200


async def test_a_redrive_goes_to_the_version_that_is_named(house: House) -> None:
    request_id = await die(house)
    await house.broker.catalog.versions.put(replace(THE_VERSION, id=OTHER_VERSION))
    await house.broker.queue.declare(OTHER_VERSION)
    new_id = await redriven(house, request_id, {"functionVersionId": OTHER_VERSION})
    delivery = await house.broker.queue.take(OTHER_VERSION)
    assert delivery is not None
    assert (delivery.job.id, delivery.job.version_id) == (new_id, OTHER_VERSION)


async def test_a_version_that_cannot_be_called_changes_nothing(house: House) -> None:
    request_id = await die(house)
    status, _ = await ask(house, "POST", f"{LETTERS}/{request_id}/redrive", {"functionVersionId": NOBODYS})
    assert status == 404
    letter = await house.broker.dead_letters.glance(request_id)
    assert letter is not None
    assert letter.redriven_as == ""


async def test_once_more_is_asked_for_by_naming_the_last_one(house: House) -> None:
    request_id = await die(house)
    first = await redriven(house, request_id)
    status, _ = await ask(house, "POST", f"{LETTERS}/{request_id}/redrive", {"after": first})
    assert status == 400  # it is still queued
    await house.finish(Outcome(status=500))
    second = await redriven(house, request_id, {"after": first})
    assert second != first
    assert await redriven(house, request_id, {"after": first}) == second


async def test_only_the_letters_own_redrive_can_be_named(house: House) -> None:
    """Of any other request nothing is told, not even that it runs."""
    request_id = await die(house)
    others = await house.submit()
    first = await redriven(house, request_id, {"after": others})
    for name in (others, NOBODYS):
        assert await redriven(house, request_id, {"after": name}) == first


async def test_a_redrive_that_dies_is_a_dead_letter_of_its_own(house: House) -> None:
    request_id = await die(house)
    new_id = await redriven(house, request_id)
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    await undertaker.bury(house.broker, delivery, END)
    assert await listed(house, "?redriven=false") == [new_id]


async def test_a_full_queue_leaves_the_letter_as_it_was(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=1) as house:
        request_id = await die(house, b"q" * LARGE)
        await house.submit()
        status, _ = await ask(house, "POST", f"{LETTERS}/{request_id}/redrive", {})
        assert status == 429
        letter = await house.broker.dead_letters.glance(request_id)
        assert letter is not None
        assert letter.redriven_as == ""
        await house.finish()
        await redriven(house, request_id)


async def test_a_queue_that_is_gone_leaves_nothing_that_might_run(house: House) -> None:
    request_id = await die(house)
    await house.broker.queue.delete(VERSION)
    status, _ = await ask(house, "POST", f"{LETTERS}/{request_id}/redrive", {})
    assert status == 503
    assert await house.queued() == 0
    await house.broker.queue.declare(VERSION)
    new_id = await redriven(house, request_id)
    assert (await house.finish()).id == new_id


async def test_what_went_over_a_channel_is_not_kept(house: House) -> None:
    request_id = await house.submit()
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    await house.broker.results.end(delivery.job, RequestState.DEAD, reason="gone", cause=DeadCause.ATTEMPTS)
    await dead_letters.keep(house.broker, replace(delivery.job, channel=Channel(url="http://h", token="t")))
    assert await house.broker.dead_letters.glance(request_id) is None


# -- many --------------------------------------------------------------------------------------


async def redrive_all(house: House, **given: Any) -> list[str]:
    """Call by call, to the end."""
    done: list[str] = []
    content: dict[str, Any] = {"select": {"all": True}, **given}
    while True:
        status, found = await ask(house, "POST", f"{LETTERS}/redrive", content)
        assert (status, found["left"]) == (200, [])
        done += [one["redrivenAs"] for one in found["redriven"]]
        if "cursor" not in found:
            return done
        content["cursor"] = found["cursor"]


async def test_many_are_started_again_call_by_call(house: House) -> None:
    ids = {await die(house) for _ in range(5)}
    done = await redrive_all(house, limit=2)
    assert len(set(done)) == 5
    assert set(await listed(house, "?redriven=true")) == ids
    assert {(await house.finish()).id for _ in range(5)} == set(done)
    assert await redrive_all(house) == []


async def test_those_that_are_named_are_started_and_the_others_not(house: House) -> None:
    ids = [await die(house) for _ in range(3)]
    _, found = await ask(house, "POST", f"{LETTERS}/redrive", {"select": {"requestIds": [*ids[:2], NOBODYS]}})
    assert [one["requestId"] for one in found["redriven"]] == ids[:2]
    assert [(one["requestId"], one["detail"]) for one in found["left"]] == [(NOBODYS, "no such dead letter")]
    assert await listed(house, "?redriven=false") == [ids[2]]


async def test_a_selection_is_by_cause(house: House) -> None:
    await die(house)
    full = await die(house, end=undertaker.End(RequestState.DEAD, "full", DeadCause.QUEUE_FULL))
    _, found = await ask(house, "POST", f"{LETTERS}/redrive", {"select": {"causes": ["queue-full"]}})
    assert [one["requestId"] for one in found["redriven"]] == [full]


async def test_what_must_wait_stops_the_call_and_is_not_passed_over(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=2) as house:
        for _ in range(3):
            await die(house)
        _, found = await ask(house, "POST", f"{LETTERS}/redrive", {"select": {"all": True}})
        assert len(found["redriven"]) == 2
        assert "already wait" in found["stopped"]
        for _ in range(2):
            await house.finish()
        again = {"select": {"all": True}, "cursor": found["cursor"]}
        _, found = await ask(house, "POST", f"{LETTERS}/redrive", again)
        assert len(found["redriven"]) == 1


async def test_each_takes_its_turn_from_what_the_account_may_begin_in_a_second(house: House) -> None:
    taken: list[tuple[str, Sequence[Window]]] = []
    granted: list[Taken] = []

    class Counting:
        async def take(self, partition: str, windows: Sequence[Window]) -> Taken:
            taken.append((partition, windows))
            answer = await house.broker.counters.take(partition, windows)
            if answer.granted:
                granted.append(answer)
            return answer

    async def pick(letter: DeadLetter) -> Version:
        return THE_VERSION

    ids = [await die(house) for _ in range(4)]
    broker = replace(house.broker, counters=Counting())
    batch = await dead_letters.redrive_many(broker, ME, ids, pick=pick, limit=4, per_s=3, within_s=60)
    assert (len(batch.redriven), len(granted)) == (4, 4)
    window = Window(counter="redrive", policy="second", rate=Rate(limit=3, window_s=1))
    assert all(each == ("default", [window]) for each in taken)


async def test_a_batch_whose_time_is_up_says_where_to_go_on(house: House) -> None:
    async def pick(letter: DeadLetter) -> Version:
        return THE_VERSION

    ids = [await die(house) for _ in range(2)]
    batch = await dead_letters.redrive_many(house.broker, ME, ids, pick=pick, limit=2, per_s=5, within_s=0)
    assert (batch.redriven, batch.after, batch.more) == ((), 0, True)


@pytest.mark.parametrize(
    "select",
    [{}, {"all": False}, {"requestIds": []}, {"requestIds": [NOBODYS], "all": True}, {"requestIds": ["x"]}],
    ids=str,
)
async def test_a_selection_says_which(house: House, select: Any) -> None:
    for verb in ("redrive", "purge"):
        status, _ = await ask(house, "POST", f"{LETTERS}/{verb}", {"select": select})
        assert status == 400


# -- throwing away -----------------------------------------------------------------------------


async def test_a_purge_removes_letter_and_input_and_leaves_the_receipt(house: House) -> None:
    request_id = await die(house, b"p" * LARGE)
    letter = await house.broker.dead_letters.glance(request_id)
    assert letter is not None
    assert (await ask(house, "DELETE", f"{LETTERS}/{request_id}"))[0] == 204
    assert await house.broker.blobs.head(letter.body_key) is None
    assert (await ask(house, "DELETE", f"{LETTERS}/{request_id}"))[0] == 404
    assert await listed(house) == []
    assert (await ask(house, "GET", f"{NVCF}/requests/{request_id}"))[1]["status"] == "dead"


async def test_many_are_purged_call_by_call(house: House) -> None:
    for _ in range(3):
        await die(house)
    _, found = await ask(house, "POST", f"{LETTERS}/purge", {"select": {"all": True}, "limit": 2})
    assert (found["purged"], "cursor" in found) == (2, True)
    again = {"select": {"all": True}, "cursor": found["cursor"]}
    assert (await ask(house, "POST", f"{LETTERS}/purge", again))[1] == {"purged": 1}


# -- cut off at any step -----------------------------------------------------------------------


class Killed(Exception):
    """The process ends here."""


class Fuse:
    """Lets so many calls of all ports through; the next one is cut off, before it or after it."""

    def __init__(self, calls: int, *, after: bool) -> None:
        self.left = calls
        self.after = after
        self.burnt = False

    def around(self, port: Any) -> Any:
        return _Fused(port, self)


class _Fused:
    def __init__(self, port: Any, fuse: Fuse) -> None:
        self._port = port
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if not asyncio.iscoroutinefunction(method):
            return method

        async def call(*args: Any, **given: Any) -> Any:
            fuse = self._fuse
            fuse.left -= 1
            if fuse.left == 0 and not fuse.after:
                fuse.burnt = True
                raise Killed
            result = await method(*args, **given)
            if fuse.left == 0:
                fuse.burnt = True
                raise Killed
            return result

        return call


@pytest.fixture(params=["memory", "redis"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    settings = Settings(data_dir=tmp_path)
    if request.param == "redis":
        server: Redis = request.getfixturevalue("redis_server")
        settings = Settings(data_dir=tmp_path, store_url=f"{server.url.rpartition('/')[0]}/15")
    async with open_broker(settings) as found:
        await found.queue.declare(VERSION)
        yield found


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_redrive_that_is_cut_off_anywhere_is_neither_lost_nor_doubled(broker: Broker, after: bool) -> None:
    """Killed at the n-th exchange with any server, for every n there is; then asked again, by another process."""

    async def pick(letter: DeadLetter) -> Version:
        return THE_VERSION

    for step in range(1, 50):
        letter_id = await _dead(broker, b"b" * LARGE)
        fuse = Fuse(step, after=after)
        ports = ("queue", "results", "dead_letters", "blobs")
        fused = replace(broker, **{name: fuse.around(getattr(broker, name)) for name in ports})
        with suppress(Killed):
            await dead_letters.redrive(fused, ME, letter_id, pick=pick)
        first = await dead_letters.redrive(broker, ME, letter_id, pick=pick)
        second = await dead_letters.redrive(broker, ME, letter_id, pick=pick)
        assert first == second
        assert await _ran(broker) == [first.redriven_as]
        if not fuse.burnt:
            assert step > 6
            return
    raise AssertionError("a redrive has no end")


async def _dead(broker: Broker, body: bytes) -> str:
    submission = Submission(principal=ME, function_id=FUNCTION, version_id=VERSION, headers=(), body=body)
    async with asyncio.TaskGroup() as tasks:
        record = await invoke(broker, submission, THE_VERSION, wait_s=0, spawn=tasks.create_task)
    delivery = await broker.queue.take(VERSION)
    assert delivery is not None
    await undertaker.bury(broker, delivery, END)
    return record.id


async def _ran(broker: Broker) -> list[str]:
    """What sidecars run of all that is queued: the IDs of granted claims."""
    granted = []
    while delivery := await broker.queue.take(VERSION):
        claim = await broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
        if claim.lease is not None:
            done = Outcome(status=200)
            await broker.results.settle(claim.lease, delivery.job, RequestState.FULFILLED, done)
            granted.append(delivery.job.id)
        await delivery.ack()
    return granted


# -- the command -------------------------------------------------------------------------------


async def command(house: House, *arguments: str) -> Result:
    """`fnqueue dead-letters …`, in a thread: it blocks."""
    given = ["dead-letters", *arguments, "--url", house.url, "--key", KEY]
    return await asyncio.to_thread(CliRunner().invoke, cli, given)


async def test_the_command_lists_and_counts(house: House) -> None:
    request_id = await die(house)
    table = (await command(house, "list", "--cause", "rejected")).stdout.splitlines()
    assert table[0].split() == ["DIED", "REQUEST", "VERSION", "CAUSE", "REDRIVEN", "AS"]
    assert table[1].split()[1:] == [request_id, VERSION, "rejected", "-"]
    assert json.loads((await command(house, "list", "--cause", "queue-full", "--json")).stdout) == []
    [group] = json.loads((await command(house, "causes", "--not-redriven", "--json")).stdout)
    assert (group["cause"], group["count"]) == ("rejected", 1)
    assert (await command(house, "causes")).stdout.splitlines()[1].split()[:2] == ["rejected", "1"]


async def test_the_command_shows_a_letter_and_writes_its_input(house: House) -> None:
    small, large = await die(house, b'{"a": 1}'), await die(house, b"l" * LARGE)
    shown = (await command(house, "show", small)).stdout
    assert small in shown
    assert '{"a": 1}' in shown
    for request_id, body in ((small, b'{"a": 1}'), (large, b"l" * LARGE)):
        assert (await command(house, "show", request_id, "--body")).stdout_bytes == body
    assert json.loads((await command(house, "show", small, "--json")).stdout)["cause"] == "rejected"


async def test_the_command_redrives_and_purges(house: House) -> None:
    ids = [await die(house) for _ in range(3)]
    done = json.loads((await command(house, "redrive", ids[0], "--json")).stdout)
    assert [each["requestId"] for each in done["redriven"]] == [ids[0]]
    rest = (await command(house, "redrive", "--all", "--rate", "5")).stdout.splitlines()[1:]
    assert {line.split()[0] for line in rest} == set(ids[1:])
    assert {(await house.finish()).id for _ in range(3)} == {
        done["redriven"][0]["redrivenAs"],
        *(line.split()[1] for line in rest),
    }
    assert (await command(house, "purge", "--cause", "rejected")).stdout == "3 purged\n"


async def test_the_command_says_in_one_line_what_went_wrong(house: House) -> None:
    unknown = await command(house, "redrive", NOBODYS)
    assert unknown.exit_code == 1
    assert "1 were not started" in unknown.stderr
    for vague in (["redrive"], ["purge", NOBODYS, "--all"]):
        assert (await command(house, *vague)).exit_code == 2
    missing = await command(house, "show", NOBODYS)
    assert (missing.exit_code, "404: no such dead letter" in missing.stderr) == (1, True)
