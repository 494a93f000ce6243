"""What processes take of memory and file descriptors over a run, so that it can be seen whether that grows."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import psutil

from infra.local.process import Server, ServerFailed
from tests.faults.cluster import Cluster
from tests.house import House

EVERY_S = 5.0
MIB = 1 << 20


@dataclass(slots=True)
class Growth:
    """Samples by role and process, as memory in bytes and open file descriptors."""

    _samples: dict[str, dict[tuple[int, float], list[tuple[int, int]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    @asynccontextmanager
    async def watching(self, house: House, cluster: Cluster) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                await asyncio.to_thread(self._look, house, cluster)
                await asyncio.sleep(EVERY_S)

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    def __str__(self) -> str:
        """Of each role, the process that was seen longest: after a quarter of that time, and at the end of it."""
        lines = []
        for role, processes in sorted(self._samples.items()):
            seen = max(processes.values(), key=len)
            (rss, fds), (last_rss, last_fds) = seen[len(seen) // 4], seen[-1]
            lived = f"{len(seen) * EVERY_S / 60:.0f} min"
            lines.append(f"{role}: {rss / MIB:.0f} -> {last_rss / MIB:.0f} MiB, {fds} -> {last_fds} files, {lived}")
        return "\n".join(lines)

    def _look(self, house: House, cluster: Cluster) -> None:
        servers: dict[str, Sequence[Server]] = {
            "front end": house.fronts,
            "controller": house.controllers,
            "RabbitMQ node": cluster.nodes,
            "Redis": cluster.redis.stores,
        }
        found = [("sidecar", process) for process in house.sidecars()]
        for role, running in servers.items():
            for server in running:
                with suppress(ServerFailed, psutil.NoSuchProcess):
                    found.append((role, psutil.Process(server.pid)))
        for role, process in found:
            with suppress(psutil.Error):
                of = process.pid, process.create_time()
                self._samples[role][of].append((process.memory_info().rss, process.num_fds()))
