"""The commands for callers on both families, as they are typed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fnqueue.cli import cli
from tests.e2e import dev
from tests.e2e.conftest import Gate, Mirror, Site, begun, idle
from tests.house import Caller, Function

LIMIT_S = 60.0
NAME = "echo-of-the-commands"


@pytest.fixture(scope="module")
async def echo(caller: Caller) -> AsyncIterator[Function]:
    function = await caller.deploy("fnqueue/echo:latest", inference_url="/echo", concurrency=4, name=NAME)
    yield function
    await function.undeploy()


class Shell:
    def __init__(self, site: Site, home: Path) -> None:
        self._environment = {
            "FNQUEUE_URL": site.url,
            "FNQUEUE_API_KEY": site.key,
            "XDG_CONFIG_HOME": str(home),
            "FNQUEUE_CONFIG": None,
        }

    async def fnqueue(self, *words: str, given: bytes = b"") -> Result:
        return await asyncio.to_thread(CliRunner(env=self._environment).invoke, cli, words, input=given)

    async def told(self, *words: str) -> Any:
        """What a command prints with `--json`."""
        done = await self.fnqueue(*words, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)


@pytest.fixture
def shell(site: Site, tmp_path: Path) -> Shell:
    return Shell(site, tmp_path)


async def test_invoke_prints_the_answer(shell: Shell, echo: Function, tmp_path: Path) -> None:
    order = '{"message": "hi", "repeats": 2}'
    done = await shell.fnqueue("invoke", NAME, "--data", order)
    assert (done.exit_code, done.stdout, done.stderr) == (0, '{"echo":"hi hi"}', "")
    assert (await shell.fnqueue("invoke", echo.id, "-d", "-", given=order.encode())).stdout == '{"echo":"hi hi"}'
    told = await shell.told("invoke", echo.id, "-d", order, "--version", echo.version_id)
    assert (told["result"], told["statusCode"]) == ({"echo": "hi hi"}, 200)
    target = tmp_path / "answer.json"
    assert (await shell.fnqueue("invoke", echo.id, "-d", order, "-o", str(target))).stdout == ""
    assert json.loads(target.read_bytes()) == {"echo": "hi hi"}


async def test_invoke_gives_files_in_and_out(shell: Shell, mirror: Mirror, tmp_path: Path) -> None:
    """As a whole, and in a field, too large for a body."""
    small, large = tmp_path / "a.txt", tmp_path / "b.bin"
    small.write_bytes(b"small")
    large.write_bytes(bytes(6 * 1024 * 1024))
    function = mirror.function.id
    assert (await shell.fnqueue("invoke", function, "--input", str(small))).stdout == "small"
    done = await shell.fnqueue("invoke", function, "-f", f"video={large}", "-d", '{"x": 1}')
    assert done.exit_code == 0, done.output
    echoed = json.loads(done.stdout)
    assert echoed["x"] == 1
    assert echoed["video"].startswith("data:application/octet-stream;asset_id,")
    assert "uploading b.bin: 100 % of 6.0 MiB" in done.stderr


async def test_watching_tells_what_happens(shell: Shell, echo: Function) -> None:
    done = await shell.fnqueue("invoke", NAME, "-d", '{"message": "hi", "delay": 0.1}', "--watch")
    assert done.stdout == '{"echo":"hi"}'
    first, *told = done.stderr.splitlines()
    assert first.startswith("request ")
    assert told[-2:] == ["running", "fulfilled"]


async def test_a_request_is_left_looked_at_and_cancelled(
    shell: Shell, recorder: Function, caller: Caller, gate: Gate
) -> None:
    await begun(caller, recorder, gate.order())
    left = await shell.fnqueue("invoke", recorder.id, "--no-wait", "-d", json.dumps(gate.order()))
    request_id = left.stdout.strip()
    shown = await shell.fnqueue("status", request_id)
    assert "Status       queued" in shown.stdout
    assert "Position     1 of 1" in shown.stdout
    assert (await shell.told("status", request_id))["status"] == "queued"
    [row] = [row for row in await shell.told("queue", recorder.id) if row["functionVersionId"] == recorder.version_id]
    assert (row["queueDepth"], row["inFlight"]) == (1, 1)
    assert recorder.version_id in (await shell.fnqueue("queue")).stdout
    assert (await shell.fnqueue("cancel", request_id)).stdout == f"{request_id}  cancelled\n"
    ended = await shell.fnqueue("status", request_id, "--watch")
    assert "Status       cancelled\n" in ended.stdout
    gate.open()
    await idle(caller, recorder)


async def test_scripts_can_tell_failures_apart(shell: Shell, echo: Function, tmp_path: Path) -> None:
    failed = await shell.fnqueue("invoke", NAME, "-d", '{"message": 3}')
    assert failed.exit_code == 3
    assert "422: message: must be a string" in failed.stderr
    unfinished = await shell.fnqueue("invoke", NAME, "-d", '{"message": "x", "delay": 600}', "--timeout", "1")
    assert unfinished.exit_code == 4
    request_id = unfinished.stderr.split("request ")[1].split()[0]
    assert (await shell.fnqueue("cancel", request_id)).exit_code == 0
    for words in (
        ("invoke", NAME, "-d", "{"),
        ("invoke", NAME, "-d", "@/nowhere"),
        ("invoke", NAME, "-f", "image"),
        ("invoke", NAME, "-d", "[]", "-f", "a=b"),
        ("invoke", NAME, "-d", "{}", "-i", "x"),
        ("invoke", NAME, "--watch", "--stream"),
        ("status", "no-id"),
    ):
        assert (await shell.fnqueue(*words)).exit_code == 2, words
    assert (await shell.fnqueue("invoke", "nobody-has-this-name")).exit_code == 1
    assert (await shell.fnqueue("invoke", NAME, "-f", f"image={tmp_path / 'missing'}")).exit_code == 1


# A process of its own, because it is interrupted; one family is enough for that.
@pytest.mark.parametrize("site", ["embedded"], indirect=True, scope="session")
async def test_an_interrupt_leaves_the_request_running_and_says_how_to_find_it(
    site: Site, caller: Caller, recorder: Function, gate: Gate, tmp_path: Path
) -> None:
    settings = {"FNQUEUE_URL": site.url, "FNQUEUE_API_KEY": site.key, "XDG_CONFIG_HOME": str(tmp_path)}
    words = ("-P", "-m", "fnqueue", "invoke", recorder.id, "-d", json.dumps(gate.order()), "--watch")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, env=dev.environment(**settings), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(LIMIT_S):
            request_id = (await process.stderr.readline()).decode().split()[1]
            while await process.stderr.readline() != b"running\n":
                pass
            process.send_signal(signal.SIGINT)
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 130
    assert said.decode().strip() == f"request {request_id} goes on: fnqueue status {request_id}"
    gate.open()
    assert (await caller.result(request_id)).status == 200


async def test_assets_are_uploaded_listed_and_deleted(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "receipt.png"
    path.write_bytes(b"png")
    asset_id = (await shell.fnqueue("assets", "upload", str(path))).stdout.strip()
    assert {"assetId": asset_id, "contentType": "image/png", "description": "receipt.png"}.items() <= next(
        row for row in await shell.told("assets", "list") if row["assetId"] == asset_id
    ).items()
    assert asset_id in (await shell.fnqueue("assets", "list")).stdout
    assert await shell.told("assets", "delete", asset_id) == {"deleted": [asset_id]}
    assert (await shell.fnqueue("assets", "delete", asset_id)).exit_code == 1
