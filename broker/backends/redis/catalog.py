"""Catalog on Redis: a hash per table with a revision before each item, and sorted sets as indexes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from broker.backends.codec import Unreadable, pack, unpack
from broker.backends.redis import scripts
from broker.backends.redis.connection import Connection
from broker.errors import RecordDamaged, RevisionConflict
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

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RedisTable(Generic[T]):
    def __init__(
        self, connection: Connection, name: str, kind: type[T], key: Callable[[T], str], indexes: Sequence[str]
    ) -> None:
        self._connection = connection
        self._kind = kind
        self._key = key
        self._indexes = tuple(indexes)
        self._name = f"fnq:c:{{{name}}}"

    async def get(self, key: str) -> Row[T] | None:
        [stored] = await self._connection.run(("HGET", self._name, key))
        return None if stored is None else self._row(stored)

    async def list(self, index: str = "", value: str = "") -> list[Row[T]]:
        if index and index not in self._indexes:
            raise LookupError(f"no index {index!r}; there are {sorted(self._indexes)}")
        [items] = await self._connection.run(scripts.LIST.call((self._name, self._index(index, value))))
        rows = [row for item in items if (row := self._readable(item)) is not None]
        # An index keeps the key of a row that has left it: what the row says now decides.
        return [row for row in rows if not index or value in _values(row.item, index)]

    async def put(self, item: T, *, revision: int = 0) -> int:
        keys = (self._name, self._index("", ""), *self._index_names(item))
        [written] = await self._connection.run(
            scripts.PUT.call(keys, self._key(item), revision, pack(item)), durable=True
        )
        if not written:
            raise RevisionConflict(f"{self._key(item)} was changed by somebody else")
        return int(written)

    async def delete(self, key: str) -> bool:
        row = await self.get(key)
        if row is None:
            return False
        keys = (self._name, self._index("", ""), *self._index_names(row.item))
        [deleted] = await self._connection.run(scripts.DELETE.call(keys, key), durable=True)
        return bool(deleted)

    def _readable(self, stored: bytes) -> Row[T] | None:
        """None for a row that is damaged: what lists the others must not fail for it."""
        try:
            return self._row(stored)
        except RecordDamaged:
            return None

    def _row(self, stored: bytes) -> Row[T]:
        revision, _, item = stored.partition(b" ")
        try:
            return Row(unpack(self._kind, item), int(revision))
        except ValueError as exc:
            logger.error("row_damaged", extra={"table": self._name, "cause": repr(exc)[:200]})
            what = self._kind.__name__.lower()
            raise RecordDamaged(f"what is stored of this {what} cannot be read", outcome_unknown=False) from exc

    def _index_names(self, item: T) -> tuple[str, ...]:
        return tuple(self._index(name, value) for name in self._indexes for value in _values(item, name))

    def _index(self, name: str, value: str) -> str:
        return f"{self._name}:{name}:{value}"


class RedisCatalog:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.versions = RedisTable(connection, "versions", Version, lambda item: item.id, ("function_id", "account"))
        self.deployments = RedisTable(connection, "deployments", Deployment, lambda item: item.version_id, ("account",))
        self.keys = RedisTable(connection, "keys", Key, lambda item: item.hash, ("account",))
        self.clusters = RedisTable(connection, "clusters", Cluster, lambda item: item.id, ("account",))
        self.accounts = RedisTable(connection, "accounts", Account, lambda item: item.id, ())
        self.sharing = RedisTable(connection, "sharing", Sharing, lambda item: item.function_id, ("shared_with",))
        self.secrets = RedisTable(connection, "secrets", Secrets, lambda item: item.version_id, ())
        self.registry_credentials = RedisTable(
            connection, "registry_credentials", RegistryCredentials, lambda item: item.account, ()
        )
        self.webhook_secrets = RedisTable(connection, "webhook_secrets", WebhookSecrets, lambda item: item.account, ())

    async def beat(self, instance: Instance, *, ttl_s: float) -> None:
        await self._connection.run(
            scripts.BEAT.call((_instances(instance.version_id),), instance.id, int(ttl_s * 1000), pack(instance))
        )

    async def instances(self, version_id: str) -> list[Instance]:
        [items] = await self._connection.run(scripts.INSTANCES.call((_instances(version_id),)))
        return [instance for item in items if (instance := _unpacked(Instance, item)) is not None]

    async def retire(self, instance: Instance) -> None:
        await self._connection.run(("HDEL", _instances(instance.version_id), instance.id))

    async def note_crash(self, version_id: str, instance_id: str, crash: Crash) -> None:
        key = _crashes(version_id, instance_id)
        await self._connection.run(("SADD", key, pack(crash)), ("PEXPIRE", key, int(CRASHES_KEPT_S * 1000)))

    async def crashes(self, version_id: str, instance_id: str) -> list[Crash]:
        [held] = await self._connection.run(("SMEMBERS", _crashes(version_id, instance_id)))
        return [crash for item in held if (crash := _unpacked(Crash, item))]

    async def forget_crashes(self, version_id: str, instance_id: str) -> None:
        await self._connection.run(("DEL", _crashes(version_id, instance_id)))

    async def offer(self, gpus: Sequence[Gpu], *, ttl_s: float) -> None:
        await self._connection.run(("SET", "fnq:gpus", pack(list(gpus)), "PX", int(ttl_s * 1000)))

    async def gpus(self) -> list[Gpu]:
        [offered] = await self._connection.run(("GET", "fnq:gpus"))
        return list(_unpacked(tuple[Gpu, ...], offered) or ()) if offered else []

    async def lead(self, holder: str, *, ttl_s: float) -> bool:
        [leads] = await self._connection.run(scripts.LEAD.call(("fnq:leader",), holder, int(ttl_s * 1000)))
        return bool(leads)

    async def resign(self, holder: str) -> None:
        await self._connection.run(scripts.RESIGN.call(("fnq:leader",), holder))


def _unpacked(kind: type[T], raw: bytes) -> T | None:
    """None for what cannot be read: it will be reported again soon."""
    try:
        return unpack(kind, raw)
    except Unreadable as exc:
        logger.error("report_unreadable", extra={"cause": str(exc)})
        return None


def _instances(version_id: str) -> str:
    return f"fnq:i:{{{version_id}}}"


def _crashes(version_id: str, instance_id: str) -> str:
    return f"{_instances(version_id)}:{instance_id}"


def _values(item: object, index: str) -> tuple[str, ...]:
    found = getattr(item, index)
    return found if isinstance(found, tuple) else (found,)
