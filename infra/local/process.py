"""A real process under our care: started until it answers, stopped or killed with all that it started."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

LOOPBACK = "127.0.0.1"
PROBE_S = 2.0  # one question to a server, in `answers`
GONE_S = 5.0  # from SIGKILL to the last process of the group being gone
POLL_S = 0.05
TAIL_LINES = 20
PORTS = range(10_000, 20_000)  # the launcher of processes gives its instances those above
MEMBER = "FNQUEUE_STACK_MEMBER"  # in the environment of all that runs below a supervisor: its folder


class ServerFailed(Exception):
    """A server did not start, or is not running; the message ends with the tail of its log."""


class Server(ABC):
    """One process (and what it starts) on a private port, with its own data folder.

    Every method blocks and is bounded; from a coroutine, go through `asyncio.to_thread`. A server keeps its
    port and its data over `stop`, `kill` and the next `start`. As a context manager it runs inside the block.
    """

    name: str
    start_s = 60.0
    stop_s = 20.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log = self.folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find it, credentials included."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What to execute. Never carries a secret: anybody on the machine can read it."""

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """All of the process's environment."""

    def working_folder(self) -> Path:
        return self.folder

    @abstractmethod
    def answers(self) -> bool:
        """Whether a client would be served right now; takes a few seconds at most."""

    def start(self) -> None:
        """Return once the server answers. Does nothing when it is running.

        Raises ServerFailed when it exits or stays silent for `start_s`; then nothing of it is left running.
        """
        if self.alive():
            return
        self.spawn()
        silent_at = time.monotonic() + self.start_s
        while not self.answers():
            if not self.alive():
                raise self._failure("exited while starting")
            if time.monotonic() >= silent_at:
                self.kill()
                raise self._failure(f"did not answer within {self.start_s:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End it in good order (SIGTERM), by force after `stop_s`. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.stop_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL its whole process group and wait until it is gone. Idempotent."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(GONE_S)
        self._await_group_gone(self._process.pid)
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def spawn(self) -> None:
        """Start the process and return at once; for who watches it (`start` waits until it answers)."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                list(self.command()),
                env=dict(self.environment()),
                cwd=self.working_folder(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Leader of the server's process group. Raises ServerFailed when it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise self._failure("is not running")
        return self._process.pid

    @property
    def leader(self) -> int | None:
        """The process last started, dead or alive, until `stop` or `kill` has cleared it away."""
        return None if self._process is None else self._process.pid

    def tail(self) -> str:
        """The last lines of its log."""
        with contextlib.suppress(FileNotFoundError), self.log.open(errors="replace") as lines:
            return "".join(deque(lines, TAIL_LINES))
        return ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _failure(self, what: str) -> ServerFailed:
        return ServerFailed(f"{self.name} {what}; the end of {self.log}:\n{self.tail()}")

    def _await_group_gone(self, group: int) -> None:
        """Those of the group that we inherited (a supervisor does) stay in it until we collect them."""
        gone_at = time.monotonic() + GONE_S
        while time.monotonic() < gone_at:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-group, os.WNOHANG)
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(POLL_S / 10)


def bare_environment() -> dict[str, str]:
    """What a server needs of ours, and none of our secrets or of the user's own settings for it."""
    kept = ("PATH", "LANG", "TMPDIR", "TZ", MEMBER)
    return {name: os.environ[name] for name in kept if name in os.environ}


def free_port() -> int:
    """A loopback port of `PORTS` that nobody listens on.

    The kernel gives none of them to outgoing connections, unless it was told otherwise: a client that keeps
    reconnecting to a killed server would, one day, be given that very port as its own, connect to itself, and keep
    the server from ever binding it again.
    """
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise ServerFailed(f"no free port from {PORTS.start} to {PORTS.stop} on {LOOPBACK}")


def kept_secret(path: Path, make: Callable[[], str] = lambda: secrets.token_hex(32)) -> str:
    """The secret in `path`, made on first use; only the owner can read the file."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(make())
    with contextlib.suppress(FileExistsError):  # somebody else was first: theirs counts
        os.link(draft, path)
    draft.unlink()
    return path.read_text()
