"""What commands that use the client have in common: where to call, what to say when it fails, what a person sees."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from fnqueue.blocking import Client
from fnqueue.client import Upload
from fnqueue.config import KEY_VARIABLES
from fnqueue.errors import ConfigurationError, FnqueueError, InvalidRequest, RequestFailed, TimedOut
from fnqueue.tracing import exporting

C = TypeVar("C", bound=Callable[..., Any])

_MEBI = 1024 * 1024
_BAR = 24


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


@contextmanager
def calling(url: str | None, key: str | None, *, retry_for_s: float = 30.0) -> Iterator[Client]:
    """A client whose errors end the command with one line and a status."""
    try:
        with exporting("fnqueue-cli"), Client(url, key, retry_for_s=retry_for_s) as client:
            yield client
    except ConfigurationError as exc:
        raise Wrong(str(exc)) from exc
    except InvalidRequest as exc:
        raise Wrong(str(exc)) from exc
    except RequestFailed as exc:
        raise Failed(f"request {exc.request_id} failed: {exc}") from exc
    except TimedOut as exc:
        raise Unfinished(str(exc)) from exc
    except (FnqueueError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc
    except (TypeError, ValueError) as exc:
        raise Wrong(str(exc)) from exc


class Line:
    """One line on standard error that tells how far something is: written over in a terminal, and below each other
    elsewhere, each text once."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = ""

    def show(self, text: str) -> None:
        if text == self._shown:
            return
        self._shown = text
        if self._terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            click.echo(f"\r\x1b[K{text[: width - 1]}", nl=False, err=True)
        else:
            click.echo(text, err=True)

    def uploading(self, upload: Upload) -> None:
        done = 100 * upload.sent_bytes // max(1, upload.size_bytes)
        full = done * _BAR // 100
        bar = f" [{'#' * full}{'.' * (_BAR - full)}]" if self._terminal else ""
        self.show(f"uploading {upload.name}:{bar} {done} % of {upload.size_bytes / _MEBI:.1f} MiB")

    def end(self) -> None:
        if self._terminal and self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)
        self._shown = ""


class Screen:
    """What is shown again and again: in a terminal in the same place, elsewhere below each other."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
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
