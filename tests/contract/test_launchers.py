"""One suite for every launcher, with real processes and real containers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker.errors import ConfigurationError
from broker.model import Health, LogLine, Part
from tests.contract.launchers import DEADLINE_S, Containers, Kind, Processes, dead, started, tidy
from tests.eventually import eventually


@pytest.fixture(params=["process", "docker"])
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kind]:
    is_process = request.param == "process"
    made = Processes(tmp_path) if is_process else Containers(tmp_path, request.getfixturevalue("podman"))
    async with tidy(made):
        yield made


async def test_an_instance_runs_until_it_is_stopped_and_its_logs_are_kept(kind: Kind) -> None:
    async with kind.open() as launcher:
        instance_id = await started(launcher, kind.serving)
        other = await started(launcher, kind.serving)
        await kind.up(launcher, instance_id)
        found = {item.instance_id: item for item in await launcher.launched()}
        assert set(found) == {instance_id, other}
        seen = found[instance_id]
        assert (seen.version_id, seen.specification_id) == (kind.serving.id, "spec-1")
        assert (seen.alive, seen.error) == (True, "")
        for _ in range(2):
            await launcher.stop(instance_id, grace_s=5.0)
        assert [item.instance_id for item in await launcher.launched()] == [other]
        assert "NVCF_FUNCTION_ID" in kind.kept_log(instance_id, "container")
        assert kind.kept_log(instance_id, "sidecar") != ""


async def test_an_instance_that_is_on_its_way_can_be_stopped(kind: Kind) -> None:
    async with kind.open() as launcher:
        instance_id = await started(launcher, kind.serving, secrets=b"{}")
        await launcher.stop(instance_id, grace_s=0.0)
        assert await launcher.launched() == []
        assert kind.secrets(instance_id) is None


async def test_a_crash_is_told_with_the_tail_of_the_log(kind: Kind) -> None:
    async with kind.open() as launcher:
        instance_id = await started(launcher, kind.crashing)
        instance = await dead(launcher, instance_id)
        assert instance.error.startswith("container exited with status 3")
        assert instance.error.endswith("the reason")
        assert len(instance.error.encode()) <= 4096
        await launcher.stop(instance_id, grace_s=0.0)
        assert await launcher.launched() == []


async def test_what_an_instance_writes_is_read_on_from_where_it_was(kind: Kind) -> None:
    async with kind.open() as launcher:
        instance_id = await started(launcher, kind.serving)
        position, lines = "", list[LogLine]()

        async def read() -> bool:
            nonlocal position
            excerpt = await launcher.log(instance_id, Part.SIDECAR, after=position)
            position, lines[len(lines) :] = excerpt.position, excerpt.lines
            return any(line.text == "reached" for line in lines)

        began_at = time.time()
        await eventually(read, bool, within_s=2 * DEADLINE_S)
        assert "".join(f"{line.text}\n" for line in lines) == kind.log(instance_id, "sidecar")
        assert all(began_at - 60 < line.at < time.time() + 60 for line in lines)
        [line, *_] = (await launcher.log(instance_id, Part.CONTAINER, after="")).lines
        assert "NVCF_FUNCTION_ID" in line.text
        await launcher.stop(instance_id, grace_s=0.0)
        rest = await launcher.log(instance_id, Part.SIDECAR, after=position)
        assert [line.text for line in rest.lines if line.text == "reached"] == [], "each line once"
        assert (await launcher.log("nobody", Part.CONTAINER, after="")).lines == ()


async def test_what_those_wrote_that_are_gone_is_there_for_the_next_controller_too(kind: Kind) -> None:
    async with kind.open() as launcher:
        crashed, stopped = await started(launcher, kind.crashing), await started(launcher, kind.serving)
        await dead(launcher, crashed)
        await launcher.stop(crashed, grace_s=0.0)
        await kind.up(launcher, stopped)
        assert [each.instance_id for each in await launcher.ended()] == [crashed]
        await launcher.stop(stopped, grace_s=0.0)
    async with kind.open() as launcher:
        second, first = await launcher.ended()
        assert (first.instance_id, first.version_id, first.cause) == (
            crashed, kind.crashing.id, "container exited with status 3",
        )  # fmt: skip
        assert (second.instance_id, second.cause) == (stopped, "stopped")
        assert time.time() - 600 < first.at <= second.at
        lines = (await launcher.log(crashed, Part.CONTAINER, after="")).lines
        assert lines[-1].text == "the reason"
        assert lines[-1].at <= first.at


async def test_instances_outlive_their_controller_and_are_found_again(kind: Kind) -> None:
    async with kind.open() as first:
        instance_id = await started(first, kind.serving)
        await kind.up(first, instance_id)
    async with kind.open() as second:
        (found,) = await second.launched()
        assert (found.instance_id, found.version_id, found.alive) == (instance_id, kind.serving.id, True)
        kind.kill(instance_id, "container")
        # Another process's child: how it ended is not for us to know.
        assert (await dead(second, instance_id)).error.startswith(
            ("container was killed by signal 9", "container is gone")
        )
        await second.stop(instance_id, grace_s=0.0)
        assert await second.launched() == []


async def test_an_instance_whose_sidecar_died_is_dead(kind: Kind) -> None:
    async with kind.open() as launcher:
        instance_id = await started(launcher, kind.serving)
        await kind.up(launcher, instance_id)
        kind.kill(instance_id, "sidecar")
        assert (await dead(launcher, instance_id)).error.startswith("sidecar was killed by signal 9")


async def test_secrets_are_there_from_the_start_and_replaced_while_it_runs(kind: Kind) -> None:
    async with kind.open() as launcher:
        with_secrets = await started(launcher, kind.serving, secrets=b'{"A": "one"}')
        without = await started(launcher, kind.serving)
        await kind.up(launcher, with_secrets)
        assert kind.secrets(with_secrets) == b'{"A": "one"}'
        assert "NVCF_SECRETS_FILE" in kind.told(with_secrets, "container")["environ"]
        await kind.up(launcher, without)
        assert "NVCF_SECRETS_FILE" not in kind.told(without, "container")["environ"]
        for instance_id in (with_secrets, without, "nobody"):
            await launcher.deliver(instance_id, b'{"A": "two"}')
        assert kind.secrets(with_secrets) == b'{"A": "two"}'
        assert kind.secrets(without) is None
        await launcher.stop(with_secrets, grace_s=0.0)
        assert kind.secrets(with_secrets) is None


async def test_what_can_never_start_is_refused_and_leaves_nothing(kind: Kind) -> None:
    async with kind.open() as launcher:
        for version in (
            replace(kind.serving, container_args="'half a word"),
            replace(kind.serving, health=Health(timeout="soon")),
            replace(kind.serving, container_image=""),
        ):
            with pytest.raises(ConfigurationError):
                await started(launcher, version)
        assert await launcher.launched() == []


async def test_there_is_something_to_deploy_to(kind: Kind) -> None:
    async with kind.open() as launcher:
        *_, machine = await launcher.gpus()
        assert (machine.name, machine.instance_type) == ("CPU", "CPU")
        assert machine.capacity >= 1
