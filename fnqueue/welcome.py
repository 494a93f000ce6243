"""A first visit to a server: find or make the sample function, deploy it, invoke it once, and say how to go on.

By the standard library alone, so that it runs before anything else is installed.
"""

from __future__ import annotations

import json
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from types import MappingProxyType
from typing import Any

NAME = "echo"
IMAGE = "fnqueue/echo:latest"
FUNCTION = {
    "name": NAME,
    "inferenceUrl": "/echo",
    "containerImage": IMAGE,
    "description": "Says a message back, repeated, after a delay",
    "health": {"protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200},
}
DEPLOYMENT = {
    "deploymentSpecifications": [
        {"gpu": "CPU", "instanceType": "CPU", "minInstances": 1, "maxInstances": 1, "maxRequestConcurrency": 4}
    ]
}
INPUT = {"message": "hello", "repeats": 2, "delay": 0}

ACTIVE_WITHIN_S = 60.0
RESULT_WITHIN_S = 60.0
CALL_TIMEOUT_S = 30.0
_LOOK_S = 0.1
_POLL_S = 20


class Failed(Exception):
    """The text says which step failed, and why."""


class NotYet(Failed):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What was found, and the proof that it works."""

    url: str
    key: str
    function_id: str
    version_id: str
    answer: Answer

    @property
    def curl(self) -> str:
        """A line that invokes the function when it is pasted into a shell."""
        words = [
            *("curl", "-sS", f"{self.url}/v2/nvcf/pexec/functions/{self.function_id}"),
            *("-H", f"Authorization: Bearer {self.key}"),
            *("-H", "Content-Type: application/json"),
            *("-d", json.dumps(INPUT)),
        ]
        return shlex.join(words)

    def facts(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "key": self.key,
            "function": NAME,
            "functionId": self.function_id,
            "versionId": self.version_id,
            "curl": self.curl,
            "status": self.answer.status,
            "headers": dict(self.answer.headers),
            "result": self.answer.json(),
        }

    def text(self) -> str:
        told = "\n".join(f"    {name}: {value}" for name, value in self.answer.headers.items())
        return (
            f"\n  URL        {self.url}\n"
            f"  API key    {self.key}\n"
            f"  Function   {NAME}, {self.function_id}\n"
            f"\n  Invoke it:\n\n    {self.curl}\n"
            f"\n  As just done, with HTTP {self.answer.status}:\n\n{told}\n\n    {self.answer.body.decode()}\n"
        )


def welcome(url: str, key: str) -> Welcome:
    """Blocks, for `ACTIVE_WITHIN_S` and `RESULT_WITHIN_S` at most. Raises Failed."""
    server = _Server(url, key)
    function = _sample(server)
    function_id, version_id = str(function["id"]), str(function["versionId"])
    _make_active(server, function_id, version_id)
    answer = _invoke(server, function_id)
    return Welcome(url=url, key=key, function_id=function_id, version_id=version_id, answer=answer)


class _Server:
    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key
        # Without the environment's proxies, which could not reach this machine's loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        return self._call("GET", path, None, headers)

    def post(self, path: str, content: Any, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        body = json.dumps(content).encode()
        return self._call("POST", path, body, {"Content-Type": "application/json", **headers})

    def delete(self, path: str) -> Answer:
        return self._call("DELETE", path, None, {})

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        if not self._url.startswith(("http://", "https://")):
            raise Failed(f"{self._url!r} is not a URL: it begins with http:// or https://")
        sent = {"Authorization": f"Bearer {self._key}", **headers}
        try:
            request = urllib.request.Request(self._url + path, body, sent, method=method)  # noqa: S310  checked above
            with self._opener.open(request, timeout=CALL_TIMEOUT_S) as response:
                return Answer(status=response.status, headers=_about(response.headers), body=response.read())
        except urllib.error.HTTPError as exc:
            with exc:
                kind = NotYet if exc.code in (429, 503) else Failed
                raise kind(f"{method} {path} was answered {exc.code}: {_reason(exc)}") from exc
        except urllib.error.URLError as exc:
            raise Failed(f"no server answers at {self._url}: {exc.reason}") from exc
        except (OSError, HTTPException, ValueError) as exc:
            raise Failed(f"{method} {path} failed: {exc}") from exc


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


def _sample(server: _Server) -> dict[str, Any]:
    """A deployed one if there is, else any, else a new one."""
    listed = server.get("/v2/nvcf/functions?visibility=private").json().get("functions", [])
    found = [one for one in listed if one.get("name") == NAME and one.get("containerImage") == IMAGE]
    for status in ("ACTIVE", "DEGRADING", "DEPLOYING", "DEGRADED", "INACTIVE", "ERROR"):
        for function in found:
            if function.get("status") == status:
                return dict(function)
    return dict(server.post("/v2/nvcf/functions", FUNCTION).json()["function"])


def _make_active(server: _Server, function_id: str, version_id: str) -> None:
    path = f"functions/{function_id}/versions/{version_id}"
    status = _status(server, path)
    if status == "ERROR":
        server.delete(f"/v2/nvcf/deployments/{path}")
        status = "INACTIVE"
    give_up_at = time.monotonic() + ACTIVE_WITHIN_S
    if status == "INACTIVE":
        _deploy(server, path, give_up_at)
    while (status := _status(server, path)) not in ("ACTIVE", "DEGRADING"):
        if status == "ERROR":
            raise Failed(f"the sample function could not be started: {_why(server, path)}")
        if time.monotonic() > give_up_at:
            raise Failed(
                f"the sample function is still {status} after {ACTIVE_WITHIN_S:g} s; is a controller running? "
                f"{_why(server, path)}"
            )
        time.sleep(_LOOK_S)


def _deploy(server: _Server, path: str, give_up_at: float) -> None:
    """A controller that was started just now has not said yet what it has to offer."""
    while True:
        try:
            server.post(f"/v2/nvcf/deployments/{path}", DEPLOYMENT)
        except NotYet:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(_LOOK_S)
        else:
            return


def _status(server: _Server, path: str) -> str:
    return str(server.get(f"/v2/nvcf/{path}").json()["function"]["status"])


def _why(server: _Server, path: str) -> str:
    deployment = server.get(f"/v2/nvcf/deployments/{path}").json()["deployment"]
    return "; ".join(str(info.get("error", "")) for info in deployment.get("healthInfo", []))


def _invoke(server: _Server, function_id: str) -> Answer:
    hold = {"NVCF-POLL-SECONDS": str(_POLL_S)}
    answer = server.post(f"/v2/nvcf/pexec/functions/{function_id}", INPUT, hold)
    give_up_at = time.monotonic() + RESULT_WITHIN_S
    while answer.status == 202:
        request_id = {name.lower(): value for name, value in answer.headers.items()}["nvcf-reqid"]
        if time.monotonic() > give_up_at:
            raise Failed(f"request {request_id} was not answered within {RESULT_WITHIN_S:g} s")
        answer = server.get(f"/v2/nvcf/pexec/status/{request_id}", hold)
    answer.json()
    return answer
