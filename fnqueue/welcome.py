"""A first visit to a server: find or make the sample function, deploy it, invoke it once, and say how to go on."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from typing import Any

from fnqueue.calls import Answer, Failed, NotYet, Server

NAME = "echo"
IMAGE = "fnqueue/echo:latest"
DASHBOARD = "/dashboard"
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
_LOOK_S = 0.1
_POLL_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What was found, and the proof that it works. `dashboard` is its URL, "" where there is none."""

    url: str
    dashboard: str
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
            "dashboard": self.dashboard,
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
            + (f"  Dashboard  {self.dashboard}\n" if self.dashboard else "")
            + f"  API key    {self.key}\n"
            f"  Function   {NAME}, {self.function_id}\n"
            f"\n  Invoke it:\n\n    {self.curl}\n"
            f"\n  As just done, with HTTP {self.answer.status}:\n\n{told}\n\n    {self.answer.body.decode()}\n"
        )


def welcome(url: str, key: str) -> Welcome:
    """Blocks, for `ACTIVE_WITHIN_S` and `RESULT_WITHIN_S` at most. Raises Failed."""
    server = Server(url, key)
    function = _sample(server)
    function_id, version_id = str(function["id"]), str(function["versionId"])
    _make_active(server, function_id, version_id)
    answer = _invoke(server, function_id)
    dashboard = _dashboard(server, url)
    return Welcome(url=url, dashboard=dashboard, key=key, function_id=function_id, version_id=version_id, answer=answer)


def _sample(server: Server) -> dict[str, Any]:
    """A deployed one if there is, else any, else a new one."""
    listed = server.get("/v2/nvcf/functions?visibility=private").json().get("functions", [])
    found = [one for one in listed if one.get("name") == NAME and one.get("containerImage") == IMAGE]
    for status in ("ACTIVE", "DEGRADING", "DEPLOYING", "DEGRADED", "INACTIVE", "ERROR"):
        for function in found:
            if function.get("status") == status:
                return dict(function)
    return dict(server.post("/v2/nvcf/functions", FUNCTION).json()["function"])


def _make_active(server: Server, function_id: str, version_id: str) -> None:
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


def _deploy(server: Server, path: str, give_up_at: float) -> None:
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


def _status(server: Server, path: str) -> str:
    return str(server.get(f"/v2/nvcf/{path}").json()["function"]["status"])


def _why(server: Server, path: str) -> str:
    deployment = server.get(f"/v2/nvcf/deployments/{path}").json()["deployment"]
    return "; ".join(str(info.get("error", "")) for info in deployment.get("healthInfo", []))


def _dashboard(server: Server, url: str) -> str:
    try:
        server.get(DASHBOARD)
    except Failed:  # it is switched off
        return ""
    return url + DASHBOARD


def _invoke(server: Server, function_id: str) -> Answer:
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
