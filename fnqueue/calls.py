"""Calls to a server, for the command line: by the standard library alone, so that it runs before anything else is
installed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from types import MappingProxyType
from typing import Any

CALL_TIMEOUT_S = 30.0


class Failed(Exception):
    """The text says which step failed, and why."""


class NoServer(Failed):
    """Nothing answers."""


class Refused(Failed):
    """The server answered with an error, of this HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotYet(Refused):
    """The server said to try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`headers` is what the server said about the request, names in its spelling."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Raises Failed."""
        try:
            parsed = json.loads(self.body)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise Failed(f"the server did not answer with a JSON object, but with {self.body[:200]!r}")
        return parsed


class Server:
    """Blocks, for `timeout_s` at most. All raise Failed, and of that Refused, or NotYet where the server says to try
    again."""

    def __init__(self, url: str, key: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._url = url
        self._key = key
        self._timeout_s = timeout_s
        # Without the environment's proxies, which could not reach this machine's loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        return self._call("GET", path, None, headers)

    def post(self, path: str, content: Any, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        body = json.dumps(content).encode()
        return self._call("POST", path, body, {"Content-Type": "application/json", **headers})

    def put(self, path: str, content: Any) -> Answer:
        return self._call("PUT", path, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def delete(self, path: str) -> Answer:
        return self._call("DELETE", path, None, {})

    def fetch(self, url: str) -> bytes:
        """What a URL gives that needs no key."""
        try:
            with self._opener.open(_checked(url), timeout=self._timeout_s) as response:
                return bytes(response.read())
        except (OSError, HTTPException, ValueError) as exc:
            raise Failed(f"the input could not be fetched: {exc}") from exc

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        _checked(self._url)
        sent = {"Authorization": f"Bearer {self._key}", **headers}
        try:
            request = urllib.request.Request(self._url + path, body, sent, method=method)  # noqa: S310  checked above
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return Answer(status=response.status, headers=_about(response.headers), body=response.read())
        except urllib.error.HTTPError as exc:
            with exc:
                kind = NotYet if exc.code in (429, 503) else Refused
                raise kind(f"{method} {path} was answered {exc.code}: {_reason(exc)}", exc.code) from exc
        except urllib.error.URLError as exc:
            raise NoServer(f"no server answers at {self._url}: {exc.reason}") from exc
        except (OSError, HTTPException, ValueError) as exc:
            raise Failed(f"{method} {path} failed: {exc}") from exc


def _checked(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise Failed(f"{url!r} is not a URL: it begins with http:// or https://")
    return url


def _about(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in ("date", "server", "connection")}


def _reason(error: urllib.error.HTTPError) -> str:
    """The problem's detail, or the start of whatever came."""
    body = error.read(4000)
    try:
        problem = json.loads(body)
        return str(problem.get("detail") or problem.get("title") or problem)
    except (ValueError, AttributeError):
        return body[:200].decode(errors="replace")
