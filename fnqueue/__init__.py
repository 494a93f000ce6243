"""fnqueue: the durable invocation queue for GPU functions.

with Client() as fnq:
    print(fnq.function("echo").run(message="hello").json())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fnqueue.blocking import Client, Function, Handle
    from fnqueue.client import AsyncClient, AsyncFunction, AsyncHandle, Download, Upload
    from fnqueue.errors import FnqueueError
    from fnqueue.events import Done, Eta, Queued, Running, StreamEvent
    from fnqueue.inputs import File
    from fnqueue.mapping import Mapped
    from fnqueue.results import Result

__all__ = [
    "AsyncClient",
    "AsyncFunction",
    "AsyncHandle",
    "Client",
    "Done",
    "Download",
    "Eta",
    "File",
    "FnqueueError",
    "Function",
    "Handle",
    "Mapped",
    "Queued",
    "Result",
    "Running",
    "StreamEvent",
    "Upload",
]

# A sidecar or a command must not pay for an HTTP client that it does not use: each is imported when it is named.
_HOMES = {
    "fnqueue.blocking": ("Client", "Function", "Handle"),
    "fnqueue.client": ("AsyncClient", "AsyncFunction", "AsyncHandle", "Download", "Upload"),
    "fnqueue.errors": ("FnqueueError",),
    "fnqueue.events": ("Done", "Eta", "Queued", "Running", "StreamEvent"),
    "fnqueue.inputs": ("File",),
    "fnqueue.mapping": ("Mapped",),
    "fnqueue.results": ("Result",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
