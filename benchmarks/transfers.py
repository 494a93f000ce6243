"""`python -m benchmarks.transfers`: a sidecar's assets and large results, against `curl` on the same S3 server.

What a sidecar does is done in this process, by its own functions: an asset is fetched into the directory that the
container is given, a file of the container is packed and stored. `curl` fetches to the same disk and stores the same
file, by signed URLs. They take turns; the data is random, so that nothing gets smaller on the way.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import click
import orjson

from broker import assets
from broker.backends.s3 import open_blobs
from broker.model import Job
from broker.ports import Blobs, Sink
from broker.settings import MIB, Settings, SidecarSettings, load
from infra.local import binaries
from infra.local.process import ServerFailed
from infra.local.servers import S3
from workers import loops
from workers.inference import Answer
from workers.inputs import workspace
from workers.outputs import collect

DATA = Path(".fnqueue")
ACCOUNT = "default"
LIMIT_S = 600.0
TYPE, DESCRIPTION = "application/octet-stream", "benchmark"


@click.command()
@click.option("--mib", type=click.IntRange(1, 100_000), default=256, show_default=True, help="Of one file.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
def main(mib: int, rounds: int) -> None:
    """Move files of this size both ways, and print MiB/s and the ratio to curl's (medians) as JSON."""
    if shutil.which("curl") is None:
        raise click.ClickException("curl is not installed")
    binaries.ensure()
    DATA.mkdir(exist_ok=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA) as room,
            S3(Path(room).resolve() / "s3") as server,
        ):
            measured = asyncio.run(_measure(Path(room).resolve(), server.url, mib, rounds))
    except (ServerFailed, OSError, subprocess.SubprocessError) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(orjson.dumps(measured, option=orjson.OPT_INDENT_2))


async def _measure(folder: Path, url: str, mib: int, rounds: int) -> dict[str, float]:
    async with open_blobs(url, load(Settings)) as blobs:
        with loops.Clerk() as clerk:
            turns = _Turns(blobs, folder, clerk, mib)
            await turns.prepare()
            asset = await _compare(rounds, turns.fetch, turns.curl_down)
            result = await _compare(rounds, turns.store, turns.curl_up)
    return {
        "mib": mib,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
        **_told("asset", mib, *asset),
        **_told("result", mib, *result),
    }


class _Turns:
    """One transfer each; the time that it took in seconds. Each leaves nothing behind but what all of them need."""

    def __init__(self, blobs: Blobs, folder: Path, clerk: loops.Clerk, mib: int) -> None:
        self._blobs, self._folder, self._clerk = blobs, folder, clerk
        self._file, self._mib = folder / "file", mib
        self._asset = str(uuid.uuid4())
        self._settings = load(
            SidecarSettings,
            function_id="f",
            function_version_id="v",
            asset_dir=str(folder / "assets"),
            response_dir=str(folder / "responses"),
            scratch_dir=str(folder / "scratch"),
            max_artifact_bytes=2 * mib * MIB,
        )

    async def prepare(self) -> None:
        for name in ("assets", "responses", "scratch"):
            await asyncio.to_thread((self._folder / name).mkdir)
        await asyncio.to_thread(self._fill)
        await self._blobs.upload(
            assets.key_of(ACCOUNT, self._asset),
            self._copy_to,
            content_type=TYPE,
            scratch=self._folder / "scratch",
        )

    async def fetch(self) -> float:
        began_at = time.perf_counter()
        async with workspace(self._blobs, self._settings, _job(self._asset), self._clerk) as room:
            took_s = time.perf_counter() - began_at
            self._check(room.assets / self._asset)
        return took_s

    async def curl_down(self) -> float:
        url = self._blobs.download_url(assets.key_of(ACCOUNT, self._asset), filename="file", expires_s=LIMIT_S)
        path = self._folder / "fetched"
        took_s = await _curl("--output", str(path), url)
        self._check(path)
        path.unlink()
        return took_s

    async def store(self) -> float:
        async with workspace(self._blobs, self._settings, _job(), self._clerk) as room:
            await asyncio.to_thread(os.link, self._file, room.response / "file")
            answer = Answer(status=200, body=b"{}")
            began_at = time.perf_counter()
            outcome = await collect(self._blobs, self._settings, _job(), answer, room, left_s=lambda: LIMIT_S)
            took_s = time.perf_counter() - began_at
        return await self._stored(outcome.blob_key, took_s)

    async def curl_up(self) -> float:
        key = f"results/{ACCOUNT}/{uuid.uuid4()}"
        url = self._blobs.upload_url(key, content_type=TYPE, description=DESCRIPTION, expires_s=LIMIT_S)
        fields = ("Expect:", f"Content-Type: {TYPE}", f"x-amz-meta-nvcf-asset-description: {DESCRIPTION}")
        headers = [word for each in fields for word in ("--header", each)]
        return await self._stored(key, await _curl(*headers, "--upload-file", str(self._file), url))

    async def _stored(self, key: str, took_s: float) -> float:
        found = await self._blobs.head(key)
        if found is None or found.size_bytes < self._mib * MIB:
            raise ServerFailed(f"{key or 'the result'} was not stored whole")
        await self._blobs.delete(key)
        return took_s

    def _fill(self) -> None:
        with self._file.open("wb") as file:
            for _ in range(self._mib):
                file.write(os.urandom(MIB))

    def _copy_to(self, sink: Sink) -> None:
        with self._file.open("rb") as file:
            shutil.copyfileobj(file, sink, MIB)

    def _check(self, path: Path) -> None:
        if path.stat().st_size != self._mib * MIB:
            raise ServerFailed(f"{path.name} did not arrive whole")


async def _compare(
    rounds: int, ours: Callable[[], Awaitable[float]], curl: Callable[[], Awaitable[float]]
) -> tuple[Sequence[float], Sequence[float]]:
    """Seconds of each round; the first one warms up and is left out."""
    found: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        if number % 2:
            found.append((await ours(), await curl()))
        else:
            theirs = await curl()
            found.append((await ours(), theirs))
    return [one for one, _ in found[1:]], [other for _, other in found[1:]]


async def _curl(*arguments: str) -> float:
    """Seconds by its own account, from its start to its end. Raises subprocess.SubprocessError, OSError."""
    command = ["curl", "--fail", "--silent", "--show-error", "--noproxy", "*", "--max-time", str(int(LIMIT_S))]
    done = await asyncio.to_thread(
        subprocess.run,
        [*command, "--write-out", "%{stderr}%{time_total}", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=2 * LIMIT_S,
    )
    return float(done.stderr)


def _told(name: str, mib: int, ours: Sequence[float], curl: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_mib_per_s": round(mib / statistics.median(ours)),
        f"{name}_curl_mib_per_s": round(mib / statistics.median(curl)),
        f"{name}_of_curl": round(statistics.median(other / one for one, other in zip(ours, curl, strict=True)), 2),
    }


def _job(*asset_ids: str) -> Job:
    now = time.time()
    return Job(
        id=str(uuid.uuid4()),
        account=ACCOUNT,
        function_id="f",
        version_id="v",
        subject="",
        created_at=now,
        deadline_at=now + LIMIT_S,
        digest="",
        assets=asset_ids,
    )


if __name__ == "__main__":
    main()
