"""A reader of server-sent events, as a browser reads them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: Any
    id: str


@dataclass
class Listening:
    """One open stream. `last_id` is what a browser would send when it comes back; `comments` counts keep-alives."""

    response: aiohttp.ClientResponse
    last_id: str = ""
    comments: int = 0
    seen: list[Event] = field(default_factory=list)

    async def next(self) -> Event | None:
        """None at the end of the stream."""
        name, data, found = "message", list[str](), ""
        async for raw in self.response.content:
            line = raw.decode().rstrip("\n")
            field_name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line and data:
                self.last_id = found or self.last_id
                event = Event(name, json.loads("\n".join(data)), found)
                self.seen.append(event)
                return event
            if line.startswith(":"):
                self.comments += 1
            elif field_name == "event":
                name = value
            elif field_name == "data":
                data.append(value)
            elif field_name == "id":
                found = value
        return None

    async def until(self, name: str) -> Event:
        """The next event of that name; fails when the stream ends first."""
        while (event := await self.next()) is not None:
            if event.name == name:
                return event
        raise AssertionError(f"ended without {name}; saw {self.seen}")

    async def rest(self) -> list[Event]:
        """All that comes until the stream ends."""
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


@asynccontextmanager
async def listening(
    session: aiohttp.ClientSession, url: str, *, headers: Mapping[str, str] | None = None, last_id: str = ""
) -> AsyncIterator[Listening]:
    sent = {**(headers or {}), **({"Last-Event-ID": last_id} if last_id else {})}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=40)
    async with session.get(url, headers=sent, timeout=timeout) as response:
        yield Listening(response)
