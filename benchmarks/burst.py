"""`python -m benchmarks.burst --requests 500`: a burst on a function that has no instance, against a running stack.

Deploys the text recognition sample between none and `--most` instances, waits until it is ACTIVE, sends one picture in
every request at once, and watches instances come and go. Exits with 1 unless every request was answered with the text.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click
import orjson

NVCF = "/v2/nvcf"
PICTURE = Path(__file__).resolve().parents[1] / "examples" / "ocr" / "receipt.png"
EXPECTED = "TOTAL 25.07"
SAMPLE_S = 0.5
POLL_S = 30
READY_S = 300.0
FUNCTION = {
    "name": "burst",
    "inferenceUrl": "/ocr",
    "inferencePort": 8000,
    "health": {"protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200},
}


@dataclass(slots=True)
class Watched:
    """Instances by time: a line each time that their number changed."""

    began_at: float = field(default_factory=time.monotonic)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def saw(self, instances: int) -> None:
        if not self.changes or self.changes[-1][1] != instances:
            self.changes.append((round(time.monotonic() - self.began_at, 1), instances))

    @property
    def most(self) -> int:
        return max(count for _, count in self.changes)


@click.command()
@click.option("--url", envvar="FNQUEUE_URL", default="http://127.0.0.1:8080", show_default=True)
@click.option("--key", envvar="FNQUEUE_API_KEY", required=True, help="An API key; or FNQUEUE_API_KEY.")
@click.option("--image", default="fnqueue/ocr:latest", show_default=True, help="Container image of the sample.")
@click.option("--requests", "count", type=click.IntRange(1, 100_000), default=500, show_default=True)
@click.option("--most", type=click.IntRange(1, 100), default=4, show_default=True, help="maxInstances.")
@click.option("--idle-s", type=float, default=600.0, show_default=True, help="Wait so long for the last to go.")
def main(url: str, key: str, image: str, count: int, most: int, idle_s: float) -> None:
    """Throw a burst at a function without instances, and print JSON."""
    measured = asyncio.run(_measure(url, key, image, count, most, idle_s))
    click.echo(orjson.dumps(measured, option=orjson.OPT_INDENT_2))
    sys.exit(0 if measured["answers"] == {"200": count} and measured["instances"][-1][1] == 0 else 1)


async def _measure(url: str, key: str, image: str, count: int, most: int, idle_s: float) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=None, sock_read=POLL_S + 60)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as client:
        function = await _deploy(client, image, most)
        version = f"{NVCF}/functions/{function['id']}/versions/{function['versionId']}"
        try:
            return await _burst(client, function["id"], version, count, idle_s)
        finally:
            await client.delete(f"{NVCF}/deployments/functions/{function['id']}/versions/{function['versionId']}")


async def _deploy(client: aiohttp.ClientSession, image: str, most: int) -> dict[str, Any]:
    async with client.post(f"{NVCF}/functions", json=FUNCTION | {"containerImage": image}) as response:
        response.raise_for_status()
        function: dict[str, Any] = (await response.json())["function"]
    wanted = {"gpu": "CPU", "instanceType": "CPU", "minInstances": 0, "maxInstances": most, "maxRequestConcurrency": 1}
    path = f"{NVCF}/deployments/functions/{function['id']}/versions/{function['versionId']}"
    async with client.post(path, json={"deploymentSpecifications": [wanted]}) as response:
        response.raise_for_status()
    return function


async def _burst(
    client: aiohttp.ClientSession, function_id: str, version: str, count: int, idle_s: float
) -> dict[str, Any]:
    async with asyncio.timeout(READY_S):
        while await _instances(client, version) is None:  # noqa: ASYNC110  nobody announces it
            await asyncio.sleep(SAMPLE_S)
    watched = Watched()
    picture = PICTURE.read_bytes()
    watching = asyncio.create_task(_watch(client, version, watched))
    answers = await asyncio.gather(*(_invoke(client, function_id, picture) for _ in range(count)))
    answered_s = time.monotonic() - watched.began_at
    async with asyncio.timeout(idle_s):
        while watched.changes[-1][1]:  # noqa: ASYNC110  `_watch` sees it
            await asyncio.sleep(SAMPLE_S)
    watching.cancel()
    return {
        "requests": count,
        "answers": {str(status): number for status, number in Counter(answers).items()},
        "answered_s": round(answered_s, 1),
        "most_instances": watched.most,
        "instances": watched.changes,
    }


async def _watch(client: aiohttp.ClientSession, version: str, watched: Watched) -> None:
    while True:
        instances = await _instances(client, version)
        if instances is not None:
            watched.saw(instances)
        await asyncio.sleep(SAMPLE_S)


async def _instances(client: aiohttp.ClientSession, version: str) -> int | None:
    """How many serve; None while the function is not ACTIVE."""
    async with client.get(version) as response:
        response.raise_for_status()
        found = (await response.json())["function"]
    return len(found["activeInstances"]) if found["status"] == "ACTIVE" else None


async def _invoke(client: aiohttp.ClientSession, function_id: str, picture: bytes) -> int:
    """The status of the answer: of a 200 without the text, 0."""
    headers = {"NVCF-POLL-SECONDS": str(POLL_S)}
    sent = {**headers, "Content-Type": "image/png"}
    async with client.post(f"{NVCF}/pexec/functions/{function_id}", data=picture, headers=sent) as response:
        status, request_id, body = response.status, response.headers.get("NVCF-REQID", ""), await response.read()
    while status == 202:
        async with client.get(f"{NVCF}/pexec/status/{request_id}", headers=headers) as response:
            status, body = response.status, await response.read()
    return status if status != 200 or EXPECTED in orjson.loads(body)["text"] else 0


if __name__ == "__main__":
    main()
