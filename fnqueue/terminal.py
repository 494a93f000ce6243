"""What commands that use the client have in common: where to call, what to say when it fails, what a person sees."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import click

from fnqueue import calls
from fnqueue.blocking import Client
from fnqueue.client import Download, Upload
from fnqueue.config import KEY_VARIABLES, load
from fnqueue.errors import (
    NO_SERVER,
    ConfigurationError,
    FnqueueError,
    Forbidden,
    IdempotencyKeyReused,
    InvalidRequest,
    NotFound,
    RequestDead,
    RequestFailed,
    TimedOut,
    TooLarge,
    UnknownFunction,
    remedy,
)
from fnqueue.tracing import exporting

C = TypeVar("C", bound=Callable[..., Any])
T = TypeVar("T")

_MEBI = 1024 * 1024
_BAR = 24
# Percent, where there is a line for each.
_STEP = 25
# Of a terminal that does not know its own.
_WIDTH = 80
# Failures in a row that nobody needs to hear of: a second or so.
_HICCUPS = 3
# What of it that was typed or set cannot be right.
_INVALID = frozenset({400, 413, 422})
# What is so of one thing, and need not be so of the next.
_OF_ONE = (NotFound, Forbidden, InvalidRequest, ValueError)
_WRONG = (ConfigurationError, InvalidRequest, TooLarge, IdempotencyKeyReused, TypeError, ValueError)


def server_options(command: C) -> C:
    """`url`, `key` and `as_json`. Without the first two the configuration file says."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--key", envvar=list(KEY_VARIABLES), help="The API key. [FNQUEUE_API_KEY]"),
        click.option("--url", envvar="FNQUEUE_URL", help="The server. [FNQUEUE_URL]"),
    ):
        command = option(command)
    return command


class Wrong(click.ClickException):
    """What was typed or set cannot be right."""

    exit_code = 2


class Failed(click.ClickException):
    """The request ended without a result, or the deployment without an instance."""

    exit_code = 3


class Unfinished(click.ClickException):
    """The request or the deployment goes on, and nobody waits any longer."""

    exit_code = 4


class _Patience(logging.Handler):
    """Says once that a call is made again and again: without, a wrong URL looks like a command that hangs."""

    def __init__(self, retry_for_s: float) -> None:
        super().__init__(logging.INFO)
        self._retry_for_s = retry_for_s
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "call_repeated" and record.__dict__["failures"] >= _HICCUPS and not self._told:
            self._told = True
            error = record.__dict__["error"].partition("; ")[0]
            click.echo(f"fnqueue: {error}; trying again for up to {self._retry_for_s:g} s", err=True)


@contextmanager
def _patient(retry_for_s: float) -> Iterator[None]:
    logger, handler = logging.getLogger("fnqueue.transport"), _Patience(retry_for_s)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def calling(url: str | None, key: str | None, *, retry_for_s: float = 30.0) -> Iterator[Client]:
    """A client whose errors end the command with one line and a status."""
    try:
        with _patient(retry_for_s), exporting("fnqueue-cli"), Client(url, key, retry_for_s=retry_for_s) as client:
            yield client
    except BrokenPipeError:
        raise
    except (FnqueueError, OSError, TypeError, ValueError) as exc:
        raise _ended_by(exc) from exc


def _ended_by(error: Exception) -> click.ClickException:
    if isinstance(error, _WRONG):
        return Wrong(str(error))
    if isinstance(error, RequestFailed):
        hint = f"; `fnqueue status {error.request_id}` tells of its attempts" if isinstance(error, RequestDead) else ""
        return Failed(f"request {error.request_id} failed: {error}{hint}")
    if isinstance(error, TimedOut):
        return Unfinished(str(error))
    if isinstance(error, UnknownFunction):
        return click.ClickException(f"{error}; `fnqueue functions list` shows which there are")
    return click.ClickException(str(error))


