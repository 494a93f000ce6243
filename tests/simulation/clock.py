"""An event loop whose time passes only when nothing is left to do, and then at once."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
START_S = 1000.0


class Stuck(Exception):
    """Everything waits, and nothing will ever happen again."""


class _Selector(selectors.DefaultSelector):
    """Instead of waiting, it moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise Stuck
            self.now += max(0.0, timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Work for threads is done at once, in the loop: time would not wait for it."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(  # type: ignore[override]  # typeshed's is generic over the arguments
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001  it is raised where it was asked for
            done.set_exception(exc)
        return done


def simulate(work: Callable[[], Coroutine[Any, Any, T]], *, seed: int = 0) -> T:
    """What `work` returns, in a loop of its own. The same seed gives the same run."""
    random.seed(seed)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())
