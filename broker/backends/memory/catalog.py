"""Catalog in one process. Rows live as long as the process does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Generic, TypeVar

from broker.errors import RevisionConflict
from broker.model import (
    Account,
    Cluster,
    Crash,
    Deployment,
    Gpu,
    Instance,
    Key,
    RegistryCredentials,
    Secrets,
    Sharing,
    Version,
    WebhookSecrets,
)
from broker.ports import CRASHES_KEPT_S, Row

T = TypeVar("T")


class MemoryTable(Generic[T]):
    def __init__(self, key: Callable[[T], str], indexes: Sequence[str]) -> None:
        self._key = key
        self._indexes = frozenset(indexes)
        self._rows: dict[str, Row[T]] = {}
        # Far apart, so that a row which is removed and made anew never has one of its old revisions.
        self._revisions = count(1, 1_000_000)

    async def get(self, key: str) -> Row[T] | None:
        return self._rows.get(key)

    async def list(self, index: str = "", value: str = "") -> list[Row[T]]:
        if index and index not in self._indexes:
            raise LookupError(f"no index {index!r}; there are {sorted(self._indexes)}")
        return [row for row in self._rows.values() if not index or _holds(getattr(row.item, index), value)]

    async def put(self, item: T, *, revision: int = 0) -> int:
        key = self._key(item)
        stored = self._rows.get(key)
        if (stored.revision if stored else 0) != revision:
            raise RevisionConflict(f"{key} was changed by somebody else")
        new = revision + 1 if stored else next(self._revisions)
        self._rows[key] = Row(item, new)
        return new

    async def delete(self, key: str) -> bool:
        return self._rows.pop(key, None) is not None


class MemoryCatalog:
    def __init__(self) -> None:
        self.versions: MemoryTable[Version] = MemoryTable(lambda version: version.id, ("function_id", "account"))
        self.deployments: MemoryTable[Deployment] = MemoryTable(lambda deployment: deployment.version_id, ("account",))
        self.keys: MemoryTable[Key] = MemoryTable(lambda key: key.hash, ("account",))
        self.clusters: MemoryTable[Cluster] = MemoryTable(lambda cluster: cluster.id, ("account",))
        self.accounts: MemoryTable[Account] = MemoryTable(lambda account: account.id, ())
        self.sharing: MemoryTable[Sharing] = MemoryTable(lambda sharing: sharing.function_id, ("shared_with",))
        self.secrets: MemoryTable[Secrets] = MemoryTable(lambda secrets: secrets.version_id, ())
        self.registry_credentials: MemoryTable[RegistryCredentials] = MemoryTable(lambda item: item.account, ())
        self.webhook_secrets: MemoryTable[WebhookSecrets] = MemoryTable(lambda item: item.account, ())
        self._instances: dict[tuple[str, str], tuple[Instance, float]] = {}
        self._crashes: dict[tuple[str, str], tuple[frozenset[Crash], float]] = {}
        self._gpus: tuple[list[Gpu], float] = ([], 0.0)
        self._leader = ("", 0.0)

    async def beat(self, instance: Instance, *, ttl_s: float) -> None:
        self._instances[instance.version_id, instance.id] = (instance, time.monotonic() + ttl_s)

    async def instances(self, version_id: str) -> list[Instance]:
        now = time.monotonic()
        self._instances = {key: kept for key, kept in self._instances.items() if kept[1] > now}
        return [kept[0] for key, kept in self._instances.items() if key[0] == version_id]

    async def retire(self, instance: Instance) -> None:
        self._instances.pop((instance.version_id, instance.id), None)

    async def note_crash(self, version_id: str, instance_id: str, crash: Crash) -> None:
        kept, _ = self._crashes.get((version_id, instance_id), (frozenset(), 0.0))
        self._crashes[version_id, instance_id] = kept | {crash}, time.monotonic() + CRASHES_KEPT_S

    async def crashes(self, version_id: str, instance_id: str) -> list[Crash]:
        now = time.monotonic()
        self._crashes = {key: held for key, held in self._crashes.items() if held[1] > now}
        return list(self._crashes.get((version_id, instance_id), (frozenset(), 0.0))[0])

    async def forget_crashes(self, version_id: str, instance_id: str) -> None:
        self._crashes.pop((version_id, instance_id), None)

    async def offer(self, gpus: Sequence[Gpu], *, ttl_s: float) -> None:
        self._gpus = (list(gpus), time.monotonic() + ttl_s)

    async def gpus(self) -> list[Gpu]:
        offered, until = self._gpus
        return list(offered) if until > time.monotonic() else []

    async def lead(self, holder: str, *, ttl_s: float) -> bool:
        leader, until = self._leader
        now = time.monotonic()
        if leader not in ("", holder) and until > now:
            return False
        self._leader = (holder, now + ttl_s)
        return True

    async def resign(self, holder: str) -> None:
        if self._leader[0] == holder:
            self._leader = ("", 0.0)


def _holds(indexed: object, value: str) -> bool:
    return value in indexed if isinstance(indexed, tuple) else indexed == value
