"""Logs: one JSON object a line on standard error, or readable text for people.

Event names are constant; facts are fields given in `extra`. `public` marks the lines that a function's author may see,
`metering` those that are billed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import sys
import time
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal, TextIO

import orjson

# What is billed must not be lost to a log level.
METERING = "fnqueue.metering"

# A record's own attributes come first, what was given in `extra` after them.
_OWN = len(vars(logging.makeLogRecord({})))
_ADDED = frozenset({"message", "asctime"})  # by a formatter that had the record before

# The password of a URL, what a URL is signed with, bearer tokens, and secrets of webhooks.
_CREDENTIAL = re.compile(
    r"(?P<before>://[^/\s:@\"]*:(?=[^/\s@\"]+@)|X-Amz-(?:Signature|Credential|Security-Token)=|Bearer |nvapi-|whsec_)"
    r"[^/\s@&\"'\\]+",
    re.IGNORECASE,
)


def configure(level: str, log_format: Literal["json", "text"]) -> None:
    """Send every log line of this process to standard error. Call once, from a command."""
    # Who called, from which thread and task is on no line of ours, and finding it out costs a third of one.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = _Lines(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger(METERING).setLevel(logging.INFO)
    for noisy in ("aio_pika", "aiormq", "botocore", "boto3", "urllib3", "s3transfer", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


class Note:
    """As `logger.info(event, extra={**constant, **facts})`, for what is logged once an invocation: where lines go
    nowhere but to our own handler, nothing else is told of them, and `constant` is packed once."""

    def __init__(self, logger: logging.Logger, event: str, constant: dict[str, object]) -> None:
        self._logger = logger
        self._event = event
        self._constant = constant
        head = {"level": "INFO", "logger": logger.name, "event": event, **constant}
        self._packed = orjson.dumps(head, default=str)[1:-1].decode()

    def add(self, facts: dict[str, object]) -> None:
        """A line with these too, of which there is at least one."""
        if not self._logger.isEnabledFor(logging.INFO):
            return
        handler = _only_handler(self._logger)
        if handler is None:
            self._logger.info(self._event, extra={**self._constant, **facts})
        else:
            rest = orjson.dumps(facts, default=str).decode()
            handler.add(f'{{"time":"{_timestamp(time.time())}",{self._packed},{rest[1:]}')


def _only_handler(logger: logging.Logger) -> _Lines | None:
    """Ours, if it writes JSON and there is no other handler or filter on the line's way."""
    root = logging.root
    if len(root.handlers) != 1 or logger.handlers or logger.filters or logger.parent is not root:
        return None
    handler = root.handlers[0]
    return handler if type(handler) is _Lines and handler.writes_json and not handler.filters else None


class _Lines(logging.StreamHandler[TextIO]):
    """Writes what a turn of the loop logs in one piece; without a loop, and from a warning on, at once."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    @property
    def writes_json(self) -> bool:
        return isinstance(self.formatter, _Json)

    def add(self, line: str, *, at_once: bool = False) -> None:
        self._lines.append(line)
        if len(self._lines) > 1 and not at_once:
            return
        loop = _running_loop()
        if loop is None or at_once:
            self.flush()
        else:
            loop.call_soon(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.add(self.format(record), at_once=record.levelno >= logging.WARNING)
        except Exception:  # noqa: BLE001  as every handler: logging must not break what it tells of
            self.handleError(record)

    def flush(self) -> None:
        with self.lock or nullcontext():
            lines, self._lines = self._lines, []
            try:
                if lines:
                    self.stream.write("\n".join(lines) + self.terminator)
                super().flush()
            except (OSError, ValueError):
                return  # Whoever read is gone, the disk is full, or the stream closed: there is nobody to be told.


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _scrubbed(record, orjson.dumps(line, default=str).decode())


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={value}" for name, value in _facts(record).items())
        line = f"{_timestamp(record.created)} {record.levelname:<7} {record.getMessage()} {facts}".rstrip()
        return _scrubbed(record, f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


def scrubbed(text: str) -> str:
    """Without passwords of URLs, what URLs are signed with, bearer tokens and secrets of webhooks."""
    return _CREDENTIAL.sub(r"\g<before>***", text)


def _scrubbed(record: logging.LogRecord, line: str) -> str:
    """Without the credentials that libraries put into what they raise. No line of ours has any; this is for trouble
    that nobody foresaw."""
    return scrubbed(line) if record.levelno >= logging.WARNING else line


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in islice(vars(record).items(), _OWN, None) if name not in _ADDED}


def _timestamp(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
