"""What every handler needs, made once per process and handed to each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from api.bodies import Bodies
from api.calls import Calls
from api.channels import Channels
from api.connections import Connections
from api.limits import Pace
from api.open_files import allowed
from broker.accounts import Authenticator
from broker.errors import Overloaded, TryLater
from broker.events import Places
from broker.functions import CallableVersions
from broker.limits import RateLimiter
from broker.ports import Broker
from broker.registries import Registry, recognized
from broker.settings import ApiSettings

logger = logging.getLogger(__name__)

_HEALTH_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    broker: Broker
    settings: ApiSettings
    authenticator: Authenticator
    versions: CallableVersions
    rate_limiter: RateLimiter
    pace: Pace
    calls: Calls
    channels: Channels
    connections: Connections
    bodies: Bodies
    health: Health
    places: Places
    listeners: Listeners
    registries: Sequence[Registry]

    @classmethod
    def over(cls, broker: Broker, settings: ApiSettings) -> Front:
        """Raises ConfigurationError: the list of registries cannot be read."""
        calls = Calls()
        return cls(
            broker=broker,
            settings=settings,
            authenticator=Authenticator(
                broker, admin_key=settings.admin_key.get_secret_value(), admin_account=settings.admin_account
            ),
            versions=CallableVersions(broker),
            rate_limiter=RateLimiter(broker),
            pace=Pace(settings),
            calls=calls,
            channels=Channels(settings),
            connections=Connections(
                settings, most=allowed(settings.max_connections), most_per_address=settings.max_address_connections
            ),
            bodies=Bodies(settings),
            health=Health(broker),
            places=Places(broker.results, calls.spawn),
            listeners=Listeners(settings.max_event_streams),
            registries=recognized(settings.recognized_registries, settings.custom_registries),
        )


class Listeners:
    """How many event streams are open in this process."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """While the body runs. Raises Overloaded: there are as many as may be."""
        if self._open >= self._most:
            raise Overloaded(f"{self._most} callers listen here already; poll, or try again", retry_after_s=5)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


class Health:
    """Whether an invocation could be accepted now. One look at the servers serves all who ask within two seconds."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._looking = asyncio.Lock()
        self._fault: str | None = None
        self._until = 0.0

    async def fault(self) -> str:
        """What is wrong, '' when nothing is. Anybody may ask, so it says which server and not where."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if self._fault is None or now >= self._until:
                self._fault = await self._look()
                self._until = now + _HEALTH_S
            return self._fault

    async def _look(self) -> str:
        for name, ping in (("queue", self._broker.queue.ping), ("store", self._broker.results.ping)):
            try:
                await ping()
            except TryLater as exc:
                if not self._fault:  # once per streak
                    logger.warning("unhealthy", extra={"server": name, "cause": str(exc)})
                return f"the {name} is away"
        return ""
