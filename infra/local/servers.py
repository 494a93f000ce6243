"""RabbitMQ, Redis and an S3 server on private loopback ports: one code for `make stack`, tests and CI.

`python -m infra.local.servers ensure` installs what is missing; `ensure-all`, what the tests need beside the servers.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra import access
from infra.local import binaries
from infra.local.process import LOOPBACK, PROBE_S, Server, ServerFailed, bare_environment, free_port, kept_secret

INFRA = Path(__file__).resolve().parent.parent
CTL_S = 60.0
LOOPBACK_ONLY = "-kernel inet_dist_use_interface {127,0,0,1}"
AMQP_HEADER = b"AMQP\x00\x00\x09\x01"
# A method frame on channel 0; four bytes of size; then Connection.Start (AMQP 0-9-1, 2.3.5 and 4.2.2).
CONNECTION_START = (b"\x01\x00\x00", b"\x00\x0a\x00\x0a")


class RabbitMQ(Server):
    """One node, set up as in production: `infra/rabbitmq/rabbitmq.conf` and `definitions.json`."""

    name = "rabbitmq"
    program = "rabbitmq-server"
    # Its data lives in a folder named after the node, so the name outlives the ports. Own epmd: no clash.
    node = "fnqueue@localhost"

    def __init__(self, folder: Path, *, management: bool = False) -> None:
        """`management`: with its HTTP API, which costs seconds at the start and memory."""
        super().__init__(folder)
        self.port = free_port()
        self._management_port = free_port() if management else 0
        self._distribution_port = free_port()
        self._epmd_port = free_port()
        self._passwords = _passwords(self.folder)

    @property
    def url(self) -> str:
        """The operator's, who may do everything."""
        return self.url_for("operator")

    @property
    def management_url(self) -> str:
        return self.management_url_for("operator")

    def url_for(self, role: str) -> str:
        """`role` is one of `infra.access`."""
        return f"amqp://{access.user_of(role)}:{self._passwords[role]}@{LOOPBACK}:{self.port}/"

    @property
    def has_management(self) -> bool:
        return self._management_port > 0

    def management_url_for(self, role: str) -> str:
        return f"http://{access.user_of(role)}:{self._passwords[role]}@{LOOPBACK}:{self._management_port}"

    def command(self) -> Sequence[str]:
        # RabbitMQ would start epmd as a daemon that outlives it: ours is started first, in its process group.
        script = 'epmd -port "$ERL_EPMD_PORT" -address "$ERL_EPMD_ADDRESS" & exec "$0"'
        return ["sh", "-c", script, str(binaries.rabbitmq_script(self.program))]

    def environment(self) -> Mapping[str, str]:
        return {
            **bare_environment(),
            "HOME": str(self.folder),  # the Erlang cookie
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "no-such-file"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": LOOPBACK_ONLY,
            "RABBITMQ_CTL_ERL_ARGS": LOOPBACK_ONLY,
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node instead of staying as its parent
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
        }

    def spawn(self) -> None:
        self._configure()
        super().spawn()

    def answers(self) -> bool:
        """The node listens only once it has booted; then it opens an AMQP conversation."""
        try:
            with socket.create_connection((LOOPBACK, self.port), PROBE_S) as connection:
                connection.settimeout(PROBE_S)
                connection.sendall(AMQP_HEADER)
                head = connection.recv(11)
        except OSError:
            return False
        return (head[:3], head[7:]) == CONNECTION_START

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` prints. Raises ServerFailed when it fails."""
        done = subprocess.run(
            [str(binaries.rabbitmq_script("rabbitmqctl")), "--quiet", *arguments],
            env=dict(self.environment()),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CTL_S,
            check=False,
        )
        if done.returncode != 0:
            raise ServerFailed(f"rabbitmqctl {arguments[0]} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def flush(self) -> None:
        """Return once every queue declared so far would survive `kill`.

        A quorum queue's name reaches the disk about half a second after its declaration. A node killed before
        that comes back with a queue that has lost its messages, confirmed ones too, and never elects a leader
        (seen with RabbitMQ 3.10.8).
        """
        self.ctl("eval", "[ok = dets:sync(Table) || Table <- dets:all()].")

    def _configure(self) -> None:
        definitions = self.folder / "definitions.json"
        plugins = "rabbitmq_management" if self._management_port else ""
        self.folder.joinpath("enabled_plugins").write_text(f"[{plugins}].\n")
        self.folder.joinpath("rabbitmq.conf").write_text(
            (INFRA / "rabbitmq" / "rabbitmq.conf").read_text()
            + f"listeners.tcp.1 = {LOOPBACK}:{self.port}\nload_definitions = {definitions}\n"
            + (f"management.tcp.ip = {LOOPBACK}\nmanagement.tcp.port = {self._management_port}\n" if plugins else "")
        )
        definitions.write_text(json.dumps(self._definitions()))

    def _definitions(self) -> dict[str, object]:
        """Ours and the users: a node that loads definitions makes no user of its own."""
        return {
            **json.loads((INFRA / "rabbitmq" / "definitions.json").read_text()),
            **access.for_rabbitmq(self._passwords),
        }


class Redis(Server):
    """One server that has every write on disk before it answers: `infra/redis/redis.conf`."""

    name = "redis"
    program = "redis-server"
    start_s = 30.0

    def __init__(self, folder: Path, *, guarded: bool = False) -> None:
        """`guarded`: nobody comes in without a password. Otherwise there is also a user for all, who may do
        everything."""
        super().__init__(folder)
        self.port = free_port()
        self._guarded = guarded
        self._passwords = _passwords(self.folder)

    @property
    def url(self) -> str:
        """Of a user who may do everything."""
        return self.url_for("operator") if self._guarded else f"redis://{LOOPBACK}:{self.port}/0"

    def url_for(self, role: str, database: int = 0) -> str:
        """`role` is one of `infra.access`."""
        return f"redis://{access.user_of(role)}:{self._passwords[role]}@{LOOPBACK}:{self.port}/{database}"

    def spawn(self) -> None:
        self._acl.touch(mode=0o600)
        self._acl.write_text(access.for_redis(self._passwords, open_to_all=not self._guarded))
        super().spawn()

    def command(self) -> Sequence[str]:
        server = str(binaries.program(self.program))
        place = ["--bind", LOOPBACK, "--port", str(self.port), "--dir", str(self.folder)]
        place += ["--aclfile", str(self._acl)]
        # A title of its own would overwrite the environment that `supervisor.members` looks at.
        return [server, str(INFRA / "redis" / "redis.conf"), *place, "--set-proc-title", "no"]

    def environment(self) -> Mapping[str, str]:
        return bare_environment()

    def answers(self) -> bool:
        """`PING` is refused while the append-only file is being read."""
        try:
            with socket.create_connection((LOOPBACK, self.port), PROBE_S) as connection:
                connection.settimeout(PROBE_S)
                login = f"AUTH {access.user_of('operator')} {self._passwords['operator']}"
                connection.sendall(f"{login}\r\nPING\r\n".encode())
                with connection.makefile("rb") as answers:
                    return [answers.readline(), answers.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:
            return False

    @property
    def _acl(self) -> Path:
        return self.folder / "users.acl"


class S3(Server):
    """An S3 server (rclone) on a folder; it checks signatures and their expiry.

    Of an object's metadata it keeps only the time of change over a restart: the content type is lost.
    """

    name = "s3"
    program = "rclone"
    start_s = 30.0
    region = "us-east-1"
    access_key = "fnqueue-local-access"  # rclone refuses short ones

    def __init__(self, folder: Path, *, buckets: Sequence[str] = ("fnqueue",)) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.bucket = buckets[0]
        self.secret_key = kept_secret(self.folder / "secret")
        self._buckets = self.folder / "buckets"
        for bucket in buckets:
            (self._buckets / bucket).mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        return f"s3://{self.access_key}:{self.secret_key}@{LOOPBACK}:{self.port}/{self.bucket}?tls=false"

    def command(self) -> Sequence[str]:
        return [
            str(binaries.program(self.program)),
            "serve",
            "s3",
            "--addr",
            f"{LOOPBACK}:{self.port}",
            str(self._buckets),
        ]

    def environment(self) -> Mapping[str, str]:
        return {
            **bare_environment(),
            "HOME": str(self.folder),
            "RCLONE_CONFIG": "",  # none, rather than the user's
            "RCLONE_CACHE_DIR": str(self.folder / "cache"),
            "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"',  # one CSV field
        }

    def answers(self) -> bool:
        """Any HTTP answer will do: to an unsigned question it is a refusal."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=PROBE_S)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _passwords(folder: Path) -> dict[str, str]:
    return {role: kept_secret(folder / f"{role}.password") for role in access.ROLES}


def main(arguments: Sequence[str]) -> int:
    wanted = {"ensure": binaries.PROGRAMS, "ensure-all": binaries.FOR_TESTS}.get(" ".join(arguments))
    if wanted is None:
        print("usage: python -m infra.local.servers ensure | ensure-all", file=sys.stderr)
        return 2
    try:
        binaries.ensure(wanted)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
