"""Waiting for a condition that nobody announces."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(look: Callable[[], Awaitable[T]], until: Callable[[T], bool], *, within_s: float = 60.0) -> T:
    """What `look` saw first that satisfies `until`. Fails with what it saw last."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not until(seen := await look()):
        assert asyncio.get_running_loop().time() < deadline, f"not within {within_s} s; last seen: {seen!r}"
        await asyncio.sleep(0.02)
    return seen
