"""On what, and with what, a run was made: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil

from infra.local import binaries
from infra.local.process import ServerFailed

PACKAGES = ("aiohttp", "aiormq", "redis", "hiredis", "uvloop", "orjson", "pydantic")
CPU_INFO = Path("/proc/cpuinfo")
SYNCS = 50
ASK_S = 30.0


def describe(*, data: Path, servers: bool) -> dict[str, str]:
    """Facts by name. `data` is the folder that the servers write to; nothing here names a path or this host."""
    facts = {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(f"{name} {_package(name)}" for name in PACKAGES),
        "commit": _commit(),
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    if servers:
        facts["rabbitmq"] = _rabbitmq()
        facts["redis"] = _redis()
        facts["a synced write"] = f"{_synced_write_ms(data):.2f} ms (median of {SYNCS}, 1 KiB, where Redis writes)"
    return facts


def _cpu_model() -> str:
    with suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(none)"


def _commit() -> str:
    commit = _ask(["git", "rev-parse", "--short", "HEAD"])
    changed = _ask(["git", "status", "--porcelain"]) if commit else ""
    return f"{commit} and uncommitted changes" if changed else commit or "unknown"


def _rabbitmq() -> str:
    """From the folder that its library is installed in: asking rabbitmqctl takes seconds."""
    with suppress(ServerFailed):
        home = binaries.rabbitmq_script("rabbitmq-server").resolve().parent.parent
        for plugins in (home / "plugins", *home.glob("lib/rabbitmq_server-*/plugins")):
            for library in plugins.glob("rabbit-[0-9]*"):
                return library.name.removeprefix("rabbit-").removesuffix(".ez")
    return "unknown"


def _redis() -> str:
    with suppress(ServerFailed):
        said = _ask([str(binaries.program("redis-server")), "--version"]).split()
        return next((word.removeprefix("v=") for word in said if word.startswith("v=")), "unknown")
    return "unknown"


def _synced_write_ms(folder: Path) -> float:
    """What `appendfsync always` waits for, at least once per batch of writes."""
    took_ms = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(SYNCS):
            began_at = time.perf_counter()
            file.write(b"." * 1024)
            file.flush()
            os.fsync(file.fileno())
            took_ms.append((time.perf_counter() - began_at) * 1000)
    return statistics.median(took_ms)


def _ask(command: Sequence[str]) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
        return done.stdout.strip()
    return ""
