"""Is it the payload that kills the worker, or the worker that kills its payloads?

One death of a worker takes with it all that ran there at that time, and a payload that kills comes back: neither tells
anything about the worker. Different payloads, one after the other, do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from broker.model import Crash


def payloads(crashes: Iterable[Crash]) -> int:
    """How many different payloads it takes to explain the crashes of one worker, if each crash was caused by something
    that ran at that time. Those that have a request in common count once; in doubt it is fewer."""
    causes: list[set[str]] = []
    for suspects in _together(crashes):
        linked = [cause for cause in causes if cause & suspects]
        causes = [cause for cause in causes if not cause & suspects] + [suspects.union(*linked)]
    return len(causes)


def _together(crashes: Iterable[Crash]) -> list[set[str]]:
    """The requests of each crash. What began before one was seen ended with it, whenever that was seen."""
    by_origin: dict[str, list[Crash]] = defaultdict(list)
    for crash in crashes:
        by_origin[crash.origin].append(crash)
    found: list[set[str]] = []
    for seen in by_origin.values():
        seen_at = float("-inf")
        for crash in sorted(seen, key=lambda crash: crash.ended_at):
            if crash.began_at >= seen_at:
                seen_at = crash.ended_at
                found.append(set())
            found[-1].add(crash.request_id)
    return found
