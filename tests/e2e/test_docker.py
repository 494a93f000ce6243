"""`make stack ENGINE=podman` as a user has it: a function of an image, its containers killed, and its load gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from infra.local import stack as local
from infra.local.podman import Podman
from tests.eventually import eventually
from tests.house import Caller
from tests.stack import Stack

NVCF = "/v2/nvcf"
IMAGE = "fnqueue/ocr:latest"
RECEIPT = Path(__file__).parents[2] / "examples" / "ocr" / "receipt.png"
REQUESTS = 6
MOST = 2


@pytest.fixture
async def stack(programs: None, tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(tmp_path, ENGINE="podman", FNQUEUE_IDLE_S="3", FNQUEUE_DRAIN_S="20")
    try:
        yield made
    finally:
        await asyncio.to_thread(made.run, "down")
        await asyncio.to_thread(podman_of(made).discard)


def podman_of(stack: Stack) -> Podman:
    return local.Stack(stack.folder / "stack").podman


async def containers(podman: Podman, image: str = IMAGE) -> list[str]:
    """Names of an image's containers that run."""
    listed = await asyncio.to_thread(podman.control, "ps", "--format", "{{.Image}} {{.Names}}")
    return [line.partition(" ")[2] for line in listed.splitlines() if line.partition(" ")[0].endswith(image)]


@pytest.mark.timeout(400)
async def test_a_function_of_an_image_comes_with_the_load_survives_a_kill_and_goes(stack: Stack) -> None:
    printed = await asyncio.to_thread(stack.run, "up")
    assert '{"echo":"hello hello"}' in printed
    podman = podman_of(stack)
    assert len(await containers(podman, "fnqueue/echo:latest")) == 1
    async with aiohttp.ClientSession() as session:
        caller = Caller(session, stack.url, stack.key)
        function = await caller.deploy(IMAGE, inference_url="/ocr", instances=0, most=MOST)
        assert await containers(podman) == []
        sent = [asyncio.create_task(recognise(caller, function.id)) for _ in range(REQUESTS)]
        running = await eventually(lambda: containers(podman), lambda names: len(names) == MOST, within_s=120)
        await asyncio.to_thread(podman.control, "kill", running[0])
        assert all("TOTAL 25.07" in text for text in await asyncio.gather(*sent))
        await eventually(lambda: containers(podman), lambda names: names == [], within_s=120)
        await function.undeploy()
    await asyncio.to_thread(stack.run, "down")
    assert await asyncio.to_thread(podman.control, "ps", "--all", "--quiet") == ""


async def recognise(caller: Caller, function_id: str) -> str:
    headers = {"Content-Type": "image/png", "Prefer": "respond-async"}
    path = f"{NVCF}/pexec/functions/{function_id}"
    accepted = await caller.call("POST", path, body=RECEIPT.read_bytes(), headers=headers)
    assert accepted.status == 202
    reply = await caller.result(accepted.request_id, within_s=300)
    assert reply.status == 200
    return str(reply.json["text"])
