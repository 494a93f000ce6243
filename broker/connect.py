"""URL scheme to back end, one typed table per port; opens and closes the Broker."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from typing import TypeVar

from pydantic import SecretStr

from broker.backends import files, s3
from broker.backends.memory.catalog import MemoryCatalog
from broker.backends.memory.counters import MemoryCounters
from broker.backends.memory.dead_letters import MemoryDeadLetters
from broker.backends.memory.instance_logs import MemoryInstanceLogs
from broker.backends.memory.queue import MemoryQueue
from broker.backends.memory.results import MemoryResults
from broker.backends.memory.streams import MemoryStreams
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.backends.memory.webhooks import MemoryWebhooks
from broker.backends.rabbitmq import queue as rabbitmq
from broker.backends.rabbitmq.users import VersionUsers
from broker.backends.redis import store as redis
from broker.errors import ConfigurationError
from broker.keyring import Keyring
from broker.ports import Blobs, Broker, Guarded, NoUsers, Queue, Store, Users
from broker.settings import ApiSettings, ControllerSettings, SecretSettings, Settings, SidecarSettings
from broker.signatures import Signatures
from broker.telemetry import tracing
from broker.telemetry.queue import TracedQueue

T = TypeVar("T")
Opener = Callable[[str, Settings], AbstractAsyncContextManager[T]]
QueueOpener = Callable[[str, Settings, Signatures], AbstractAsyncContextManager[Queue]]
Chosen = TypeVar("Chosen")

_SECRET_CHARACTERS = 32


@asynccontextmanager
async def open_broker(settings: Settings) -> AsyncIterator[Broker]:
    """The data ports that the settings name, closed on exit in reverse order.

    Servers that are away do not fail the opening: the first use does, and `ping` tells.

    Raises:
        ConfigurationError: an unknown scheme or a bad URL.
    """
    signatures, users = Signatures.of(settings), _users(settings)
    settings = _with_secret(settings)
    keyring = Keyring.parse(_encryption_keys(settings))
    async with AsyncExitStack() as stack:
        traces = await stack.enter_async_context(_traced(settings))
        queue = await stack.enter_async_context(_open_queue(settings, signatures))
        store = await stack.enter_async_context(_open(STORES, "store_url", settings))
        blobs = await stack.enter_async_context(_open(BLOBS, "blobs_url", settings))
        yield Broker(
            queue=TracedQueue(queue, traces) if traces else queue,
            results=store.results,
            streams=store.streams,
            catalog=store.catalog,
            counters=store.counters,
            upkeep=store.upkeep,
            dead_letters=store.dead_letters,
            webhooks=store.webhooks,
            instance_logs=store.instance_logs,
            blobs=blobs,
            settings=settings,
            keyring=keyring,
            users=users,
            circuits=tuple(each.circuit for each in (queue, store.results, blobs) if isinstance(each, Guarded)),
            tracing=traces,
        )


def _traced(settings: Settings) -> AbstractAsyncContextManager[tracing.Tracing | None]:
    """Of those that answer callers and those that run jobs; in one process, they are one service."""
    system = "memory" if settings.queue_url.get_secret_value().startswith("memory:") else "rabbitmq"
    if isinstance(settings, SidecarSettings):
        return tracing.opened("fnqueue-sidecar", system=system)
    if isinstance(settings, ApiSettings):
        return tracing.opened("fnqueue-api" if system == "rabbitmq" else "fnqueue", system=system)
    return nullcontext()


@asynccontextmanager
async def _memory_queue(url: str, settings: Settings, signatures: Signatures) -> AsyncIterator[Queue]:
    yield MemoryQueue()


@asynccontextmanager
async def _memory_store(url: str, settings: Settings) -> AsyncIterator[Store]:
    results = MemoryResults(settings)
    streams = MemoryStreams(results, settings)
    letters, webhooks = MemoryDeadLetters(results, settings), MemoryWebhooks(results, settings)
    yield Store(
        results=results,
        catalog=MemoryCatalog(),
        counters=MemoryCounters(),
        streams=streams,
        upkeep=MemoryUpkeep(results),
        dead_letters=letters,
        webhooks=webhooks,
        instance_logs=MemoryInstanceLogs(),
    )


QUEUES: Mapping[str, QueueOpener] = {
    "memory": _memory_queue,
    "amqp": rabbitmq.open_queue,
    "amqps": rabbitmq.open_queue,
}
STORES: Mapping[str, Opener[Store]] = {
    "memory": _memory_store,
    "redis": redis.open_store,
    "rediss": redis.open_store,
    "redis+sentinel": redis.open_store,
    "rediss+sentinel": redis.open_store,
}
BLOBS: Mapping[str, Opener[Blobs]] = {"file": files.open_blobs, "s3": s3.open_blobs}


def _open_queue(settings: Settings, signatures: Signatures) -> AbstractAsyncContextManager[Queue]:
    opener, url = _opener(QUEUES, "queue_url", settings)
    return opener(url, settings, signatures)


def _open(table: Mapping[str, Opener[T]], name: str, settings: Settings) -> AbstractAsyncContextManager[T]:
    opener, url = _opener(table, name, settings)
    return opener(url, settings)


def _opener(table: Mapping[str, Chosen], name: str, settings: Settings) -> tuple[Chosen, str]:
    url: str = getattr(settings, name).get_secret_value()
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in table:
        known = ", ".join(f"{known}://" for known in table)
        raise ConfigurationError(f"FNQUEUE_{name.upper()}: unknown scheme {scheme[:20]!r}; known are {known}")
    return table[scheme], url


def _users(settings: Settings) -> Users:
    return VersionUsers(settings) if isinstance(settings, ControllerSettings) and settings.version_users else NoUsers()


def _encryption_keys(settings: Settings) -> str:
    return settings.encryption_keys.get_secret_value() if isinstance(settings, SecretSettings) else ""


def _with_secret(settings: Settings) -> Settings:
    """Only front ends mint IDs that others must recognise; everybody else makes do with a secret of its own."""
    secret = settings.secret_key.get_secret_value()
    shared = isinstance(settings, ApiSettings) and not settings.store_url.get_secret_value().startswith("memory:")
    if shared and len(secret) < _SECRET_CHARACTERS:
        raise ConfigurationError(
            f"FNQUEUE_SECRET_KEY: at least {_SECRET_CHARACTERS} characters are needed, the same for every front end; "
            "make one with: openssl rand -hex 32"
        )
    return settings if secret else settings.model_copy(update={"secret_key": SecretStr(secrets.token_hex(32))})
