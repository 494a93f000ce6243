"""The users of RabbitMQ and Redis, one for each kind of process, as files that either server loads.

`python -m infra.access` writes `infra/rabbitmq/users.json` and `infra/redis/users.acl` from the one description in
`broker/backends/*/access.py`; a test compares them. Passwords stand there as `API_PASSWORD` and the like, for whoever
starts a server to fill in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.backends.rabbitmq.access import PERMISSIONS, TAGS
from broker.backends.redis.access import RULES

INFRA = Path(__file__).resolve().parent
ROLES = tuple(RULES)
_VHOST = "/"
_OPEN = "user default on nopass ~* &* +@all"
# Nobody can be it. But by its rights Redis 7 reads back what its append-only file holds of scripts and transactions:
# all of that is gone after a restart if it has none (docs/decisions/0055, redis/redis#14541).
_SHUT = "user default off ~* &* +@all"


def user_of(role: str) -> str:
    return f"fnqueue-{role}"


def for_rabbitmq(passwords: Mapping[str, str]) -> dict[str, Any]:
    """Definitions with these passwords by role. A node that loads them makes no `guest`."""
    hashed = {"hashing_algorithm": "rabbit_password_hashing_sha256"}
    return _definitions({role: {"password_hash": _salted(passwords[role]), **hashed} for role in ROLES})


def for_redis(passwords: Mapping[str, str], *, open_to_all: bool = False) -> str:
    """The text of an ACL file. `open_to_all`: with the user `default` as a Redis that has no users has it."""
    hashes = {role: f"#{hashlib.sha256(passwords[role].encode()).hexdigest()}" for role in ROLES}
    return _acl(hashes, default=_OPEN if open_to_all else _SHUT)


def rabbitmq_template() -> str:
    return json.dumps(_definitions({role: {"password": _placeholder(role)} for role in ROLES}), indent=2) + "\n"


def redis_template() -> str:
    return _acl({role: f">{_placeholder(role)}" for role in ROLES}, default=_SHUT)


def _definitions(passwords: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    return {
        "users": [{"name": user_of(role), **passwords[role], "tags": TAGS[role]} for role in ROLES],
        "permissions": [{"user": user_of(role), "vhost": _VHOST, **PERMISSIONS[role]._asdict()} for role in ROLES],
    }


def _acl(passwords: Mapping[str, str], *, default: str) -> str:
    lines = [f"user {user_of(role)} on {passwords[role]} {RULES[role]}" for role in ROLES]
    return "\n".join([default, *lines]) + "\n"


def _placeholder(role: str) -> str:
    return f"{role.upper()}_PASSWORD"


def _salted(password: str) -> str:
    """As RabbitMQ keeps it: base64(salt + sha256(salt + password)), with a salt of four bytes."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


FILES = {"rabbitmq/users.json": rabbitmq_template, "redis/users.acl": redis_template}


def main() -> None:
    for path, content in FILES.items():
        (INFRA / path).write_text(content())


if __name__ == "__main__":
    main()
