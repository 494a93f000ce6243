"""A user for each deployed version, made by the management API, of which nobody else knows."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Collection
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from broker.backends.rabbitmq.access import of_version
from broker.backends.rabbitmq.facts import management
from broker.errors import ConfigurationError, LauncherUnavailable
from broker.settings import ControllerSettings
from broker.version_users import name_of, password_of

logger = logging.getLogger(__name__)

_ANSWER_BYTES = 16 * 1024 * 1024


class VersionUsers:
    """The port's Users."""

    def __init__(self, settings: ControllerSettings) -> None:
        """Raises ConfigurationError: the queue is no RabbitMQ, its management API is not named, or there is no key."""
        queue_url = settings.queue_url.get_secret_value()
        if not queue_url.startswith(("amqp://", "amqps://")):
            raise ConfigurationError("FNQUEUE_VERSION_USERS needs an FNQUEUE_QUEUE_URL of amqp:// or amqps://")
        if not (management_url := settings.queue_management_url.get_secret_value()):
            raise ConfigurationError("FNQUEUE_VERSION_USERS needs FNQUEUE_QUEUE_MANAGEMENT_URL, of an administrator")
        password_of(settings, "")
        self._settings = settings
        self._base, self._headers = management(management_url)
        self._vhost = quote(unquote(urlsplit(queue_url).path[1:]) or "/", safe="")
        self._admitted: set[str] = set()

    async def admit(self, version_ids: Collection[str], *, look: bool = False) -> None:
        wanted = set(version_ids)
        if look and wanted:
            permitted = await self._ask("GET", f"vhosts/{self._vhost}/permissions")
            there = {str(item["user"]) for item in permitted}
            self._admitted = {version_id for version_id in self._admitted if name_of(version_id) in there}
        for version_id in sorted(wanted - self._admitted):
            await self._admit(version_id)

    async def expel(self, version_id: str) -> None:
        self._admitted.discard(version_id)
        await self._ask("DELETE", f"users/{name_of(version_id)}")

    async def _admit(self, version_id: str) -> None:
        """The rights last: who has them is whole."""
        name, rights = name_of(version_id), of_version(version_id)
        await self._ask(
            "PUT", f"users/{name}", {"password": password_of(self._settings, version_id), "tags": "fnqueue"}
        )
        await self._ask("PUT", f"permissions/{self._vhost}/{name}", rights._asdict())
        self._admitted.add(version_id)
        logger.info("version_user_made", extra={"version_id": version_id, "user": name})

    async def _ask(self, method: str, path: str, content: object = None) -> Any:
        """None for what is not there. Raises LauncherUnavailable."""
        try:
            return await asyncio.to_thread(self._exchange, method, path, content)
        except urllib.error.HTTPError as exc:
            if exc.code == 404:
                return None
            why = f"it answers {exc.code}"
            cause: Exception = exc
        except (OSError, ValueError) as exc:
            why, cause = "it does not answer as expected", exc
        raise LauncherUnavailable(f"RabbitMQ's management API cannot make the user of a version: {why}") from cause

    def _exchange(self, method: str, path: str, content: object) -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._base}/api/{path}", data=data, headers=headers, method=method)  # noqa: S310  http(s) only
        with urllib.request.urlopen(request, timeout=self._settings.publish_timeout_s) as answer:  # noqa: S310
            body = answer.read(_ANSWER_BYTES)
        return json.loads(body) if body else None
