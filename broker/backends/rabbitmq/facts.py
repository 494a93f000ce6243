"""What a RabbitMQ says of itself: over AMQP, and by its management API where that is configured."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from aiormq import exceptions as amqp
from pamqp import commands

from broker.backends.rabbitmq.connection import Line, answering
from broker.backends.rabbitmq.messages import DEAD, queue_name
from broker.backends.rabbitmq.wire import Channel, Returned, properties
from broker.errors import ConfigurationError, Unavailable
from broker.facts import Node, QueueFacts, QueueInfo
from broker.settings import Settings

_CONFIRMED_S = 3.0
_NOWHERE = "fnq.doctor"  # no queue has this name
_ANSWER_BYTES = 16 * 1024 * 1024
MOST_QUEUES = 500
_BAD_URL = "FNQUEUE_QUEUE_MANAGEMENT_URL: not a URL like http://user:password@host:15672"
_AN_OWN_QUEUE = queue_name("0")


async def look(url: str, settings: Settings, *, management_url: str = "", probe: bool = False) -> QueueFacts:
    """Bounded. A server that is away is a fault, and no error. `probe` also publishes a message that goes nowhere: only
    who publishes is told of an alarm.

    Raises ConfigurationError for a URL that is none.
    """
    facts = await _by_amqp(url, settings, probe=probe)
    if not management_url:
        return facts
    base, headers = management(management_url)
    vhost = quote(unquote(urlsplit(url).path[1:]) or "/", safe="")
    return await asyncio.to_thread(_by_management, facts, base, headers, vhost, settings.publish_timeout_s)


async def _by_amqp(url: str, settings: Settings, *, probe: bool) -> QueueFacts:
    line = Line(url, "doctor", answer_s=settings.publish_timeout_s)
    facts = QueueFacts(kind="rabbitmq", address=line.places)
    try:
        channel = await line.channel()
        version = channel.wire.server_properties.get("version", "")
        facts = replace(facts, version=version.decode() if isinstance(version, bytes) else str(version))
        async with answering(settings.publish_timeout_s, Unavailable, line.away):
            dead_letters = await _dead_letters(channel)
        facts = replace(facts, dead_letters=dead_letters)
        return replace(facts, blocked=await _is_blocked(line)) if probe else facts
    except Unavailable as exc:
        refused = isinstance(exc.__cause__, amqp.AuthenticationError | amqp.ProbableAuthenticationError)
        why = "it refuses the URL's user or password" if refused else "it does not answer"
        return replace(facts, fault=why)
    finally:
        await line.close()


async def _dead_letters(channel: Channel) -> int | None:
    try:
        declared = await channel.call(commands.Queue.Declare(queue=DEAD, passive=True))
    except amqp.ChannelNotFoundEntity:
        return None
    return declared.message_count if isinstance(declared, commands.Queue.DeclareOk) else None


async def _is_blocked(line: Line) -> bool | None:
    """None: this user may not publish, and so is not told."""
    channel = await line.channel(confirms=True)
    message = properties({}, content_type="", expiration="0", message_id=_NOWHERE, app_id="fnqueue")
    try:
        async with answering(_CONFIRMED_S, Unavailable, line.away):
            for _ in range(2):  # it stops reading behind the first one
                with suppress(Returned):
                    await channel.publish(_NOWHERE, _NOWHERE, message, b"")
    except Unavailable as exc:
        if isinstance(exc.__cause__, TimeoutError):
            return True
        if isinstance(exc.__cause__, amqp.ChannelAccessRefused):
            return None
        raise
    return False


def management(url: str) -> tuple[str, dict[str, str]]:
    """Where it is without the credentials, and the header that carries them. Raises ConfigurationError."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its text could hold a part of the password
        raise ConfigurationError(_BAD_URL) from None
    if not known:
        raise ConfigurationError(_BAD_URL)
    host = parts.netloc.rpartition("@")[2]
    user = f"{unquote(parts.username or 'guest')}:{unquote(parts.password or 'guest')}"
    base = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    return base, {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


def _by_management(
    facts: QueueFacts, base: str, headers: Mapping[str, str], vhost: str, timeout_s: float
) -> QueueFacts:
    def get(path: str) -> Any:
        request = urllib.request.Request(f"{base}/api/{path}", headers=dict(headers))  # noqa: S310  http(s) only
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            return json.loads(answer.read(_ANSWER_BYTES))

    try:
        nodes = tuple(_node(item) for item in get("nodes"))
        policies = {
            str(item["name"]): dict(item["definition"])
            for item in get(f"policies/{vhost}")
            if item.get("apply-to") in ("queues", "all", "quorum_queues") and _matches(item["pattern"])
        }
        columns = "name,type,members,online,effective_policy_definition"
        listed = get(f"queues/{vhost}?page=1&page_size={MOST_QUEUES}&name=%5Efnq%5C.&use_regex=true&columns={columns}")
        queues = tuple(_queue(item) for item in listed["items"])
    except urllib.error.HTTPError as exc:
        return replace(facts, management=f"it answers {exc.code}")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        return replace(facts, management=f"it does not answer as expected ({type(exc).__name__})")
    return replace(facts, management="", nodes=nodes, policies=policies, queues=queues)


def _matches(pattern: str) -> bool:
    try:
        return re.search(pattern, _AN_OWN_QUEUE) is not None
    except re.error:  # Erlang's and ours differ in rare forms
        return False


def _node(item: Mapping[str, Any]) -> Node:
    return Node(
        name=str(item["name"]),
        running=bool(item.get("running")),
        memory_alarm=bool(item.get("mem_alarm")),
        disk_alarm=bool(item.get("disk_free_alarm")),
        partitioned=bool(item.get("partitions")),
    )


def _queue(item: Mapping[str, Any]) -> QueueInfo:
    # Absent for up to 10 s after a declaration: it comes with a queue's statistics.
    policy = item.get("effective_policy_definition")
    return QueueInfo(
        name=str(item["name"]),
        kind=str(item.get("type", "")),
        members=len(item.get("members", ())),
        online=len(item.get("online", ())),
        policy=None if policy is None else dict(policy),
    )
