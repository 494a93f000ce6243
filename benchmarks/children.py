"""Parts of a benchmark that run in processes of their own, with a pipe to the one that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

from benchmarks.load import REPLY_S
from benchmarks.targets import SetUpFailed

READY_S = 300.0


@dataclass(frozen=True, slots=True)
class Child:
    """`first` is what it told when it was ready."""

    name: str
    pid: int
    first: Any
    pipe: Connection

    def ask(self, what: object = None, *, within_s: float = REPLY_S) -> Any:
        """What it answers. Raises SetUpFailed."""
        self.pipe.send(what)
        return _told(self.pipe, self.name, within_s)


def end_with_all() -> None:
    """A SIGTERM ends this process as Ctrl-C does, with all that it started."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def child(role: Callable[..., None], *arguments: object) -> Iterator[Child]:
    """Run `role(connection, *arguments)` in a process until the block ends, which begins when it has told something.

    Raises SetUpFailed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=role, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that its end is noticed
    try:
        assert process.pid is not None, "it was started"
        first = _told(ours, role.__name__, READY_S)
        yield Child(role.__name__, process.pid, first, ours)
    finally:
        process.terminate()
        process.join(REPLY_S)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _told(pipe: Connection, name: str, within_s: float) -> Any:
    if not pipe.poll(within_s):
        raise SetUpFailed(f"{name} told nothing within {within_s:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise SetUpFailed(f"{name} came to an end") from None
