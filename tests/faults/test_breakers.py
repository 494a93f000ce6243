"""Servers that are away are not asked, and asked again once they are back."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Callable

import pytest

from broker.backends.redis.store import open_store
from broker.errors import StoreUnavailable
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually


async def test_a_frozen_redis_is_not_asked_until_a_probe_is_answered(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    async with open_store(server.url, Settings(store_timeout_s=0.5)) as (results, *_):
        connection = results._connection  # type: ignore[attr-defined]  # what was sent is seen nowhere else
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await results.ping()
            assert connection.breaker.open
            connection.breaker._probe_at = float("inf")
            for _ in range(100):
                with pytest.raises(StoreUnavailable):
                    await results.read(str(uuid.uuid4()))
                assert not connection._plain.waits
        finally:
            os.kill(server.pid, signal.SIGCONT)
        connection.breaker._probe_at = 0.0

        async def back() -> bool:
            try:
                await results.ping()
            except StoreUnavailable:
                return False
            return True

        await eventually(back, bool)
        assert not connection.breaker.open
