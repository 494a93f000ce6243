"""InstanceLogs on Redis: a stream for each version that somebody looks at, and a hash of up to where it was copied."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from broker.backends.redis import keys, scripts
from broker.backends.redis.connection import Connection
from broker.errors import Overloaded
from broker.model import LogBatch, LogLine, Look, Part
from broker.ports import LOGS_KEPT_BYTES, LOGS_KEPT_S, MOST_ACCOUNT_LOOKS, MOST_LOOKS

_ANY = "*"
_BYTES = b"#"


class RedisInstanceLogs:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def look(self, look: Look, *, ttl_s: float) -> None:
        version_id = look.version_id
        [granted] = await self._connection.run(
            scripts.LOOK.call(
                (keys.LOOKS, keys.logs(version_id), keys.log_positions(version_id)),
                version_id,
                look.instance_id or _ANY,
                look.account,
                round(ttl_s * 1000),
                MOST_LOOKS,
                MOST_ACCOUNT_LOOKS,
            )
        )
        if not granted:
            raise Overloaded("too many logs are being read; end one, or try again", retry_after_s=ttl_s)

    async def looks(self) -> list[Look]:
        [found] = await self._connection.run(scripts.LOOKS.call((keys.LOOKS,)))
        looks = []
        for packed in found:
            version_id, instance_id, account = packed.decode().split(" ", 2)
            looks.append(
                Look(account=account, version_id=version_id, instance_id="" if instance_id == _ANY else instance_id)
            )
        return looks

    async def positions(self, version_id: str) -> Mapping[tuple[str, Part], str]:
        [found] = await self._connection.run(("HGETALL", keys.log_positions(version_id)))
        pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
        return {_source(name): position.decode() for name, position in pairs if name != _BYTES}

    async def append(self, batch: LogBatch, *, before: str, after: str) -> bool:
        content = orjson.dumps([batch.instance_id, batch.part, list(map(tuple, batch.lines))]) if batch.lines else b""
        [done] = await self._connection.run(
            scripts.COPY_LOG.call(
                (keys.logs(batch.version_id), keys.log_positions(batch.version_id)),
                f"{batch.instance_id}/{batch.part}",
                before,
                after,
                content,
                LOGS_KEPT_BYTES,
                round(LOGS_KEPT_S * 1000),
            )
        )
        return bool(done)

    async def read(self, version_id: str, *, after: str = "", limit: int) -> list[LogBatch]:
        first = f"({after}" if after else "-"
        [rows] = await self._connection.run(("XRANGE", keys.logs(version_id), first, "+", "COUNT", limit))
        return [_batch(version_id, entry_id.decode(), content) for entry_id, (_, content) in rows]


def _source(name: bytes) -> tuple[str, Part]:
    instance_id, _, part = name.decode().rpartition("/")
    return instance_id, Part(part)


def _batch(version_id: str, entry_id: str, content: bytes) -> LogBatch:
    instance_id, part, lines = orjson.loads(content)
    return LogBatch(
        version_id=version_id,
        instance_id=instance_id,
        part=Part(part),
        lines=tuple(LogLine(at, text) for at, text in lines),
        id=entry_id,
    )
