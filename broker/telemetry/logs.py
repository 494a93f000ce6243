"""Logs: one JSON object a line on standard error, or readable text for people.

Event names are constant; facts are fields given in `extra`. `public` marks the lines that a function's author may see,
`metering` those that are billed.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from itertools import islice
from typing import Any, Literal

import orjson

# What is billed must not be lost to a log level.
METERING = "fnqueue.metering"

# A record's own attributes come first, what was given in `extra` after them.
_OWN = len(vars(logging.makeLogRecord({})))
_ADDED = frozenset({"message", "asctime"})  # by a formatter that had the record before

# The password of a URL, what a URL is signed with, and bearer tokens.
_CREDENTIAL = re.compile(
    r"(?P<before>://[^/\s:@\"]*:(?=[^/\s@\"]+@)|X-Amz-(?:Signature|Credential|Security-Token)=|Bearer |nvapi-)"
    r"[^/\s@&\"'\\]+",
    re.IGNORECASE,
)


def configure(level: str, log_format: Literal["json", "text"]) -> None:
    """Send every log line of this process to standard error. Call once, from a command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger(METERING).setLevel(logging.INFO)
    for noisy in ("aio_pika", "aiormq", "botocore", "boto3", "urllib3", "s3transfer", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


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


def _scrubbed(record: logging.LogRecord, line: str) -> str:
    """Without the credentials that libraries put into what they raise. No line of ours has any; this is for trouble
    that nobody foresaw."""
    return _CREDENTIAL.sub(r"\g<before>***", line) if record.levelno >= logging.WARNING else line


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in islice(vars(record).items(), _OWN, None) if name not in _ADDED}


def _timestamp(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
