"""Room for connections: each takes an open file."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import resource

SPARE = 256  # servers, logs, bodies on disk, and what the libraries keep open


def allow(connections: int) -> None:
    """Raise this process's own limit to what so many take, as far as the system lets it."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allowed(connections: int) -> int:
    """How many of so many there may be: an accept that fails would be tried again and again."""
    if sys.platform == "win32":
        return connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - SPARE))
