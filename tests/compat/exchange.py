"""HTTP as it is written: a request goes out byte for byte, and every header that comes back is kept."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from multidict import CIMultiDict, CIMultiDictProxy

WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, target: str, headers: CIMultiDict[str], body: bytes) -> bytes:
    """The bytes of a request with these headers and none but these."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def exchange(url: str, sent: bytes) -> Reply:
    """Send bytes over a connection of their own and read one answer."""
    host = urlsplit(url)
    with socket.create_connection((host.hostname, host.port), timeout=WAIT_S) as connection:
        connection.sendall(sent)
        response = HTTPResponse(connection, method=sent.partition(b" ")[0].decode())
        response.begin()
        return Reply(response.status, CIMultiDictProxy(CIMultiDict(response.getheaders())), response.read())