def of_each(ids: Iterable[str], act: Callable[[str], T]) -> tuple[dict[str, T], dict[str, Exception]]:
    """What `act` made of each, and why it could not of others. An error that is not of one alone is that of all that
    are left: they are not tried."""
    done: dict[str, T] = {}
    failed: dict[str, Exception] = {}
    over: Exception | None = None
    for one in dict.fromkeys(ids):
        try:
            if over is None:
                done[one] = act(one)
            else:
                failed[one] = over
        except (FnqueueError, ValueError) as exc:
            failed[one] = exc
            over = None if isinstance(exc, _OF_ONE) else exc
    return done, failed


def refuse(failed: Mapping[str, Exception], what: str) -> None:
    """End the command with one line, if there are any. `what` was not done to them."""
    if not failed:
        return
    ended = [_ended_by(exc) for exc in failed.values()]
    told = "; ".join(f"{one}: {exc.message}" for one, exc in zip(failed, ended, strict=True))
    kind = Wrong if all(isinstance(exc, Wrong) for exc in ended) else click.ClickException
    raise kind(f"not {what}: {told}")


@contextmanager
def asking(url: str | None, key: str | None) -> Iterator[calls.Server]:
    """As `calling`, where answers are shown as they came; nothing is asked twice."""
    try:
        config = load(url, key)
        yield calls.Server(config.url, config.key)
    except ConfigurationError as exc:
        raise Wrong(str(exc)) from exc
    except calls.NoServer as exc:
        raise click.ClickException(f"{exc}{NO_SERVER}") from exc
    except calls.Refused as exc:
        kind = Wrong if exc.status in _INVALID else click.ClickException
        raise kind(f"{exc}{remedy(exc.status)}") from exc
    except calls.Failed as exc:
        raise click.ClickException(str(exc)) from exc


def _moves(stream: TextIO) -> bool:
    """Whether it is a terminal whose cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Line:
    """One line on standard error that tells how far something is: written over in a terminal, and below each other
    elsewhere, each text once."""

    def __init__(self) -> None:
        self._terminal = _moves(sys.stderr)
        self._shown = ""

    def show(self, text: str) -> None:
        if text == self._shown:
            return
        self._shown = text
        if self._terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH
            click.echo(f"\r\x1b[K{text[: width - 1]}", nl=False, err=True)
        else:
            click.echo(text, err=True)

    def uploading(self, upload: Upload) -> None:
        self._show_bar(f"uploading {upload.name}", upload.sent_bytes, upload.size_bytes)

    def downloading(self, download: Download) -> None:
        """In a terminal only: it is over when the command is."""
        if self._terminal and download.size_bytes:
            self._show_bar("fetching the answer", download.received_bytes, download.size_bytes)

    def _show_bar(self, what: str, done_bytes: int, size_bytes: int) -> None:
        done = 100 * done_bytes // max(1, size_bytes)
        if not self._terminal:
            done -= done % _STEP
        full = done * _BAR // 100
        bar = f" [{'#' * full}{'.' * (_BAR - full)}]" if self._terminal else ""
        self.show(f"{what}:{bar} {done} % of {size_bytes / _MEBI:.1f} MiB")

    def end(self) -> None:
        if self._terminal and self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)
        self._shown = ""


class Screen:
    """What is shown again and again: in a terminal in the same place, elsewhere below each other."""

    def __init__(self) -> None:
        self._terminal = _moves(sys.stdout)
        self._begun = False

    def show(self, text: str) -> None:
        if not self._terminal:
            click.echo(text)
            return
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in text.splitlines()[: size.lines - 1]]
        # The first time what was there scrolls away; later each line is written over, so that nothing flickers.
        click.echo("" if self._begun else "\n" * (size.lines - 1), nl=False)
        click.echo("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", nl=False)
        self._begun = True


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Nothing but the heads where there are no rows."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows))
    return "\n".join(line.rstrip() for line in lines)
