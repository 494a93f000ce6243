"""What is billed, as log lines marked `metering` (contract/invocation.md §8.7): one for each invocation that ran, and
a heartbeat of the instance. They are written whatever the log level is."""

from __future__ import annotations

import functools
import logging
import math
import time

from broker.model import Job, RequestState
from broker.settings import SidecarSettings
from broker.telemetry.logs import METERING, Note

logger = logging.getLogger(METERING)

HEARTBEAT_S = 30.0
_BILLING = "x-billing-"


@functools.lru_cache(maxsize=512)
def _is_billing(name: str) -> bool:
    return name.lower().startswith(_BILLING)


class Meter:
    """Of one instance. A request that no worker ran is not on it."""

    def __init__(self, settings: SidecarSettings, instance_id: str) -> None:
        self._instance = {
            "metering": True,
            "env": settings.environment,
            "nspect_id": settings.nspect_id,
            "instance_id": instance_id,
            "instance_type": settings.instance_type,
            "backend": settings.backend,
            "function_id": settings.function_id,
            "function_version_id": settings.function_version_id,
            "owner_nca_id": settings.account,
            "gpus": settings.gpu_count,
            "gpu_type": settings.gpu,
        }
        self._note = Note(
            logger,
            "invocation",
            {**self._instance, "event_type": "NVCF_Invocation", "region": settings.region},
        )
        self._reported_at = time.monotonic()

    def invocation(
        self, job: Job, state: RequestState, *, size_bytes: int, duration_s: float, facts: dict[str, object]
    ) -> None:
        """To be called once for a request that ended in `state`: `size_bytes` of an answer after `duration_s` in the
        container. `facts` go onto the same line, so that there is one for each invocation."""
        line: dict[str, object] = {
            "nca_id": job.account,
            "request_id": job.id,
            "sub": job.subject,
            "size": size_bytes,
            "duration": math.ceil(duration_s),
            "response_type": "FULFILLED" if state is RequestState.FULFILLED else "ERRORED",
            **facts,
        }
        if billing := {name.lower(): value for name, value in job.headers if _is_billing(name)}:
            line["billing_headers"] = billing
        self._note.add(line)

    def infrastructure(self, *, ready: bool) -> None:
        """How long the instance was there since the last time this was called."""
        now = time.monotonic()
        line = self._instance | {
            "event_type": "NVCF_Infrastructure",
            "nca_id": self._instance["owner_nca_id"],
            "status": "ready" if ready else "initializing",
            "duration": round(now - self._reported_at, 3),
        }
        self._reported_at = now
        logger.info("infrastructure", extra=line)
