"""The production shape on one machine: `python -m infra.local.stack up | down | status | doctor`.

RabbitMQ, Redis and S3, then `fnqueue api` and `fnqueue controller`, under a supervisor that restarts what
dies. Everything is kept in `.fnqueue/stack` (`FNQUEUE_STACK_DIR`). A server that `FNQUEUE_QUEUE_URL`,
`FNQUEUE_STORE_URL` or `FNQUEUE_BLOBS_URL` names is used and not started; a URL for the controller alone, with another
user, is `FNQUEUE_CONTROLLER_QUEUE_URL` and so on. The servers that are started have a user for each kind of process.

With `ENGINE=podman`, functions run as containers of a podman of the stack's own, with images made of what runs here.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from infra.local import binaries, images
from infra.local.compose import Compose
from infra.local.daemon import Daemon, wait_until
from infra.local.images import SIDECAR_IMPORTS
from infra.local.podman import RUNTIME, ULIMITS, Podman
from infra.local.process import Server, ServerFailed, kept_secret
from infra.local.servers import S3, RabbitMQ, Redis

UP_S = 60.0
WELCOME_S = 180.0
HEALTH_S = 2.0
SERVERS: Mapping[str, type[RabbitMQ | Redis | S3]] = {
    "FNQUEUE_QUEUE_URL": RabbitMQ,
    "FNQUEUE_STORE_URL": Redis,
    "FNQUEUE_BLOBS_URL": S3,
}

SIDECAR_IMAGE = "fnqueue/fnqueue:local"
# By the names that `process://` knows them by: the same function runs either way.
SAMPLES = {
    "docker.io/fnqueue/echo:latest": ("examples/echo", "import aiohttp.web"),
    "docker.io/fnqueue/ocr:latest": (
        "examples/ocr",
        "import aiohttp.web, onnxruntime, PIL.Image, PIL.ImageDraw, rapidocr; rapidocr.RapidOCR()",
    ),
}
LISTENS = {"HOST": "0.0.0.0", "PORT": "8000", "PYTHONUNBUFFERED": "1"}


class Program(Server):
    """One of our own commands, told everything through its environment."""

    stop_s = 30.0

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        url: str = "",
    ) -> None:
        self.name = name
        super().__init__(folder)
        self._command = command
        self._environment = {**os.environ, **environment}
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    def command(self) -> Sequence[str]:
        return self._command

    def environment(self) -> Mapping[str, str]:
        return self._environment

    def working_folder(self) -> Path:
        """Ours: relative paths in the user's settings mean the same here as in the user's shell."""
        return Path.cwd()

    def answers(self) -> bool:
        """200 from `/health`; a program that serves nothing answers by being alive."""
        return healthy(self._url) if self._url else self.alive()


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the api listens."""

    host: str
    port: int

    @classmethod
    def from_environment(cls) -> Address:
        port = os.environ.get("FNQUEUE_PORT", "8080")
        if not port.isdecimal() or not 0 < int(port) < 65_536:
            raise ServerFailed(f"FNQUEUE_PORT is {port!r}; give a port from 1 to 65535")
        return cls(host=os.environ.get("FNQUEUE_HOST", "127.0.0.1"), port=int(port))

    @property
    def url(self) -> str:
        """How this machine reaches it."""
        host = "127.0.0.1" if self.host in ("", "0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def refuse_if_taken(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                raise ServerFailed(
                    f"cannot listen on {self.host}:{self.port} ({error.strerror}); "
                    "stop what uses it, or choose another: FNQUEUE_PORT=8081 make stack"
                ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The servers that are ours to start; None where the user named one."""

    rabbitmq: RabbitMQ | None
    redis: Redis | None
    s3: S3 | None

    @classmethod
    def started(cls, folder: Path) -> Own:
        unnamed = unnamed_servers()
        return cls(
            rabbitmq=RabbitMQ(folder / RabbitMQ.name, management=True) if "FNQUEUE_QUEUE_URL" in unnamed else None,
            redis=Redis(folder / Redis.name, guarded=True) if "FNQUEUE_STORE_URL" in unnamed else None,
            s3=S3(folder / S3.name) if "FNQUEUE_BLOBS_URL" in unnamed else None,
        )

    @property
    def servers(self) -> list[Server]:
        """In the order they are started."""
        return [server for server in (self.rabbitmq, self.redis, self.s3) if server is not None]

    @property
    def complete(self) -> bool:
        return len(self.servers) == len(SERVERS)

    def told(self, role: str) -> dict[str, str]:
        """Settings of `api` or `controller`: how it reaches these servers, and of a controller, how its sidecars do."""
        settings = {}
        if self.rabbitmq is not None:
            settings["FNQUEUE_QUEUE_URL"] = self.rabbitmq.url_for(role)
            if role == "controller":
                settings["FNQUEUE_QUEUE_MANAGEMENT_URL"] = self.rabbitmq.management_url_for(role)
                settings["FNQUEUE_VERSION_USERS"] = "true"
        if self.redis is not None:
            settings["FNQUEUE_STORE_URL"] = self.redis.url_for(role)
            if role == "controller":
                settings["FNQUEUE_SIDECAR_STORE_URL"] = self.redis.url_for("sidecar")
            else:  # it may not look; the controller does
                settings["FNQUEUE_PROFILE_ASSERTED"] = "true"
        if self.s3 is not None:
            settings["FNQUEUE_BLOBS_URL"] = self.s3.url
        return settings


class Stack(Daemon):
    """The daemon of the stack's folder, which also keeps its secrets and the address of the api."""

    @property
    def admin_key(self) -> str:
        return kept_secret(self.folder / "admin.key")

    @property
    def url(self) -> str:
        """Where the running stack's api is."""
        return (self.folder / "url").read_text()

    @property
    def podman(self) -> Podman:
        return Podman(self.folder / "podman")

    @property
    def has_podman(self) -> bool:
        """Whether there may be containers of a podman of this stack's."""
        return (self.folder / "podman").exists()

    def children(self, address: Address) -> list[Server]:
        """In the order they are started."""
        (self.folder / "url").write_text(address.url)
        own = Own.started(self.folder)
        engine = [self.podman] if wants_podman() else []
        shared = {
            "FNQUEUE_LAUNCHER_URL": os.environ.get("FNQUEUE_LAUNCHER_URL", "process://"),
            **(launched_by(engine[0]) if engine else {}),
            # Without our servers they would be of no use.
            "FNQUEUE_DOCKER_KEEP_INSTANCES": os.environ.get("FNQUEUE_DOCKER_KEEP_INSTANCES", "false"),
            "FNQUEUE_DATA_DIR": os.environ.get("FNQUEUE_DATA_DIR", str(self.folder / "data")),
            "FNQUEUE_SECRET_KEY": kept_secret(self.folder / "secret.key"),
            "FNQUEUE_ENCRYPTION_KEYS": f"stack:{kept_secret(self.folder / 'encryption.key')}",
            # What infra/redis and infra/rabbitmq configure; of other servers their owner has to say it.
            "FNQUEUE_PROFILE": os.environ.get("FNQUEUE_PROFILE", "B" if own.complete else "A"),
        }
        front = {
            **own.told("api"),
            "FNQUEUE_ADMIN_KEY": self.admin_key,
            "FNQUEUE_HOST": address.host,
            "FNQUEUE_PORT": str(address.port),
        }
        return [
            *own.servers,
            *engine,
            Program(
                "api",
                self.folder / "api",
                command=fnqueue("api"),
                environment={**shared, **front},
                url=address.url,
            ),
            Program(
                "controller",
                self.folder / "controller",
                command=fnqueue("controller"),
                environment={**shared, **own.told("controller"), **named_for_controller()},
            ),
        ]


def up(stack: Stack) -> None:
    """Start it unless it runs, wait until it answers, and show how to use it."""
    running = stack.pid() is not None
    if not running:
        address = Address.from_environment()
        stack.stop()  # what a supervisor that was killed has left on our ports
        address.refuse_if_taken()
        os.environ.update(provide_servers(stack.folder))
        provide_engine(stack)
        stack.launch([sys.executable, "-m", "infra.local.stack", "supervise"])
    wait_until_ready(stack)
    print(f"The stack {'is already running' if running else 'is up'}; stop it with: make stack-down", flush=True)
    welcome(stack)


def down(stack: Stack) -> None:
    """Stop everything; the data stays. Idempotent."""
    stopped = stack.stop()
    if stack.has_podman:
        stack.podman.clear()
    Compose(stack.folder).down()
    print("The stack is down." if stopped else "The stack was not running.")


def status(stack: Stack) -> None:
    report = stack.report()
    if report is None:
        print("The stack is not running.")
        return
    healthy_now = report["ready"] and healthy(stack.url)
    print(f"{stack.url} {'answers' if healthy_now else 'does not answer'}; supervisor {stack.pid()}")
    for child in report["children"]:
        state = f"pid {child['pid']}" if child["pid"] else "dead, to be restarted"
        print(f"  {child['name']:<11} {state}, {child['restarts']} restarts, {child['log']}")


def doctor(stack: Stack) -> int:
    """`fnqueue doctor` as the running stack's controller would call it: ports and passwords are that one's. Returns its
    exit status."""
    report = stack.report() if stack.pid() is not None else None
    pids = [child["pid"] for child in report["children"] if child["name"] == "controller"] if report else []
    try:
        settings = psutil.Process(pids[0]).environ() if pids and pids[0] else None
    except psutil.Error:
        settings = None
    if settings is None:
        raise ServerFailed("the stack's controller is not running: make stack-status")
    return subprocess.run(fnqueue("doctor"), env=settings, stdin=subprocess.DEVNULL, check=False).returncode


def supervise(stack: Stack) -> None:
    """What `up` leaves running."""
    stack.serve(stack.children(Address.from_environment()))


def unnamed_servers() -> list[str]:
    """Settings of the servers that are ours to start."""
    return [name for name in SERVERS if not os.environ.get(name)]


def named_for_controller() -> dict[str, str]:
    """What the user gives the controller in the place of what everybody has."""
    given = ((name, os.environ.get(name.replace("_", "_CONTROLLER_", 1), "")) for name in SERVERS)
    return {name: url for name, url in given if url}


def provide_servers(folder: Path) -> Mapping[str, str]:
    """Make sure the server programs are there; where they cannot be, start containers and say where they are."""
    unnamed = unnamed_servers()
    lacking = binaries.missing(SERVERS[name].program for name in unnamed)
    if lacking and not binaries.can_install(lacking) and Compose.available():
        return Compose(folder).up([SERVERS[name].name for name in unnamed])
    binaries.ensure(lacking)
    return {}


def wants_podman() -> bool:
    """Raises ServerFailed for an engine that this cannot start."""
    engine = os.environ.get("ENGINE", "")
    if engine not in ("", "podman"):
        raise ServerFailed(
            f"ENGINE is {engine!r}; the one that can be started here is podman. An engine that runs already is named "
            "by FNQUEUE_LAUNCHER_URL, such as docker://"
        )
    return engine == "podman"


def provide_engine(stack: Stack) -> None:
    """Podman without containers of an earlier run, and with the images of the sidecar and the samples. Those of
    this checkout's code are made anew each time."""
    if stack.has_podman:
        stack.podman.clear()
    if not wants_podman():
        return
    binaries.ensure(binaries.ENGINE)
    folder = stack.folder / "images"
    print("making container images of what runs here", flush=True)
    sidecar = images.Program(reference=f"docker.io/{SIDECAR_IMAGE}", words=["-P", "-m", "fnqueue"])
    packages = ("broker", "fnqueue", "workers")
    images.build(stack.podman, folder, imports=SIDECAR_IMPORTS, packages=packages, programs=[sidecar])
    for reference, (sample, imports) in SAMPLES.items():
        words = [str(images.REPOSITORY / sample / "server.py")]
        program = images.Program(reference=reference, words=words, environment=LISTENS)
        try:
            images.build(stack.podman, folder, imports=imports, packages=(sample,), programs=[program])
        except images.NotInstalled as lacking:
            print(f"without an image of {sample}: {lacking}", flush=True)


def launched_by(podman: Podman) -> Mapping[str, str]:
    """Settings of a controller whose instances are containers of this podman."""
    return {
        "FNQUEUE_LAUNCHER_URL": podman.url,
        "FNQUEUE_DOCKER_SIDECAR_IMAGE": SIDECAR_IMAGE,
        "FNQUEUE_DOCKER_PULL": "missing",
        "FNQUEUE_DOCKER_RUNTIME": RUNTIME,
        "FNQUEUE_DOCKER_ULIMITS": ULIMITS,
    }


def wait_until_ready(stack: Stack) -> None:
    """Return when every child has answered. Raises ServerFailed, having stopped it all, when that takes too long."""

    def settled() -> bool:
        report = stack.report()
        return stack.pid() is None or bool(report and report["ready"])

    wait_until(settled, UP_S)
    report = stack.report()
    if report is None or not report["ready"]:
        blame = diagnosis(stack)
        stack.stop()
        raise ServerFailed(f"the stack was not ready within {UP_S:.0f} s and was stopped\n{blame}")


def diagnosis(stack: Stack) -> str:
    """The end of the log of the child that was being started last, or of the supervisor's own."""
    report = stack.report()
    logs = [Path(child["log"]) for child in report["children"]] if report else []
    log = logs[-1] if logs and logs[-1].exists() else stack.log
    lines = log.read_text(errors="replace").splitlines()[-20:]
    return "\n".join([f"the end of {log}:", *lines])


def welcome(stack: Stack) -> None:
    """Deploy the sample function if need be, invoke it once, and print how."""
    trouble = ServerFailed(f"the stack runs at {stack.url}, but its sample function could not be shown (see above)")
    try:
        subprocess.run(
            [*fnqueue("welcome"), "--url", stack.url],
            env={**os.environ, "FNQUEUE_API_KEY": stack.admin_key},
            stdin=subprocess.DEVNULL,
            timeout=WELCOME_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise trouble from error


def healthy(url: str) -> bool:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=HEALTH_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def fnqueue(command: str) -> list[str]:
    """`-P`: a folder named `api` beside the user is not ours."""
    return [sys.executable, "-P", "-m", "fnqueue", command]


COMMANDS: Mapping[str, Callable[[Stack], int | None]] = {
    "up": up,
    "down": down,
    "status": status,
    "doctor": doctor,
    "supervise": supervise,
}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in COMMANDS:
        print("usage: python -m infra.local.stack up | down | status | doctor", file=sys.stderr)
        return 2
    try:
        return COMMANDS[arguments[0]](Stack(Path(os.environ.get("FNQUEUE_STACK_DIR", ".fnqueue/stack")))) or 0
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was started goes on until: make stack-down", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
