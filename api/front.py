"""What every handler needs, made once per process and handed to each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from api.bodies import Bodies
from api.calls import Calls
from api.channels import Channels
from api.connections import Connections
from api.headers import Heads
from api.limits import Pace
from api.open_files import allowed
from broker.accounts import Authenticator
from broker.egress import Egress
from broker.errors import Overloaded, TryLater
from broker.events import Places
from broker.functions import CallableVersions
from broker.limits import RateLimiter
from broker.outlooks import Outlooks
from broker.ports import Broker
from broker.registries import Registry, recognized
from broker.settings import ApiSettings
from broker.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

QUEUE, STORE = "queue", "store"
_HEALTH_S = 2.0
_LOOK_S = 3.0  # whoever asks whether to send requests here waits for five seconds


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
    heads: Heads
    health: Health
    places: Places
    outlooks: Outlooks
    listeners: Listeners
    registries: Sequence[Registry]
    egress: Egress

    @property
    def metrics(self) -> Metrics:
        return self.broker.metrics

    @classmethod
    def over(cls, broker: Broker, settings: ApiSettings) -> Front:
        """Raises ConfigurationError: the list of registries cannot be read, or where webhooks may go."""
        calls = Calls(most_per_account=settings.account_calls)
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
            heads=Heads(),
            health=Health(broker),
            places=Places(broker.results, calls.spawn),
            outlooks=Outlooks(broker, calls.spawn),
            listeners=Listeners(settings.max_event_streams),
            registries=recognized(settings.recognized_registries, settings.custom_registries),
            egress=Egress.of(settings),
        )


class Listeners:
    """How many event streams are open in this process."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open = 0

    @property
    def open(self) -> int:
        return self._open

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
        self._away: tuple[str, ...] = ()
        self._until = 0.0

    async def away(self) -> tuple[str, ...]:
        """Which servers are. Anybody may ask, so it says not where they are."""
        async with self._looking:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._until:
                looks = await asyncio.gather(
                    self._look(QUEUE, self._broker.queue.ping), self._look(STORE, self._broker.results.ping)
                )
                self._away = tuple(name for name in looks if name)
                self._until = loop.time() + _HEALTH_S
            return self._away

    async def _look(self, name: str, ping: Callable[[], Awaitable[None]]) -> str:
        try:
            async with asyncio.timeout(_LOOK_S):
                await ping()
        except (TryLater, TimeoutError) as exc:
            if name not in self._away:  # once per streak
                logger.warning("unhealthy", extra={"server": name, "cause": str(exc)})
            return name
        return ""
