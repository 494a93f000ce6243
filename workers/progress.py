"""The progress files of running attempts: what they say is reported in order (contract/invocation.md §8.3).

One loop for the whole sidecar looks at them (decision 6). An attempt that ends within LOOK_S costs an entry in a table
and no wake-up. A file is untrusted (field/security.md): it may be a link, a pipe or a device, or change while it is
read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import stat
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import orjson

from broker.errors import StoreUnavailable
from broker.model import Lease, Progress, RequestState
from broker.ports import Results
from broker.settings import SidecarSettings
from workers import loops
from workers.outputs import open_untrusted

logger = logging.getLogger(__name__)

FILE = "progress"
# How old an attempt is when it is looked at first, and the least pause between looks until it has written.
LOOK_S = 0.1
# The least pause once it has. It grows with silence, as a share of that, up to the longest.
CLOSELY_S, LONGEST_S = 0.01, 1.0
# What a pause may be of the silence before it, and looking of all time, whatever the number of attempts.
_SHARE = 0.05
# Attempts looked at in one turn of the clerk, who has other work too.
_BATCH = 128
# A file's time has steps of a few milliseconds: a second write within one may leave no trace but its content.
_STEP_NS = 50_000_000


class Refused(Exception):
    """What a file holds is no progress; says why."""


def parse(content: bytes) -> Progress:
    """What a progress file says. `progress` is a number, brought between 0 and 100, and 0 if it is missing;
    `partialResponse` is an object or missing. `id` is not looked at: the directory says whose file it is.

    Raises:
        Refused: it is not that.
    """
    try:
        said = orjson.loads(content)
        if not isinstance(said, dict):
            raise Refused("not a JSON object")
        percent, partial = said.get("progress"), said.get("partialResponse")
        if isinstance(percent, bool) or not isinstance(percent, int | float | None):
            raise Refused("progress is not a number")
        if not isinstance(partial, dict | None):
            raise Refused("partialResponse is not an object")
        return Progress(percent=int(min(100, max(0, percent or 0))), partial=orjson.dumps(partial))
    except orjson.JSONDecodeError as exc:
        raise Refused("not JSON") from exc
    except orjson.JSONEncodeError as exc:
        raise Refused("partialResponse is nested too deep") from exc


class ProgressFile:
    """One attempt's file, written in place or renamed into place. Used by one thread at a time."""

    def __init__(self, directory: str | Path, *, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._trace: tuple[int, ...] = ()
        self._hash = 0
        self._settled = False
        self._fault = ""

    def news(self) -> Progress | None:
        """What it says since the last call; None if it is as it was, or not there.

        Raises:
            Refused: it has held the same of no use for two calls. Once: one that is being written looks so too.
        """
        try:
            found = os.lstat(f"{self._directory}/{FILE}")
        except OSError:  # most often there is none; or its directory is none any more
            return None
        trace = (found.st_mtime_ns, found.st_size, found.st_ino)
        if trace == self._trace and self._settled:
            fault, self._fault = self._fault, ""
            if fault:
                raise Refused(fault)
            return None
        self._settled = time.time_ns() - found.st_mtime_ns > _STEP_NS
        fault, content = "", b""
        try:
            content = self._content()
        except Refused as exc:
            fault = str(exc)
        except OSError as exc:
            fault = exc.strerror or type(exc).__name__
        known = trace == self._trace and hash(content) == self._hash
        self._trace, self._hash = trace, hash(content)
        if known:
            return None
        self._fault = fault
        if fault:
            return None
        try:
            return parse(content)
        except Refused as exc:
            self._fault = str(exc)
            return None

    def _content(self) -> bytes:
        """Raises Refused, OSError."""
        directory = open_untrusted(self._directory, None)
        if directory is None:
            raise Refused("its directory is none")
        try:
            opened = open_untrusted(FILE, directory)
        finally:
            os.close(directory)
        if opened is None:
            raise Refused("not a regular file")
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise Refused("not a regular file")
            content = os.read(opened, self._limit_bytes + 1)
        finally:
            os.close(opened)
        if len(content) > self._limit_bytes:
            raise Refused(f"larger than {self._limit_bytes} bytes")
        return content


class ProgressWatch:
    """Where `look` is called again and again, `pause_s` apart, attempts that are `watching` report."""

    def __init__(self, results: Results, settings: SidecarSettings, clerk: loops.Clerk) -> None:
        self._results = results
        self._limit_bytes = settings.max_progress_bytes
        self._clerk = clerk
        self._attempts: dict[str, _Attempt] = {}
        self._due = asyncio.Event()
        self._armed = False
        self._took_s = 0.0

    def watching(self, lease: Lease, directory: str | Path) -> AbstractAsyncContextManager[None]:
        """While the body runs, report what is written to `progress` in `directory`, the attempt's output directory.

        Where there was progress, the file is looked at once more after the body, so that what was written last comes
        before the result.
        """
        return _Attempt(self, lease, directory)

    def pause_s(self) -> float:
        """Seconds until the next look."""
        if not self._attempts:
            return LOOK_S / 2
        next_s = min(attempt.look_at for attempt in self._attempts.values()) - time.monotonic()
        return max(CLOSELY_S, min(next_s, LOOK_S / 2), min(LONGEST_S, self._took_s / _SHARE))

    async def look(self) -> None:
        """Look at the files that are due, and report what they say; while there are no attempts, wait for one."""
        if not self._attempts:
            self._armed = False
            self._due.clear()
            await self._due.wait()
        now, self._took_s = time.monotonic(), 0.0
        due = [attempt for attempt in self._attempts.values() if attempt.look_at <= now]
        for at in range(0, len(due), _BATCH):
            batch = due[at : at + _BATCH]
            # While the store is away, the file itself keeps the latest.
            unread = [attempt for attempt in batch if not attempt.pending]
            self._took_s += await self._clerk.run(_look, unread, self._limit_bytes)
            for attempt in batch:
                attempt.looked(now)
        await asyncio.gather(*(self._report(attempt) for attempt in due if attempt.pending))

    def enter(self, attempt: _Attempt) -> None:
        self._attempts[attempt.lease.request_id] = attempt
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_later(LOOK_S, self._due.set)

    def leave(self, attempt: _Attempt) -> None:
        del self._attempts[attempt.lease.request_id]

    async def finish(self, attempt: _Attempt) -> None:
        await self._clerk.run(_look, (attempt,), self._limit_bytes)
        await self._report(attempt)

    async def _report(self, attempt: _Attempt) -> None:
        """All that is pending, in order; while the store is away, it stays so."""
        with suppress(StoreUnavailable):
            async with attempt.reporting:
                while attempt.pending and not attempt.over:
                    sequence, progress = attempt.pending[0]
                    state = await self._results.report(attempt.lease, progress, sequence=sequence)
                    attempt.over = state is not RequestState.RUNNING
                    attempt.pending.popleft()


class _Attempt(AbstractAsyncContextManager[None]):
    """One attempt under way. The clerk counts `sequence` and fills `pending`. Most end before they are looked at, so
    little is made beforehand."""

    __slots__ = ("_watch", "directory", "file", "lease", "look_at", "over", "pending", "reporting", "sequence", "since")

    def __init__(self, watch: ProgressWatch, lease: Lease, directory: str | Path) -> None:
        self._watch = watch
        self.lease = lease
        self.directory = directory
        self.since = time.monotonic()
        self.look_at = self.since + LOOK_S
        self.file: ProgressFile | None = None
        self.sequence = 0
        self.over = False
        self.pending: deque[tuple[int, Progress]] = deque()
        self.reporting = asyncio.Lock()

    async def __aenter__(self) -> None:
        self._watch.enter(self)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.sequence and kind is None:
                await self._watch.finish(self)
        finally:
            self._watch.leave(self)

    def looked(self, now: float) -> None:
        """When to look next. `over`: the store takes no more, and there is nothing to look for."""
        if self.pending:
            self.since = now
        pause_s = max(CLOSELY_S if self.sequence else LOOK_S, (now - self.since) * _SHARE)
        self.look_at = math.inf if self.over else now + min(LONGEST_S, pause_s)


def _look(attempts: Sequence[_Attempt], limit_bytes: int) -> float:
    """Fill `pending` with what is new; returns the seconds of CPU that it took."""
    before_s = time.thread_time()
    for attempt in attempts:
        if attempt.file is None:
            attempt.file = ProgressFile(attempt.directory, limit_bytes=limit_bytes)
        try:
            progress = attempt.file.news()
        except Refused as exc:
            logger.warning("progress_refused", extra={"request_id": attempt.lease.request_id, "cause": str(exc)})
            continue
        if progress is not None:
            attempt.sequence += 1
            attempt.pending.append((attempt.sequence, progress))
    return time.thread_time() - before_s
