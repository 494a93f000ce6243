"""What is measured: the function alone, and fnqueue in front of the same function, in two shapes."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import cpu
from benchmarks.load import LOOPBACK
from infra.local import supervisor
from infra.local.process import Server, bare_environment, free_port
from infra.local.servers import S3, RabbitMQ, Redis
from infra.local.stack import fnqueue, healthy

REPOSITORY = Path(__file__).resolve().parents[1]
ECHO = REPOSITORY / "examples" / "echo" / "server.py"
FUNCTION = {
    "name": "benchmark",
    "inferenceUrl": "/echo",
    "containerImage": "fnqueue/echo:latest",
    "health": {"protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200},
}
HTTP_S = 30.0
ACTIVE_S = 60.0
POLL_S = 0.1
DRAIN_S = "5"  # there is nothing to drain when it stops


class SetUpFailed(Exception):
    """Something did not get as far as being measured; the message says what and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that listens on `port` of the loopback. `trees` finds its processes, by label; `environment` is that of
    its front end, secrets included."""

    name: str
    port: int
    path: str
    trees: Callable[[], cpu.Trees]
    headers: tuple[tuple[str, str], ...] = ()
    status_path: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


class Program(Server):
    """A process that is told everything by its arguments and its environment, and nothing by ours."""

    def __init__(
        self, name: str, folder: Path, *, command: Sequence[str], environment: Mapping[str, str], port: int = 0
    ) -> None:
        self.name = name
        super().__init__(folder / name)
        self._command = command
        # What is measured is this checkout, whichever one is installed.
        self._environment = {**bare_environment(), "PYTHONPATH": str(REPOSITORY), **environment}
        self._url = f"http://{LOOPBACK}:{port}" if port else ""

    @property
    def url(self) -> str:
        return self._url

    def command(self) -> Sequence[str]:
        return self._command

    def environment(self) -> Mapping[str, str]:
        return self._environment

    def working_folder(self) -> Path:
        return REPOSITORY

    def answers(self) -> bool:
        return healthy(self._url) if self._url else self.alive()


@contextlib.contextmanager
def floor(folder: Path) -> Iterator[Target]:
    """The function, with nothing in front of it."""
    port = free_port()
    command = [sys.executable, str(ECHO), "--port", str(port)]
    with running(Program("floor", folder, command=command, environment={}, port=port)) as echo:
        yield Target(name="floor", port=port, path="/echo", trees=lambda: {"container": cpu.tree(echo.pid)})


@contextlib.contextmanager
def embedded(folder: Path, *, slots: int) -> Iterator[Target]:
    """`fnqueue dev`: everything but the function's process in one, with the back ends in memory."""
    port, key = free_port(), secrets.token_hex(32)
    # All but the key, which anybody could read in the list of processes.
    command = [*fnqueue("dev"), "--port", str(port), "--data-dir", str(folder / "data")]
    dev = Program("dev", folder, command=command, environment={"FNQUEUE_KEY": key}, port=port)
    with running(dev):
        yield _deployed("embedded", port, key, FUNCTION, slots=slots, trees=lambda: _by_role({"dev": dev}), settings={})


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Mapping[str, Server]]:
    """RabbitMQ, Redis and S3, by the setting that names each."""
    with contextlib.ExitStack() as opened:
        servers: dict[str, Server] = {
            "FNQUEUE_QUEUE_URL": RabbitMQ(folder / "rabbitmq"),
            "FNQUEUE_STORE_URL": Redis(folder / "redis"),
            "FNQUEUE_BLOBS_URL": S3(folder / "s3"),
        }
        for server in servers.values():
            opened.enter_context(running(server))
        yield servers


@contextlib.contextmanager
def pipe(folder: Path, kind: str, servers: Mapping[str, Server], *, slots: int) -> Iterator[Target]:
    """A pipe of `benchmarks.pipes` before a function of its own."""
    name, port, function_port = f"{kind} pipe", free_port(), free_port()
    queue, store = servers["FNQUEUE_QUEUE_URL"], servers["FNQUEUE_STORE_URL"]
    told = {
        "PIPE_QUEUE_URL": queue.url,
        "PIPE_STORE_URL": store.url,
        "PIPE_QUEUE": f"benchmark.{kind}",
        "PIPE_SLOTS": str(slots),
    }

    def program(role: str, port: int = 0, **more: str) -> Program:
        command = [sys.executable, "-m", "benchmarks.pipes", role, kind]
        return Program(f"{kind}-{role}", folder, command=command, environment=told | more, port=port)

    echo = [sys.executable, str(ECHO), "--port", str(function_port)]
    function = Program(f"{kind}-function", folder, command=echo, environment={}, port=function_port)
    front = program("front", port, PIPE_PORT=str(port))
    worker = program("worker", PIPE_FUNCTION=f"http://{LOOPBACK}:{function_port}/echo")
    with contextlib.ExitStack() as opened:
        for one in (function, front, worker):
            opened.enter_context(running(one))
        roles = {"container": function, "api": front, "sidecar": worker, queue.name: queue, store.name: store}
        yield Target(
            name=name,
            port=port,
            path="/invoke",
            trees=lambda: {role: cpu.tree(process.pid) for role, process in roles.items()},
        )


