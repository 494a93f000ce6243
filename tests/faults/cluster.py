"""The servers of profile C on one machine: three RabbitMQ nodes, a Redis with two replicas behind three Sentinels, S3.

Networks are cut without privileges: nodes and peers are no longer believed who they are, and their connections ended.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis
from redis.sentinel import Sentinel as Sentinels

from infra import access
from infra.local import binaries
from infra.local.process import LOOPBACK, Server, ServerFailed, bare_environment, free_port
from infra.local.servers import INFRA, S3, RabbitMQ, Redis

PRIMARY = "main"
WHOLE_S = 300.0
ASKED_S = 5.0
# A silent node is missed after this long, in seconds; four ticks of a quarter.
NET_TICKTIME_S = 8
# What replicas and Sentinels call themselves; clients are the default user, whom nobody is without a password.
PEER = "peer"


class Epmd(Server):
    """The port mapper of all nodes. Killing a node must not take it along."""

    name = "epmd"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def command(self) -> Sequence[str]:
        return [str(binaries.program("epmd")), "-port", str(self.port), "-address", LOOPBACK]

    def environment(self) -> Mapping[str, str]:
        return bare_environment()

    def answers(self) -> bool:
        return self.alive()


class Node(RabbitMQ):
    """One of a cluster; a new one joins `first`."""

    start_s = 240.0

    def __init__(self, folder: Path, name: str, epmd: Epmd, secret: str, *, first: Node | None) -> None:
        self.node = f"{name}@localhost"
        self.name = name
        folder.mkdir(mode=0o700, parents=True)
        for file in (*(f"{role}.password" for role in access.ROLES), ".erlang.cookie"):
            (folder / file).touch(mode=0o600)
            (folder / file).write_text(secret)
        super().__init__(folder)
        self._epmd_port = epmd.port
        self._first = first

    def command(self) -> Sequence[str]:
        return [str(binaries.rabbitmq_script(self.program))]

    def environment(self) -> Mapping[str, str]:
        idle = "+sbwt none +sbwtdcpu none +sbwtdio none"  # schedulers that do not spin: the machine is shared
        own = super().environment()
        arguments = f"{own['RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS']} {idle}"
        return {**own, "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": arguments}

    def isolate(self, others: Sequence[Node]) -> None:
        """It hears none of `others` any more: it is given another cookie for them."""
        cut = "erlang:set_cookie(Node, cut), erlang:disconnect_node(Node)"
        self.ctl("eval", f"[begin {cut} end || Node <- [{_names(others)}]], ok.")

    def rejoin(self, others: Sequence[Node]) -> None:
        mend = "erlang:set_cookie(Node, erlang:get_cookie()), net_kernel:connect_node(Node)"
        self.ctl("eval", f"[begin {mend} end || Node <- [{_names(others)}]], ok.")

    def _configure(self) -> None:
        super()._configure()
        with (self.folder / "rabbitmq.conf").open("a") as conf:
            conf.write(f"net_ticktime = {NET_TICKTIME_S}\n")
            if self._first is not None:
                conf.write("cluster_formation.peer_discovery_backend = classic_config\n")
                conf.write(f"cluster_formation.classic_config.nodes.1 = {self._first.node}\n")


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(f"'{node.node}'" for node in nodes)


class Replica(Redis):
    """A Redis that Sentinels may turn into the primary, and back. A full disk is an error to it, not a signal."""

    start_s = 120.0

    def __init__(self, folder: Path, name: str, secret: str, *, of: Replica | None) -> None:
        self.name = name
        super().__init__(folder)
        self.secret = secret
        conf = (INFRA / "redis" / "redis.conf").read_text()
        conf += f"\nbind {LOOPBACK}\nport {self.port}\ndir {self.folder}\nset-proc-title no\n"
        conf += "appendfsync everysec\nmin-replicas-to-write 1\nmin-replicas-max-lag 10\n"
        conf += "repl-diskless-sync-delay 0\nrepl-timeout 20\n"
        conf += f"requirepass {secret}\n"
        conf += f"user {PEER} on >{secret} ~* &* +@all\nmasteruser {PEER}\nmasterauth {secret}\n"
        if of is not None:
            conf += f"replicaof {LOOPBACK} {of.port}\n"
        (self.folder / "redis.conf").write_text(conf)  # Sentinels have it rewritten

    def command(self) -> Sequence[str]:
        server = f"{binaries.program(self.program)} {self.folder / 'redis.conf'}"
        return ["sh", "-c", f"trap '' XFSZ; exec {server}"]

    @property
    def url(self) -> str:
        return f"redis://:{self.secret}@{LOOPBACK}:{self.port}/0"

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=ASKED_S, decode_responses=True)

    def isolate(self) -> None:
        """Neither replicas nor Sentinels reach it; its clients do."""
        with self.client() as client:
            client.acl_setuser(PEER, enabled=False)
            client.execute_command("CLIENT", "KILL", "USER", PEER)

    def rejoin(self) -> None:
        with self.client() as client:
            client.acl_setuser(PEER, enabled=True)


class Sentinel(Redis):
    start_s = 120.0

    def __init__(self, folder: Path, name: str, secret: str, primary: Replica) -> None:
        self.name = name
        super().__init__(folder)
        (self.folder / "sentinel.conf").write_text(
            f"bind {LOOPBACK}\nport {self.port}\ndir {self.folder}\nset-proc-title no\n"
            f"sentinel monitor {PRIMARY} {LOOPBACK} {primary.port} 2\n"
            f"sentinel auth-user {PRIMARY} {PEER}\nsentinel auth-pass {PRIMARY} {secret}\n"
            f"sentinel down-after-milliseconds {PRIMARY} 2000\n"
            f"sentinel failover-timeout {PRIMARY} 10000\n"
            f"sentinel parallel-syncs {PRIMARY} 2\n"
        )

    def command(self) -> Sequence[str]:
        return [str(binaries.program(self.program)), str(self.folder / "sentinel.conf"), "--sentinel"]

    def answers(self) -> bool:
        try:
            with redis.Redis(host=LOOPBACK, port=self.port, socket_timeout=ASKED_S) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class Sentries:
    """A Redis, two replicas and three Sentinels."""

    def __init__(self, folder: Path) -> None:
        secret = secrets.token_hex(16)
        main = Replica(folder / "redis-0", "redis-0", secret, of=None)
        self.stores = [main, *(Replica(folder / f"redis-{n}", f"redis-{n}", secret, of=main) for n in (1, 2))]
        self.sentinels = [Sentinel(folder / f"sentinel-{n}", f"sentinel-{n}", secret, main) for n in range(3)]

    @property
    def url(self) -> str:
        places = ",".join(f"{LOOPBACK}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://:{self.stores[0].secret}@{places}/{PRIMARY}/0"

    @property
    def servers(self) -> Sequence[Server]:
        return (*self.stores, *self.sentinels)

    def start(self) -> None:
        for server in self.servers:
            server.start()
        self.await_whole()

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    def primary(self) -> Replica:
        """Whom the Sentinels name. Raises redis.RedisError while they name none."""
        places = [(LOOPBACK, sentinel.port) for sentinel in self.sentinels]
        asked = Sentinels(places, socket_timeout=ASKED_S)  # type: ignore[no-untyped-call]  # of redis-py
        _, port = asked.discover_master(PRIMARY)  # type: ignore[no-untyped-call]  # of redis-py
        return next(store for store in self.stores if store.port == port)

    def fail_over(self) -> None:
        """As an operator orders it; return once there is another primary."""
        before = self.primary()
        with redis.Redis(host=LOOPBACK, port=self.sentinels[0].port, socket_timeout=ASKED_S) as client:
            client.execute_command("SENTINEL", "FAILOVER", PRIMARY)
        _await_nothing(lambda: "another primary" if _named(self.sentinels[0])[0] == before.port else "")

    def await_whole(self) -> None:
        """Return once the primary has both replicas and the Sentinels agree. Raises ServerFailed."""
        _await_nothing(self.lacking)

    def lacking(self) -> str:
        """What keeps them from being whole, "" if nothing does."""
        silent = [server.name for server in self.servers if not server.answers()]
        if silent:
            return f"silent: {silent}"
        try:
            told = [_named(sentinel) for sentinel in self.sentinels]
            primary = self.primary()
            with primary.client() as client:
                replication = client.info("replication")
        except redis.RedisError as exc:
            return f"no primary: {exc}"
        if {named for named, _ in told} != {primary.port} or any(others < 2 for _, others in told):
            return f"Sentinels name {told}"
        online = [replication[f"slave{n}"]["state"] == "online" for n in range(replication["connected_slaves"])]
        return "" if replication["role"] == "master" and online == [True, True] else f"replicas online: {online}"


def _named(sentinel: Sentinel) -> tuple[int, int]:
    """The port of the primary that it names, and how many other Sentinels it knows."""
    with redis.Redis(host=LOOPBACK, port=sentinel.port, socket_timeout=ASKED_S, decode_responses=True) as client:
        told = client.sentinel_master(PRIMARY)
        return int(told["port"]), int(told["num-other-sentinels"])


class Cluster:
    """All of them."""

    def __init__(self, folder: Path) -> None:
        secret = secrets.token_hex(16)
        self.epmd = Epmd(folder / "epmd")
        first = Node(folder / "rabbit-0", "rabbit-0", self.epmd, secret, first=None)
        rest = [Node(folder / f"rabbit-{n}", f"rabbit-{n}", self.epmd, secret, first=first) for n in (1, 2)]
        self.nodes = [first, *rest]
        self.redis = Sentries(folder)
        self.s3 = S3(folder / "s3")

    @property
    def settings(self) -> dict[str, str]:
        credentials = self.nodes[0].url.partition("://")[2].partition("@")[0]
        places = ",".join(f"{LOOPBACK}:{node.port}" for node in self.nodes)
        return {
            "FNQUEUE_QUEUE_URL": f"amqp://{credentials}@{places}/",
            "FNQUEUE_STORE_URL": self.redis.url,
            "FNQUEUE_BLOBS_URL": self.s3.url,
            "FNQUEUE_PROFILE": "C",
            "FNQUEUE_PROFILE_ASSERTED": "true",  # of RabbitMQ's nodes, which only its management API tells
        }

    def start(self) -> None:
        self.epmd.start()
        with ThreadPoolExecutor(2) as pool:
            for started in [pool.submit(self.redis.start), pool.submit(self._start_nodes)]:
                started.result()
        self.s3.start()
        self.await_whole()

    def _start_nodes(self) -> None:
        self.nodes[0].start()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda node: node.start(), self.nodes[1:]))

    def kill(self) -> None:
        for server in (*self.nodes, self.s3, self.epmd):
            server.kill()
        self.redis.kill()

    def await_whole(self) -> None:
        """Return once every server serves. Raises ServerFailed."""
        _await_nothing(self.lacking)

    def lacking(self) -> str:
        silent = [server.name for server in (*self.nodes, self.s3) if not server.answers()]
        return f"silent: {silent}" if silent else self.redis.lacking()


def _await_nothing(lacking: Callable[[], str]) -> None:
    until = time.monotonic() + WHOLE_S
    while missing := lacking():
        if time.monotonic() > until:
            raise ServerFailed(f"not whole within {WHOLE_S:.0f} s: {missing}")
        time.sleep(0.1)
