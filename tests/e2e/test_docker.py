"""The product with `docker://`: a function and the real sidecar, each in a container of podman's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.local.images import REPOSITORY
from infra.local.podman import RUNTIME, ULIMITS, Podman
from infra.local.servers import S3, RabbitMQ, Redis
from tests import images
from tests.eventually import eventually
from tests.house import House, running

ECHO = str(REPOSITORY / "examples" / "echo" / "server.py")
PROJECT = "end-to-end"


@pytest.fixture
async def house(
    tmp_path: Path, podman: Podman, product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3
) -> AsyncIterator[House]:
    servers = {
        "FNQUEUE_QUEUE_URL": product_rabbitmq.url,
        # What other tests store there is not deployed here.
        "FNQUEUE_STORE_URL": f"{redis_server.url.rpartition('/')[0]}/13",
        "FNQUEUE_BLOBS_URL": s3.url,
        "FNQUEUE_LAUNCHER_URL": podman.url,
        "FNQUEUE_DOCKER_PROJECT": PROJECT,
        "FNQUEUE_DOCKER_SIDECAR_IMAGE": images.SIDECAR,
        "FNQUEUE_DOCKER_RUNTIME": RUNTIME,
        "FNQUEUE_DOCKER_ULIMITS": ULIMITS,
        "FNQUEUE_DRAIN_S": "5",
    }
    with running(House(tmp_path, servers)) as house:
        yield house


def containers(podman: Podman) -> list[str]:
    """Names of the functions' containers that run."""
    label = f"label=fnqueue.project={PROJECT}"
    return podman.control(
        "ps", "--filter", label, "--filter", "label=fnqueue.role=container", "--format", "{{.Names}}"
    ).split()


async def test_a_killed_container_comes_back_and_no_request_is_lost(house: House, podman: Podman) -> None:
    async with house.caller() as caller:
        function = await caller.deploy(
            images.SERVER, inference_url="/echo", containerArgs=f"{ECHO} --host 0.0.0.0 --port 8000"
        )
        first = await caller.invoke(function.id, {"message": "hello"})
        assert (first.status, first.json) == (200, {"echo": "hello"})
        (before,) = await asyncio.to_thread(containers, podman)
        request_id = await caller.submit(function.id, {"message": "still here", "delay": 3})
        await eventually(
            lambda: caller.position(request_id), lambda reply: reply.json.get("positionInQueue") == 0, within_s=30
        )
        await asyncio.to_thread(podman.control, "kill", before)
        result = await caller.result(request_id, within_s=90)
        assert (result.status, result.json) == (200, {"echo": "still here"})
        after = await eventually(
            lambda: asyncio.to_thread(containers, podman), lambda names: len(names) == 1, within_s=30
        )
        assert after != [before]
        await function.undeploy()
        await eventually(lambda: asyncio.to_thread(containers, podman), lambda names: names == [], within_s=60)
