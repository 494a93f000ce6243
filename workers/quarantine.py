"""An instance with which different requests die, one after the other, takes no more work.

What is held against it is in the catalog, where it outlives the sidecar and is added to by others: a sidecar that is
killed cannot say what it was doing; the workers that get its requests next can.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import suppress

from broker.crashes import payloads
from broker.errors import StoreUnavailable
from broker.model import Attempt, Crash, Job
from broker.ports import Catalog
from broker.settings import SidecarSettings
from workers.health import Gate

logger = logging.getLogger(__name__)


class Quarantine:
    """Shuts the gate for good. No store that is away holds anything up here: what could not be noted is left out."""

    def __init__(self, catalog: Catalog, settings: SidecarSettings, gate: Gate, instance_id: str) -> None:
        self._catalog, self._settings, self._gate = catalog, settings, gate
        self._version_id, self._id = settings.function_version_id, instance_id
        self._origin = secrets.token_hex(4)
        self._suspected = False

    @property
    def suspected(self) -> bool:
        """Whether an answer of the container is news: `answered` must then be called."""
        return self._suspected and not self._gate.condemned

    async def look(self) -> None:
        """See what others have noted, and what was noted before this process began. Raises StoreUnavailable."""
        most = self._settings.quarantine_crashes
        if not most or self._gate.condemned:
            return
        held = await self._catalog.crashes(self._version_id, self._id)
        self._suspected = bool(held)
        if payloads(held) >= most:
            requests = sorted({crash.request_id for crash in held})
            self._gate.condemn(f"quarantined: {most} different requests in a row died here: {', '.join(requests[:8])}")
            logger.error(
                "instance_quarantined",
                extra={
                    "public": True,
                    "instance_id": self._id,
                    "version_id": self._version_id,
                    "request_ids": requests[:8],
                },
            )

    async def crashed(self, job: Job, *, began_at: float) -> None:
        """The container was lost with the job, which was sent to it at `began_at` by the monotonic clock."""
        crash = Crash(request_id=job.id, origin=self._origin, began_at=began_at, ended_at=time.monotonic())
        with suppress(StoreUnavailable):
            await self._note(self._id, crash)
            await self.look()

    async def lost(self, job: Job, attempt: Attempt) -> None:
        """Hold an attempt that came to nothing against the instance whose sidecar fell silent."""
        crash = Crash(request_id=job.id, origin="", began_at=attempt.started_at, ended_at=attempt.ended_at)
        with suppress(StoreUnavailable):
            await self._note(attempt.worker, crash)

    async def _note(self, instance_id: str, crash: Crash) -> None:
        if self._settings.quarantine_crashes:
            await self._catalog.note_crash(self._version_id, instance_id, crash)

    async def answered(self) -> None:
        """The container answered: what it did before is no row."""
        self._suspected = False
        with suppress(StoreUnavailable):
            await self._catalog.forget_crashes(self._version_id, self._id)
