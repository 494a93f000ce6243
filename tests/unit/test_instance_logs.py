"""What instances write: as a launcher reads it, as a controller copies it, and as the API shows it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker import instance_logs
from broker.model import Deployment, Ended, GpuSpecification, Instance, InstanceStatus, LogLine, Look, Part
from broker.ports import ENDED_BYTES, ENDED_KEPT_S, ENDED_LINES, LOG_BYTES, LOG_LINES, MOST_ENDED
from tests.eventually import eventually
from tests.sse import Listening, listening
from tests.unit.launchers import FakeInstance, FakeLauncher
from tests.unit.test_server import FUNCTION, NOBODYS, NVCF, VERSION, House, caller, opened
from workers.controller.instance_logs import Copier, ends_of, told, wanted, wanted_ended
from workers.launchers import logs
from workers.loops import beside, every

ONE, OTHER = str(uuid.uuid4()), str(uuid.uuid4())
LOGS = f"{NVCF}/logs/functions/{FUNCTION}/versions/{VERSION}"

# -- read from a file --------------------------------------------------------------------------------


def written(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def texts(excerpt: Any) -> list[str]:
    return [line.text for line in excerpt.lines]


def test_a_file_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "container.log"
    written(path, "one\ntwo\nhal")
    os.utime(path, (5000.0, 5000.0))
    first = logs.of_file(path, after="")
    assert first.lines == (LogLine(5000.0, "one"), LogLine(5000.0, "two"))
    assert logs.of_file(path, after=first.position).position == first.position
    written(path, "f\r\n\nthree\n")
    assert texts(logs.of_file(path, after=first.position)) == ["half", "", "three"]


def test_of_a_long_file_the_end_is_read_and_a_later_gap_is_told(tmp_path: Path) -> None:
    path = tmp_path / "container.log"
    row = "x" * 999 + "\n"
    written(path, row * (LOG_BYTES // 1000 * 3) + "last\n")
    first = logs.of_file(path, after="")
    assert texts(first)[-1] == "last"
    assert set(texts(first)[:-1]) == {"x" * 999}, "no part of a line"
    assert sum(len(text) + 1 for text in texts(first)) <= LOG_BYTES
    written(path, row * (LOG_BYTES // 1000 * 2))
    assert texts(logs.of_file(path, after=first.position))[0] == logs.LEFT_OUT


def test_of_many_short_lines_the_last_are_read(tmp_path: Path) -> None:
    path = tmp_path / "container.log"
    written(path, "".join(f"{number}\n" for number in range(LOG_LINES + 5)))
    assert texts(logs.of_file(path, after=""))[0] == "5"
    assert texts(logs.of_file(path, after="0"))[:2] == [logs.LEFT_OUT, "5"]


def test_a_line_without_an_end_is_read_when_there_is_too_much_of_it(tmp_path: Path) -> None:
    path = tmp_path / "container.log"
    path.write_bytes(b"\xff" * (LOG_BYTES + 5))
    assert len(texts(logs.of_file(path, after=""))) == 1


def test_a_file_that_is_missing_or_shorter_than_it_was_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "container.log"
    assert logs.of_file(path, after="") == logs.of_file(path, after="0")
    assert logs.of_file(path, after="").lines == ()
    written(path, "new\n")
    assert texts(logs.of_file(path, after="700")) == ["new"]


# -- read from an engine -----------------------------------------------------------------------------


def test_lines_with_times_are_read_on_to_the_nanosecond() -> None:
    text = (
        "2026-01-31T08:00:00.000000001Z one\n"
        "2026-01-31T09:00:00.5+01:00 two\n"
        "the rest of it\n"
        "2026-01-31T08:00:01Z \n"
    )  # fmt: skip
    first = logs.stamped(text, after="")
    start = 1769846400.0
    assert first.lines == (
        LogLine(start + 1e-9, "one"),
        LogLine(start + 0.5, "two"),
        LogLine(start + 0.5, "the rest of it"),
        LogLine(start + 1.0, ""),
    )
    assert start - 5 < logs.since_s(first.position) < start + 1
    assert logs.stamped(text, after=first.position).lines == ()
    later = text + "2026-01-31T08:00:01.000000001Z three\n"
    assert texts(logs.stamped(later, after=first.position)) == ["three"]
    assert logs.since_s("") == 0


def test_of_lines_of_one_second_each_is_read_once() -> None:
    text = "2026-01-31T08:00:00Z one\n2026-01-31T08:00:01Z two\n"
    first = logs.stamped(text, after="")
    assert logs.stamped(text, after=first.position).position == first.position
    text += "2026-01-31T08:00:01Z three\n"
    second = logs.stamped(text, after=first.position)
    assert texts(second) == ["three"]
    text += "2026-01-31T08:00:01Z four\n2026-01-31T08:00:02Z five\n"
    assert texts(logs.stamped(text, after=second.position)) == ["four", "five"]
    assert logs.stamped("", after=second.position).position == second.position


def test_of_lines_with_times_a_gap_is_told() -> None:
    many = "".join(f"2026-01-31T08:00:00.{number:09}Z {number}\n" for number in range(1, LOG_LINES + 1))
    assert texts(logs.stamped(many, after=""))[0] == "1"
    behind = logs.stamped("2026-01-31T07:00:00Z before\n", after="").position
    assert texts(logs.stamped(many, after=behind))[:2] == [logs.LEFT_OUT, "1"]


# -- copied ------------------------------------------------------------------------------------------


def test_of_the_sidecar_what_is_public_is_told_and_of_neither_a_credential() -> None:
    assert list(
        told(
            Part.SIDECAR,
            [
                LogLine(9.0, '{"time":"2026-01-31T08:00:00.250Z","level":"INFO","event":"claimed"}'),
                LogLine(
                    9.0,
                    '{"time":"2026-01-31T08:00:00.250Z","level":"WARNING","logger":"w","event":"container_lost",'
                    '"public":true,"cause":"amqp://u:hidden@host/"}',
                ),
                LogLine(9.0, '{"public":true}'),
                LogLine(9.0, "Traceback"),
            ],
        )
    ) == [LogLine(1769846400.25, "container_lost cause=amqp://u:***@host/")]
    [line] = told(Part.CONTAINER, [LogLine(9.0, "GET /x Authorization: Bearer hidden\0")])
    assert line == LogLine(9.0, "GET /x Authorization: Bearer ***")


def test_who_asks_for_one_instance_has_no_other_read() -> None:
    here = [FakeInstance(name, "v", "s") for name in ("a", "b")] + [FakeInstance("c", "w", "s")]
    everything, one = (Look(account="x", version_id="v", instance_id=name) for name in ("", "b"))
    assert wanted(here, [one]) == ["b"]
    assert wanted(here, [everything]) == ["a", "b"]
    assert wanted(here, [everything, one]) == ["b", "a"]


# -- of those that are gone --------------------------------------------------------------------------


def an_end(instance_id: str, version_id: str = "v", at: float = 0.0) -> Ended:
    return Ended(instance_id=instance_id, version_id=version_id, at=at, cause="stopped")


def test_an_end_is_noted_beside_the_logs_and_forgotten_in_time(tmp_path: Path) -> None:
    now = time.time()
    ends = [an_end("old", at=now - ENDED_KEPT_S - 1), an_end("late", at=now), an_end("early", at=now - 60)]
    for end in ends:
        logs.keep(tmp_path, end.instance_id, {"container.log": "words\n"})
        logs.note_end(tmp_path, end)
    logs.note_end(tmp_path, an_end("without a folder", at=now))
    logs.keep(tmp_path, "damaged", {"ended.json": "{"})
    assert logs.ended(tmp_path) == [ends[1], ends[2]]
    assert logs.ended(tmp_path / "none") == []


def test_of_those_that_are_gone_the_newest_few_are_read_and_who_is_asked_for() -> None:
    ended = [an_end(str(number)) for number in range(MOST_ENDED + 3)] + [an_end("c", "w")]
    everything, last = (Look(account="x", version_id="v", instance_id=name) for name in ("", str(MOST_ENDED + 2)))
    assert [each.instance_id for each in wanted_ended(ended, [last])] == [str(MOST_ENDED + 2)]
    assert [each.instance_id for each in wanted_ended(ended, [everything])] == [str(n) for n in range(MOST_ENDED)]
    assert len(wanted_ended(ended, [everything, last])) == MOST_ENDED + 1


def test_of_what_one_wrote_the_end_is_kept() -> None:
    many = [LogLine(1.0, str(number)) for number in range(ENDED_LINES + 5)]
    assert ends_of(many) == many[5:]
    long = [LogLine(1.0, "x" * (ENDED_BYTES // 2 - 1)) for _ in range(3)]
    assert ends_of(long) == long[1:]


# -- shown -------------------------------------------------------------------------------------------


@dataclass
class Logged:
    """A house with a controller that copies, and two instances."""

    house: House
    launcher: FakeLauncher

    def write(self, instance_id: str, *lines: str, at: float = 1000.0, part: Part = Part.CONTAINER) -> None:
        self.launcher.logs.setdefault((instance_id, part), []).extend(LogLine(at, line) for line in lines)

    async def report(self, *instance_ids: str) -> None:
        for instance_id in instance_ids:
            beat = Instance(
                id=instance_id,
                function_id=FUNCTION,
                version_id=VERSION,
                account="default",
                gpu="CPU",
                instance_type="CPU",
                backend="local",
                status=InstanceStatus.RUNNING,
                created_at=0.0,
                updated_at=0.0,
            )
            await self.house.broker.catalog.beat(beat, ttl_s=600.0)

    async def get(self, query: str = "") -> tuple[list[str], list[str]]:
        """Texts, and who did not answer."""
        async with self.house.client.get(LOGS + query) as response:
            assert response.status == 200, await response.text()
            found = await response.json()
        return [line["text"] for line in found["lines"]], found["unanswered"]

    @asynccontextmanager
    async def listener(self, query: str = "", *, last_id: str = "") -> AsyncIterator[Listening]:
        async with (
            asyncio.timeout(60),
            listening(self.house.client, f"{LOGS}/events{query}", last_id=last_id) as found,
        ):
            assert found.response.status == 200
            yield found


@pytest.fixture
async def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Logged]:
    monkeypatch.setattr(instance_logs, "_POLL_S", 0.02)
    monkeypatch.setattr(instance_logs, "_LOOKED_S", 0.01)
    monkeypatch.setattr(instance_logs, "_AGAIN_S", 0.05)
    async with opened(tmp_path) as house:
        launcher = FakeLauncher()
        found = Logged(house, launcher)
        for instance_id in (ONE, OTHER):
            launcher.instances[instance_id] = FakeInstance(instance_id, VERSION, "s")
        deployment = Deployment(
            id=str(uuid.uuid4()),
            function_id=FUNCTION,
            version_id=VERSION,
            account="default",
            specifications=(
                GpuSpecification(id="s", gpu="CPU", instance_type="CPU", min_instances=1, max_instances=2),
            ),
            created_at=0.0,
            updated_at=0.0,
        )
        await house.broker.catalog.deployments.put(deployment)
        await found.report(ONE, OTHER)
        async with beside(every(0.01, Copier(house.broker, launcher).step, name="instance_logs")):
            yield found


async def test_nothing_is_read_while_nobody_looks(logged: Logged) -> None:
    copier = Copier(logged.house.broker, logged.launcher)
    await copier.step()
    assert logged.launcher.reads == 0
    await logged.get()
    assert logged.launcher.reads > 0


async def test_the_last_lines_of_all_instances_come_by_time(logged: Logged) -> None:
    logged.write(ONE, "a", "b", at=1000.0)
    logged.write(OTHER, "c", at=999.0)
    logged.write(ONE, "d", at=1001.0)
    assert await logged.get() == (["c", "a", "b", "d"], [])
    assert await logged.get("?tail=2") == (["b", "d"], [])
    assert await logged.get(f"?instanceId={OTHER}") == (["c"], [])
    assert await logged.get("?since=1970-01-01T00:16:40Z") == (["a", "b", "d"], [])
    assert await logged.get("?tail=0") == ([], [])


async def test_who_does_not_answer_is_told(logged: Logged, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(instance_logs, "_COPIED_S", 0.5)
    logged.write(ONE, "a")
    logged.launcher.unreadable.add(OTHER)
    _, unanswered = await logged.get()
    assert OTHER in unanswered
    await eventually(logged.get, lambda found: found == (["a"], [OTHER]), within_s=30.0)
    assert sum(record.getMessage() == "log_unreadable" for record in caplog.records) <= 1


async def test_an_instance_that_does_not_report_yet_is_shown(logged: Logged) -> None:
    for row in await logged.house.broker.catalog.instances(VERSION):
        await logged.house.broker.catalog.retire(row)
    logged.write(ONE, "loading the model")
    assert await logged.get() == (["loading the model"], [])


async def test_of_an_instance_that_died_the_last_lines_and_its_end_are_shown(logged: Logged) -> None:
    logged.write(ONE, *map(str, range(ENDED_LINES + 2)), "Traceback", at=time.time() - 60)
    logged.write(OTHER, "well", at=time.time() - 30)
    logged.launcher.kill(ONE, "container exited with status 3: amqp://u:hidden@host/\nTraceback")
    await logged.launcher.stop(ONE, grace_s=0.0)
    for row in await logged.house.broker.catalog.instances(VERSION):
        if row.id == ONE:
            await logged.house.broker.catalog.retire(row)
    end = "instance_ended cause=container exited with status 3: amqp://u:***@host/"
    for _ in range(2):
        lines, unanswered = await logged.get("?tail=1000")
        assert lines == [*map(str, range(3, ENDED_LINES + 2)), "Traceback", "well", end]
        assert unanswered == []
    assert await logged.get("?tail=1&previous=true") == ([end], [])
    assert await logged.get(f"?tail=2&instanceId={ONE}") == (["Traceback", end], [])
    async with logged.house.client.get(f"{LOGS}?tail=1000&previous=true") as response:
        found = await response.json()
    assert {line["instanceId"] for line in found["lines"]} == {ONE}
    [ended] = found["ended"]
    assert (ended["instanceId"], ended["cause"]) == (ONE, end.partition("=")[2])


async def test_a_follower_of_one_that_dies_gets_the_rest_once_and_its_end(logged: Logged) -> None:
    logged.write(ONE, "a")
    async with logged.listener() as stream:
        assert [line["text"] for line in (await stream.until("lines")).data["lines"]] == ["a"]
        logged.write(ONE, "b")
        logged.launcher.kill(ONE)
        await logged.launcher.stop(ONE, grace_s=0.0)
        seen: list[str] = []
        while "instance_ended cause=container was killed by signal 9" not in seen:
            seen += [line["text"] for line in (await stream.until("lines")).data["lines"]]
        assert seen == ["b", "instance_ended cause=container was killed by signal 9"]


async def test_where_none_runs_those_that_ended_are_all_shown(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_logs, "_SEEN_S", 0.5)
    for row in await logged.house.broker.catalog.instances(VERSION):
        logged.write(row.id, row.id, at=1000.0)
        await logged.launcher.stop(row.id, grace_s=0.0)
        await logged.house.broker.catalog.retire(row)
    lines, _ = await logged.get()
    assert set(lines) == {ONE, OTHER, "instance_ended cause=stopped"}
    assert len(lines) == 4


async def test_of_what_is_not_deployed_nothing_is_waited_for(logged: Logged) -> None:
    for row in await logged.house.broker.catalog.instances(VERSION):
        await logged.house.broker.catalog.retire(row)
    await logged.house.broker.catalog.deployments.delete(VERSION)
    assert await logged.get() == ([], [])
    assert await logged.house.broker.instance_logs.looks() == []
    async with logged.listener() as stream:
        assert [event.name for event in await stream.rest()] == ["done"]


async def test_a_follower_gets_each_line_once_and_goes_on_after_the_last_one(logged: Logged) -> None:
    logged.write(ONE, "a", "b", "c")
    async with logged.listener("?tail=2") as stream:
        first = await stream.until("lines")
        assert [line["text"] for line in first.data["lines"]] == ["b", "c"]
        assert set(first.data["lines"][0]) == {"at", "instanceId", "part", "text"}
        logged.write(OTHER, "d")
        assert [line["text"] for line in (await stream.until("lines")).data["lines"]] == ["d"]
        last_id = stream.last_id
    logged.write(ONE, "e")
    async with logged.listener("?tail=2", last_id=last_id) as stream:
        assert [line["text"] for line in (await stream.until("lines")).data["lines"]] == ["e"]


async def test_a_follower_of_one_instance_gets_no_other(logged: Logged) -> None:
    async with logged.listener(f"?instanceId={ONE}") as stream:
        logged.write(OTHER, "no")
        logged.write(ONE, "yes")
        assert [line["text"] for line in (await stream.until("lines")).data["lines"]] == ["yes"]


async def test_a_follower_is_told_when_nothing_is_deployed_any_more(logged: Logged) -> None:
    logged.write(ONE, "a")
    async with logged.listener() as stream:
        await stream.until("lines")
        for row in await logged.house.broker.catalog.instances(VERSION):
            await logged.house.broker.catalog.retire(row)
        await logged.house.broker.catalog.deployments.delete(VERSION)
        assert [event.name for event in await stream.rest()][-1] == "done"


async def test_two_controllers_copy_each_line_once(logged: Logged) -> None:
    async with beside(every(0.005, Copier(logged.house.broker, logged.launcher).step, name="another")):
        for number in range(50):
            logged.write(ONE, str(number))
            await asyncio.sleep(0)
        lines = await eventually(logged.get, lambda found: len(found[0]) >= 50, within_s=30.0)
    assert lines == ([str(number) for number in range(50)], [])


async def test_logs_are_the_accounts_own_and_need_a_scope(logged: Logged) -> None:
    async with (
        caller(logged.house, "stranger") as stranger,
        caller(logged.house, "default", "invoke_function") as invoker,
    ):
        for path in (LOGS, f"{LOGS}/events"):
            async with stranger.get(path) as response:
                assert response.status == 404
            async with invoker.get(path) as response:
                assert response.status == 403
    async with logged.house.client.get(f"{NVCF}/logs/functions/{FUNCTION}/versions/{NOBODYS}") as response:
        assert response.status == 404


@pytest.mark.parametrize("query", ["?tail=1001", "?tail=-1", "?since=yesterday", "?instanceId=one"])
async def test_what_cannot_be_asked_is_refused(logged: Logged, query: str) -> None:
    for path in (LOGS, f"{LOGS}/events"):
        async with logged.house.client.get(path + query) as response:
            assert response.status == 400
