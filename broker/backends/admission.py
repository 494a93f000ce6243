"""What is said when a limit of `Results.create` is met."""

from __future__ import annotations

from broker.errors import AccountFull, QueueFull, TryLater
from broker.settings import Settings


def limit_met(of: str, what: str, settings: Settings, queue_limit: int) -> TryLater:
    """`of` is `version` or `account`; `what` is `queued`, `requests` or `bytes`."""
    name = "queue_limit" if what == "queued" else f"{of}_{what}"
    most = queue_limit if what == "queued" else int(getattr(settings, name))
    subject = "function version" if of == "version" else "account"
    told = {
        "queued": f"{most} requests already wait for this {subject}",
        "requests": f"{most} requests of this {subject} are queued or running",
        "bytes": f"the bodies of this {subject}'s queued and running requests may take {most} bytes together",
    }[what]
    kind = QueueFull if of == "version" else AccountFull
    return kind(f"{told}; send the request again after Retry-After seconds", limit=name)
