"""What each kind of process may do in RabbitMQ, as the permissions of its user. `infra/rabbitmq/users.json` is made of
them.

Publishing to a queue by its name goes through the default exchange, which is one for all queues. A sidecar publishes
to the exchange of its version instead, which leads to its queue and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from broker.backends.rabbitmq.messages import exchange_name, queue_name


class Permissions(NamedTuple):
    """Regular expressions for names of queues and exchanges. To bind takes `write` of the queue and `read` of the
    exchange."""

    configure: str
    write: str
    read: str


_NOTHING = "^$"
_QUEUES, _EXCHANGES = "fnq\\.v\\..+", "fnq\\.x\\..+"

PERMISSIONS: Mapping[str, Permissions] = {
    "operator": Permissions(".*", ".*", ".*"),
    # Deploying makes the version's queue and exchange. It may consume nothing, dead letters neither.
    "api": Permissions(f"^({_QUEUES}|{_EXCHANGES})$", f"^(amq\\.default|{_QUEUES})$", f"^{_EXCHANGES}$"),
    "controller": Permissions(
        f"^(fnq\\.dead|{_QUEUES}|{_EXCHANGES})$",
        f"^(fnq\\.dead|{_QUEUES})$",
        f"^(fnq\\.dead|{_QUEUES}|{_EXCHANGES})$",
    ),
    # Of every version, for where versions have no users of their own.
    "sidecar": Permissions(_NOTHING, f"^{_EXCHANGES}$", f"^{_QUEUES}$"),
}
TAGS: Mapping[str, str] = {
    "operator": "administrator",
    "api": "",
    # By the management API it makes the users of versions, and checks a profile.
    "controller": "administrator",
    "sidecar": "",
}


def of_version(version_id: str) -> Permissions:
    """Those of the sidecars of one version."""
    exchange, queue = re.escape(exchange_name(version_id)), re.escape(queue_name(version_id))
    return Permissions(_NOTHING, f"^{exchange}$", f"^{queue}$")