@contextlib.contextmanager
def production(
    folder: Path,
    *,
    slots: int,
    function: Mapping[str, Any] = FUNCTION,
    images: Path | None = None,
    settings: Mapping[str, str] | None = None,
    servers: Mapping[str, Server] | None = None,
) -> Iterator[Target]:
    """An api and a controller, which starts the function and its sidecar, on `servers` or on some of their own.
    `images` names commands for images that are no samples, `settings` is environment of both."""
    port, key = free_port(), secrets.token_hex(32)
    with contextlib.ExitStack() as opened:
        servers = opened.enter_context(started(folder)) if servers is None else servers
        shared = {
            **{name: server.url for name, server in servers.items()},
            "FNQUEUE_LAUNCHER_URL": "process://",
            "FNQUEUE_DATA_DIR": str(folder / "data"),
            "FNQUEUE_SECRET_KEY": secrets.token_hex(32),
            "FNQUEUE_DRAIN_S": DRAIN_S,
            **({"FNQUEUE_IMAGES_FILE": str(images)} if images else {}),
            **(settings or {}),
        }
        front = {"FNQUEUE_HOST": LOOPBACK, "FNQUEUE_PORT": str(port), "FNQUEUE_ADMIN_KEY": key}
        programs = [
            Program("api", folder, command=fnqueue("api"), environment=shared | front, port=port),
            Program("controller", folder, command=fnqueue("controller"), environment=shared),
        ]
        for program in programs:
            opened.enter_context(running(program))
        roles: dict[str, Server] = {server.name: server for server in (*programs, *servers.values())}
        told = {
            **{name: f"{server.url.partition(':')[0]}://" for name, server in servers.items()},
            "FNQUEUE_DRAIN_S": DRAIN_S,
            **(settings or {}),
        }
        target = _deployed("fnqueue", port, key, function, slots=slots, trees=lambda: _by_role(roles), settings=told)
        yield replace(target, environment=shared | front)


@contextlib.contextmanager
def processes(folder: Path, target: Target, count: int) -> Iterator[Target]:
    """The same fnqueue behind one more `fnqueue api` with so many processes. What the others do when idle is in the
    figures of both."""
    port = free_port()
    command = [*fnqueue("api"), "--processes", str(count)]
    environment = {**target.environment, "FNQUEUE_PORT": str(port)}
    with running(Program(f"api-{count}", folder, command=command, environment=environment, port=port)) as front:
        yield replace(
            target,
            name=f"{count} processes",
            port=port,
            trees=lambda: {**target.trees(), "api": cpu.tree(front.pid)},
        )


def another(target: Target, name: str, *, slots: int) -> Target:
    """One more function of the same kind on the same fnqueue, ready to be invoked."""
    key = dict(target.headers)["Authorization"].removeprefix("Bearer ")
    definition = {**FUNCTION, "name": name}
    return _deployed(name, target.port, key, definition, slots=slots, trees=target.trees, settings=target.settings)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Started, and at the end stopped with all that it started, in other sessions too."""
    try:
        server.start()
        yield server
    finally:
        started = cpu.tree(server.leader)[1:] if server.leader else []
        server.stop()
        supervisor.end([process for process in started if process.is_running()])


def _by_role(servers: Mapping[str, Server]) -> dict[str, list[psutil.Process]]:
    """The trees of `servers` by name, with the sidecars and the functions below them apart."""
    roles: dict[str, list[psutil.Process]] = {}
    for name, server in servers.items():
        for process in cpu.tree(server.pid):
            roles.setdefault(_role(process, name), []).append(process)
    return roles


def _role(process: psutil.Process, otherwise: str) -> str:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        if command[-1:] == ["sidecar"]:
            return "sidecar"
        if str(ECHO) in command or any(part.endswith(ECHO.name) and "echo" in part for part in command):
            return "container"
    return otherwise


def _deployed(
    name: str,
    port: int,
    key: str,
    definition: Mapping[str, Any],
    *,
    slots: int,
    trees: Callable[[], cpu.Trees],
    settings: Mapping[str, str],
) -> Target:
    """The function, created and deployed through the API as any user would, once it is ACTIVE."""
    api = _Api(port, key)
    function = api.call("POST", "/v2/nvcf/functions", definition)["function"]
    function_id, version = function["id"], f"functions/{function['id']}/versions/{function['versionId']}"
    specification = {
        "gpu": "CPU",
        "instanceType": "CPU",
        "minInstances": 1,
        "maxInstances": 1,
        "maxRequestConcurrency": slots,
    }
    deployment = {"deploymentSpecifications": [specification]}
    # Refused until the controller has told what it has to offer.
    _insist(lambda: api.call("POST", f"/v2/nvcf/deployments/{version}", deployment))
    _insist(lambda: _check_active(api.call("GET", f"/v2/nvcf/{version}")["function"]["status"]))
    return Target(
        name=name,
        port=port,
        path=f"/v2/nvcf/pexec/functions/{function_id}",
        status_path="/v2/nvcf/pexec/status/",
        headers=(("Authorization", f"Bearer {key}"),),
        trees=trees,
        settings={**settings, "maxRequestConcurrency": str(slots)},
    )


def _check_active(status: str) -> None:
    if status != "ACTIVE":
        raise SetUpFailed(f"the function is {status}, not ACTIVE")


def _insist(step: Callable[[], object]) -> None:
    """Repeat `step` until it does not raise SetUpFailed, for `ACTIVE_S` at most."""
    give_up_at = time.monotonic() + ACTIVE_S
    while True:
        try:
            step()
            return
        except SetUpFailed:
            if time.monotonic() > give_up_at:
                raise
        time.sleep(POLL_S)


class _Api:
    """What setting up takes of the API, by the standard library alone."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer's JSON object. Raises SetUpFailed."""
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=HTTP_S)
        try:
            connection.request(method, path, json.dumps(body) if body else None, self._headers)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status >= 300:
                raise SetUpFailed(f"{method} {path} was answered {answer.status}: {content[:500]!r}")
            parsed = json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise SetUpFailed(f"{method} {path} failed: {exc}") from exc
        finally:
            connection.close()
        if not isinstance(parsed, dict):
            raise SetUpFailed(f"{method} {path} answered no JSON object: {content[:500]!r}")
        return parsed
