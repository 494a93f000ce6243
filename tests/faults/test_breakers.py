"""Servers that are away are not asked, and asked again once they are back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import pytest

from broker.backends.redis.store import open_store
from broker.backends.s3 import open_blobs
from broker.errors import BlobsUnavailable, StoreUnavailable
from broker.settings import Settings
from infra.local.process import free_port
from infra.local.servers import Redis
from tests.eventually import eventually
from tests.frozen import frozen


async def test_a_frozen_redis_is_not_asked_until_it_is_found(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    async with open_store(server.url, Settings(store_timeout_s=0.5)) as (results, *_):
        connection = results._connection  # type: ignore[attr-defined]  # what was sent is seen nowhere else
        with frozen(server.pid):
            while not connection.breaker.hopeless:
                with pytest.raises(StoreUnavailable):
                    await results.ping()
            for _ in range(100):
                with pytest.raises(StoreUnavailable):
                    await results.read(str(uuid.uuid4()))
                assert not connection._plain.waits

        async def back() -> bool:
            try:
                await results.ping()
            except StoreUnavailable:
                return False
            return True

        await eventually(back, bool)
        assert not connection.breaker.open


async def test_a_blob_store_that_is_away_is_not_asked_and_no_body_waits_for_it() -> None:
    away = f"s3://a:b@127.0.0.1:{free_port()}/bucket?tls=false"
    async with open_blobs(away, Settings(accept_timeout_s=0.1), make=False) as blobs:
        while not blobs._breaker.hopeless:  # one refusal can come sooner than the time after which it opens
            with pytest.raises(BlobsUnavailable):
                await blobs.put("k", b"large", content_type="text/plain")
        assert blobs._seeking is not None
        blobs._seeking.cancel()
        for _ in range(100):
            with pytest.raises(BlobsUnavailable, match="does not answer; try again"):
                await blobs.put("k", b"large", content_type="text/plain")
        blobs._breaker.found()
        with pytest.raises(BlobsUnavailable, match="EndpointConnectionError"):
            await blobs.put("k", b"large", content_type="text/plain")
        assert blobs._breaker.hopeless
