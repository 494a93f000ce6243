"""What the users of RabbitMQ and Redis may do, as far as it can be told without a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.backends.rabbitmq.access import PERMISSIONS, of_version
from broker.backends.redis.access import RULES
from broker.backends.redis.scripts import SOURCES
from infra import access

BACKEND = Path(__file__).parents[2] / "broker/backends/redis"
# Of whoever is no operator. By subcommand where only some of a command are forbidden.
NEVER = {
    "acl", "bgrewriteaof", "client", "cluster", "config", "copy", "debug", "dump", "eval", "failover", "flushall",
    "flushdb", "function", "keys", "migrate", "module", "monitor", "move", "psubscribe", "pubsub", "randomkey",
    "rename", "replicaof", "restore", "save", "shutdown", "slowlog", "sort", "swapdb", "sync",
}  # fmt: skip
ROLES = ("api", "controller", "sidecar")


def granted(role: str) -> set[str]:
    return set(re.findall(r"\+([\w|]+)", RULES[role]))


@pytest.mark.parametrize("path", access.FILES)
def test_the_files_are_what_the_code_says(path: str) -> None:
    assert (access.INFRA / path).read_text() == access.FILES[path](), "run: python -m infra.access"


def test_front_ends_and_controllers_may_do_what_scripts_do() -> None:
    called = {name.lower() for source in SOURCES.values() for name in re.findall(r"redis\.call\('(\w+)'", source)}
    assert called
    for role in ("api", "controller"):
        assert called - granted(role) == set(), "add it to broker/backends/redis/access.py"


def test_nobody_may_do_what_nothing_here_does() -> None:
    sources = "".join(path.read_text() for path in BACKEND.glob("*.py") if path.name != "access.py")
    implied = {"config|get", "info", "ping", "script|load", "select", "subscribe", "time", "unsubscribe"}
    for role in ROLES:
        unused = {
            name for name in granted(role) - implied if not re.search(rf"['\"]{name}['\"]", sources, re.IGNORECASE)
        }
        assert unused == set()


@pytest.mark.parametrize("role", ROLES)
def test_nobody_but_the_operator_administers_redis(role: str) -> None:
    names = granted(role) - ({"config|get"} if role == "controller" else set())
    assert {name.partition("|")[0] for name in names} & NEVER == set()
    assert {name for name in names if name.startswith("script")} == {"script|load"}
    assert "@" not in RULES[role]


@pytest.mark.parametrize("name", ["fnq.v.b", "fnq.v.ab", "fnq.v.a.b", "fnq.x.b", "fnq.dead", "amq.default", "a", ""])
def test_the_user_of_a_version_gets_at_nothing_else(name: str) -> None:
    configure, write, read = of_version("a")
    assert re.search(read, "fnq.v.a")
    assert re.search(write, "fnq.x.a")
    assert not [pattern for pattern in (write, read) if re.search(pattern, name)]
    assert not [own for own in ("fnq.v.a", "fnq.x.a", "new") if re.search(configure, own)]


def test_a_dot_in_a_name_is_a_dot() -> None:
    assert not re.search(of_version("a").read, "fnqxvxa")
    assert not re.search(PERMISSIONS["api"].write, "amqxdefault")


def test_no_file_that_is_shipped_holds_a_password() -> None:
    passwords = {role: f"{role}-hush" for role in access.ROLES}
    assert "hush" not in access.for_redis(passwords)
    assert "hush" not in str(access.for_rabbitmq(passwords))
    for path, content in access.FILES.items():
        found = re.findall(r"(?:>|\"password\": \")(\w+)", content())
        assert sorted(found) == sorted(f"{role.upper()}_PASSWORD" for role in access.ROLES), path
