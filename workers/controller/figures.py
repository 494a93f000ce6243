"""What a controller tells: of versions and their instances, what its last pass saw; of requests, what the auditor
counted. None of it is read for the metrics' sake."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

from broker.model import Deployment, Gpu, Instance, InstanceStatus, Load, Version
from broker.telemetry.metrics import (
    AUDITED,
    AUDITED_AT,
    BALANCED,
    DEPTH,
    GPUS,
    INSTANCES,
    LEADS,
    MENDED,
    MESSAGES,
    NVCF_CONCURRENCY,
    NVCF_DEPTH,
    NVCF_INFO,
    NVCF_INSTANCES,
    NVCF_STATUS,
    OLDEST,
    RUNNING,
    SLOTS,
    SLOTS_BUSY,
    SOURCE,
    Reading,
)
from workers.controller.auditor import Auditor

# A pass takes a second, and a few where there are many deployments; nothing is shown that is older.
BLIND_S = 15.0
QUARANTINED = "quarantined"


class Viewed(Protocol):
    """One deployment as a pass saw it."""

    @property
    def deployment(self) -> Deployment: ...

    @property
    def version(self) -> Version | None: ...

    @property
    def reports(self) -> Mapping[str, Instance]: ...

    @property
    def load(self) -> Load: ...


class Figures:
    """`auditor` is set while this controller leads; `now` is a monotonic clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._views: Sequence[Viewed] = ()
        self._seen_at = 0.0
        self._gpus: Sequence[Gpu] = ()
        self.auditor: Auditor | None = None

    def leads(self, auditor: Auditor | None) -> None:
        """From now on, or with None not any more."""
        self.auditor, self._views, self._gpus, self._seen_at = auditor, (), (), self._now()

    def saw(self, views: Sequence[Viewed]) -> None:
        self._views, self._seen_at = views, self._now()

    def offered(self, gpus: Sequence[Gpu]) -> None:
        self._gpus = gpus

    def read(self) -> Iterator[Reading]:
        yield Reading(LEADS, float(self.auditor is not None))
        if self.auditor is None:
            return
        sees = self._now() - self._seen_at < BLIND_S
        yield Reading(SOURCE, float(sees))
        if sees:
            for view in self._views:
                yield from _of_version(view)
        for gpu in self._gpus:
            yield Reading(GPUS, gpu.capacity, (gpu.name, gpu.instance_type, gpu.backend))
        yield from _of_auditor(self.auditor)


def _of_version(view: Viewed) -> Iterable[Reading]:
    labels = view.deployment.function_id, view.deployment.version_id
    load, reports = view.load, view.reports.values()
    ready = [report for report in reports if report.status is InstanceStatus.RUNNING and not report.quarantined]
    concurrency = max((each.max_request_concurrency for each in view.deployment.specifications), default=0)
    yield Reading(DEPTH, load.queued, labels)
    yield Reading(NVCF_DEPTH, load.queued, labels)
    yield Reading(RUNNING, load.running, labels)
    yield Reading(OLDEST, load.oldest_age_s, labels)
    yield Reading(SLOTS, sum(report.slots for report in ready), labels)
    yield Reading(SLOTS_BUSY, sum(report.busy for report in reports), labels)
    yield Reading(NVCF_INSTANCES, len(ready), labels)
    yield Reading(NVCF_CONCURRENCY, concurrency, labels)
    for state, count in Counter(map(_state, reports)).items():
        yield Reading(INSTANCES, count, (*labels, state))
    if view.version is not None:
        yield Reading(NVCF_STATUS, 1, (*labels, view.version.status.value))
        yield Reading(NVCF_INFO, 1, (*labels, view.version.name))


def _state(report: Instance) -> str:
    return QUARANTINED if report.quarantined else report.status.value.lower()


def _of_auditor(auditor: Auditor) -> Iterable[Reading]:
    for what, count in asdict(auditor.mended).items():
        yield Reading(MENDED, count, (what,))
    counted = auditor.conservation
    if counted is None:
        return
    for state in ("accepted", "queued", "running", "done", "dead"):
        yield Reading(AUDITED, getattr(counted, state), (state,))
    yield Reading(BALANCED, float(counted.balanced))
    yield Reading(AUDITED_AT, counted.counted_at)
    yield Reading(MESSAGES, counted.messages, ("ready",))
    yield Reading(MESSAGES, counted.dead_letters, ("dead",))
