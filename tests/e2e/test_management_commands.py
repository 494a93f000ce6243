"""The commands that make functions run, on both families, as they are typed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Gate, Site, begun, idle
from tests.e2e.test_client_commands import Shell
from tests.house import Caller, Function

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
IMAGE = "fnqueue/echo:latest"


@pytest.fixture
async def shell(site: Site, tmp_path: Path) -> AsyncIterator[Shell]:
    """It tidies up what a failed test leaves."""
    made = Shell(site, tmp_path)
    yield made
    for name in ("lines", "lifecycle", "lost", "hello"):
        await made.fnqueue("functions", "delete", name, "--all")


# It says nothing that would not hold for the other family, and each deployment takes a while.
@pytest.mark.parametrize("site", ["embedded"], indirect=True, scope="session")
async def test_every_line_of_the_page_does_what_it_says(shell: Shell) -> None:
    [block] = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert len(lines) > 4
    for program, *words in lines:
        assert program == "fnqueue"
        done = await shell.fnqueue(*words)
        assert done.exit_code == 0, (words, done.output)


async def test_the_life_of_a_function(shell: Shell) -> None:
    words = ("--image", IMAGE, "--inference-url", "/echo", "--health-url", "/health", "--tag", "mine")
    made = await shell.told("functions", "create", "lifecycle", *words)
    assert made["status"] == "INACTIVE"
    deployed = await shell.told("deploy", "lifecycle", "--gpu", "CPU", "--concurrency", "2")
    assert deployed["function"]["status"] == "ACTIVE"
    assert [each["instanceStatus"] for each in deployed["function"]["activeInstances"]] == ["RUNNING"]

    rows = [row for row in await shell.told("functions", "list", "--status", "active") if row["name"] == "lifecycle"]
    assert [row["versionId"] for row in rows] == [made["versionId"]]
    shown = (await shell.fnqueue("functions", "show", "lifecycle")).stdout
    assert "Deployed     1 to 1 on CPU, 2 at once in each" in shown
    assert re.search(r"^[0-9a-f-]{36}  RUNNING  CPU   -$", shown, re.MULTILINE)

    more = await shell.told("deploy", "lifecycle", "--instances", "2")
    assert more["deployment"]["deploymentSpecifications"][0]["minInstances"] == 2
    added = await shell.told("functions", "version", "add", "lifecycle", "--env", "A=1")
    assert (added["id"], added["tags"]) == (made["id"], ["mine"])
    assert added["versionId"] != made["versionId"]
    gone = await shell.told("functions", "delete", "lifecycle", "--version", added["versionId"])
    assert gone["deleted"] == [{"functionId": made["id"], "functionVersionId": added["versionId"]}]
    undeployed = await shell.told("undeploy", "lifecycle")
    assert undeployed["function"]["status"] == "INACTIVE"
    assert (await shell.fnqueue("functions", "delete", "lifecycle", "--all")).exit_code == 0
    assert (await shell.fnqueue("functions", "show", "lifecycle")).exit_code == 1


async def test_a_function_that_cannot_run_is_told_by_status_and_reason(shell: Shell) -> None:
    words = ("--image", "nobody/has:this", "--inference-url", "/")
    assert (await shell.fnqueue("functions", "create", "lost", *words)).exit_code == 0
    done = await shell.fnqueue("deploy", "lost", "--gpu", "CPU", "--timeout", "60")
    assert done.exit_code == 3, done.output
    assert "nobody/has:this" in done.stderr
    assert "nobody/has:this" in (await shell.fnqueue("logs", "lost")).stdout
    assert re.search(r"^lost +ERROR +- ", (await shell.fnqueue("queue")).stdout, re.MULTILINE)
    assert [row["functionStatus"] for row in await shell.told("queue", "lost")] == ["ERROR"]
    rows = json.loads((await shell.fnqueue("top", "--json", "--count", "1")).stdout)
    assert [row["status"] for row in rows if row["name"] == "lost"] == ["ERROR"]
    assert re.search(r"^lost +ERROR +- ", (await shell.fnqueue("top", "--count", "1")).stdout, re.MULTILINE)


async def test_top_shows_what_waits_and_what_runs(shell: Shell, caller: Caller, recorder: Function, gate: Gate) -> None:
    await begun(caller, recorder, gate.order())
    await caller.submit(recorder.id, gate.order())
    looks = (await shell.fnqueue("top", "--json", "--count", "1")).stdout.splitlines()
    [row] = [row for row in json.loads(looks[0]) if row["functionVersionId"] == recorder.version_id]
    assert (row["queueDepth"], row["inFlight"], row["instancesRunning"], row["instances"]) == (1, 1, 1, 1)
    page = (await shell.fnqueue("top", "--count", "1")).stdout
    assert re.search(rf"^under-test +ACTIVE +1 +\d+ s +1 +1/1 +{recorder.version_id}$", page, re.MULTILINE)
    assert re.search(r"\d+ deployed, \d+ waiting, \d+ running, \d+ of \d+ instances up", page)
    gate.open()
    await idle(caller, recorder)
