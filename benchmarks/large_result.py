"""`python -m benchmarks.large_result --gib 5`: what a sidecar takes to hand over a large file of its container.

The packing and the upload are the sidecar's own, in this process; the S3 server is another one.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import click
import orjson
import psutil

from broker.backends.s3 import open_blobs
from broker.model import Job
from broker.settings import MIB, Settings, SidecarSettings, load
from infra.local import binaries
from infra.local.servers import S3
from workers import loops
from workers.inference import Answer
from workers.inputs import Workspace
from workers.outputs import collect

SAMPLE_S = 0.02


@dataclass
class Most:
    """Peaks, sampled while the result is on its way."""

    folder: Path
    rss_bytes: int = 0
    scratch_bytes: int = 0

    async def sample(self) -> None:
        process = psutil.Process()
        while True:
            self.rss_bytes = max(self.rss_bytes, process.memory_info().rss)
            self.scratch_bytes = max(self.scratch_bytes, sum(_size_bytes(path) for path in self.folder.iterdir()))
            await asyncio.sleep(SAMPLE_S)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@click.command()
@click.option("--gib", type=click.FloatRange(0.01, 100), default=5.0, show_default=True, help="Size of the file.")
@click.option("--zeros", is_flag=True, help="A file that gets smaller, instead of random bytes.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(tempfile.gettempdir()), show_default=True)
def main(gib: float, zeros: bool, folder: Path) -> None:
    """Measure one large result, and print JSON."""
    binaries.ensure()
    with tempfile.TemporaryDirectory(dir=folder) as room:
        server = S3(Path(room, "s3"))
        server.start()
        try:
            measured = asyncio.run(_measure(Path(room), server.url, int(gib * 1024 * MIB), zeros=zeros))
        finally:
            server.kill()
    click.echo(orjson.dumps(measured, option=orjson.OPT_INDENT_2))


async def _measure(folder: Path, url: str, size_bytes: int, *, zeros: bool) -> dict[str, float]:
    space = Workspace(assets=folder / "a", response=folder / "r", scratch_dir=folder, clerk=loops.Clerk())
    for path in (space.response, space.scratch):
        path.mkdir()
    _fill(space.response / "file", size_bytes, bytes(MIB) if zeros else os.urandom(MIB))
    settings = load(SidecarSettings, function_id="f", function_version_id="v", max_artifact_bytes=size_bytes * 2)
    most = Most(space.scratch)
    async with open_blobs(url, load(Settings)) as blobs:
        before_bytes = psutil.Process().memory_info().rss
        began_at, cpu_s = time.monotonic(), time.process_time()
        async with loops.beside(most.sample()):
            outcome = await collect(
                blobs, settings, _job(), Answer(status=200, body=b"{}"), space, left_s=lambda: 3600.0
            )
        took_s, cpu_s = time.monotonic() - began_at, time.process_time() - cpu_s
        stored = await blobs.head(outcome.blob_key)
    assert stored is not None
    return {
        "file_mib": round(size_bytes / MIB),
        "zip_mib": round(stored.size_bytes / MIB),
        "seconds": round(took_s, 1),
        "cpu_seconds": round(cpu_s, 1),
        "mib_per_s": round(size_bytes / MIB / took_s),
        "rss_before_mib": round(before_bytes / MIB),
        "rss_most_mib": round(most.rss_bytes / MIB),
        "scratch_most_mib": round(most.scratch_bytes / MIB),
    }


def _fill(path: Path, size_bytes: int, block: bytes) -> None:
    with path.open("wb") as file:
        for _ in range(size_bytes // len(block)):
            file.write(block)


def _job() -> Job:
    now = time.time()
    return Job(
        id=str(uuid.uuid4()),
        account="default",
        function_id="f",
        version_id="v",
        subject="",
        created_at=now,
        deadline_at=now + 3600,
        digest="",
    )


if __name__ == "__main__":
    main()
