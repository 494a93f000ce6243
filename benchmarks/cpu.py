"""CPU time by process, over whole process trees."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress

import psutil

Trees = Mapping[str, Iterable[psutil.Process]]


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; none if it is gone."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def seconds(trees: Trees) -> dict[str, float]:
    """User and system seconds spent so far, by label. The system counts in ticks, usually of 10 ms."""
    return {label: sum(_seconds(process) for process in processes) for label, processes in trees.items()}


def resident_bytes(trees: Trees) -> dict[str, int]:
    """Memory that is resident now, by label."""
    return {label: sum(_resident_bytes(process) for process in processes) for label, processes in trees.items()}


def pin(processes: Iterable[psutil.Process], cores: Iterable[int]) -> None:
    """Let them run on these cores only, with the threads that they have and will have."""
    allowed = set(cores)
    for process in processes:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, allowed)


def _seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _resident_bytes(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
