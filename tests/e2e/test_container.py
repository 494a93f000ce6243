"""What a container may answer, and what becomes of it, on both families (contract/invocation.md §5 and §8)."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.conftest import MIRROR, Mirror
from tests.eventually import eventually
from tests.house import Caller, Reply

MIB = 1024 * 1024

# -- large results -----------------------------------------------------------------------------


def by_unzip(archive: Path, folder: Path) -> None:
    subprocess.run(["unzip", "-q", archive, "-d", folder], check=True)


def by_python(archive: Path, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "zipfile", "-e", archive, folder], check=True)


UNPACKERS = [by_python, *([by_unzip] if shutil.which("unzip") else [])]


async def downloaded(reply: Reply, path: Path) -> None:
    """By somebody without a key: all they have is the link."""
    assert (reply.status, reply.body) == (302, b"")
    async with aiohttp.ClientSession() as anybody, anybody.get(reply.headers["Location"]) as response:
        assert response.status == 200
        assert "Authorization" not in response.request_info.headers
        with path.open("wb") as file:
            async for chunk in response.content.iter_chunked(MIB):
                file.write(chunk)


@pytest.mark.parametrize("unpack", UNPACKERS)
async def test_a_large_result_unpacks_with_the_standard_tools(
    mirror: Mirror, tmp_path: Path, unpack: Callable[[Path, Path], None]
) -> None:
    files = {"a.txt": "A" * 1000, "deep/er/ünï.txt": "B", "empty": "", "progress": "no report", "half.partial": "no"}
    reply = await mirror.post(b"{}", {"files": files, "size_bytes": 25 * MIB, "seed": 1})
    archive, folder = tmp_path / "result.zip", tmp_path / "unpacked"
    await downloaded(reply, archive)
    unpack(archive, folder)
    found = {
        path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }
    assert found == {
        f"{reply.request_id}.response": digest(random.Random(1).randbytes(25 * MIB)),
        "a.txt": digest(b"A" * 1000),
        "deep/er/ünï.txt": digest(b"B"),
        "empty": digest(b""),
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- a container that is busy ------------------------------------------------------------------


@pytest.fixture(scope="session")
async def one_slot(caller: Caller) -> AsyncIterator[Mirror]:
    function = await caller.deploy(MIRROR)
    yield Mirror(function, caller)
    await function.undeploy()


async def test_a_busy_container_gets_the_job_again_and_others_run_meanwhile(one_slot: Mirror, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    postponed = await one_slot.post(b"later", {"gate": str(gate)}, headers={"Prefer": "respond-async"})
    others = [await one_slot.post(b"now") for _ in range(10)]
    assert {(reply.status, reply.body) for reply in others} == {(200, b"now")}
    assert (await one_slot.caller.status(postponed.request_id, wait_s=0)).status == 202
    gate.touch()
    reply = await one_slot.caller.result(postponed.request_id)
    assert (reply.status, reply.body) == (200, b"later")


async def test_a_postponed_request_waits_in_its_place_and_can_be_cancelled(one_slot: Mirror, tmp_path: Path) -> None:
    caller = one_slot.caller
    order = {"gate": str(tmp_path / "closed"), "retry_after": "60"}
    accepted = await one_slot.post(b"", order, headers={"Prefer": "respond-async"})

    async def place() -> tuple[int, str, int, int, int]:
        seen = await caller.status(accepted.request_id, wait_s=0)
        position = (await caller.position(accepted.request_id)).json["positionInQueue"]
        [queue] = (await caller.depth(one_slot.function.id)).json["queues"]
        return seen.status, seen.headers["NVCF-STATUS"], position, queue["queueDepth"], queue["inFlight"]

    assert (await one_slot.post(b"now")).body == b"now"  # so the container has refused the first
    await eventually(place, lambda found: found == (202, "pending-evaluation", 1, 1, 0))
    assert (await caller.cancel(accepted.request_id)).status in (200, 202, 204)
    assert (await one_slot.post(b"now")).body == b"now"
    [queue] = (await caller.depth(one_slot.function.id)).json["queues"]
    assert (queue["queueDepth"], queue["inFlight"]) == (0, 0)


async def test_in_passthrough_the_caller_is_told_that_the_container_is_busy(one_slot: Mirror, tmp_path: Path) -> None:
    raw = {"nvcf-feature-disable-worker-compatibility": "true"}
    reply = await one_slot.post(b"", {"gate": str(tmp_path / "closed")}, headers=raw)
    assert (reply.status, reply.headers["Retry-After"], reply.json) == (503, "1", {"error": "busy"})


# -- health ------------------------------------------------------------------------------------


async def test_a_container_may_be_asked_by_grpc_how_it_is(caller: Caller) -> None:
    health = {"protocol": "grpc", "uri": "/grpc", "port": 50051, "timeout": "PT5S", "expectedStatusCode": 200}
    function = await caller.deploy(MIRROR, health=health)
    reply = await caller.call("GET", f"/v2/nvcf/functions/{function.id}/versions/{function.version_id}")
    assert reply.json["function"]["health"] == health | {"protocol": "gRPC"}
    assert (await Mirror(function, caller).post(b"well")).body == b"well"
    await function.undeploy()
