"""Room for the connections of every slot."""

from __future__ import annotations

import sys

from broker.errors import ConfigurationError

if sys.platform != "win32":
    import resource

SPARE = 256  # the broker's and the store's connections, logs, uploads, and what the libraries keep open


def allow_open_files(slots: int) -> None:
    """Raise this process's own limit to what `slots` jobs at once take, as far as the system lets it.

    Raises:
        ConfigurationError: the system lets it not.
    """
    if sys.platform == "win32":
        return
    needed = slots + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigurationError(
            f"max_request_concurrency: {slots} jobs at once take {needed} open files, and this process may have "
            f"{hard}; raise the limit (ulimit -Hn, LimitNOFILE, --ulimit nofile) or run fewer at once"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
