"""What telling metrics costs: `python -m benchmarks.metrics` prints CPU times, each the best of many short runs."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

from aiohttp import web

from api import figures
from api.notes import Notes
from broker.model import Record, RequestState, Timings
from broker.settings import SidecarSettings
from broker.telemetry.metrics import FUNCTION_LATENCY, Metrics, Process
from workers.figures import Figures

RUNS, CALLS = 300, 200
ROUTE = "/v2/nvcf/pexec/functions/{function_id}"
HISTOGRAMS = 5000


def main() -> None:
    metrics = Metrics()
    metrics.announce(Process.API)
    request = cast("web.Request", SimpleNamespace(method="POST"))
    notes = Notes()
    notes.route, notes.record = ROUTE, cast("Record", SimpleNamespace(function_id="f" * 36, version_id="v" * 36))
    sidecar = Figures(metrics, SidecarSettings(function_id="f" * 36, function_version_id="v" * 36))
    timings = Timings(inputs_s=0.001, container_s=0.03)

    def answer(*, invoked: bool) -> None:
        figures.answered(metrics, request, notes, 200, 0.03, invoked=invoked)

    def work() -> None:
        sidecar.claimed(first=True, waited_s=0.01, cold_start_s=0.0)
        sidecar.attempted(RequestState.FULFILLED, took_s=0.04, timings=timings, size_bytes=100)
        sidecar.ended(RequestState.FULFILLED)

    print(f"front end, an invocation       {best_us(lambda: answer(invoked=True)):8.2f} µs")
    print(f"front end, any other request   {best_us(lambda: answer(invoked=False)):8.2f} µs")
    print(f"sidecar, a job                 {best_us(work):8.2f} µs")
    for number in range(HISTOGRAMS):
        metrics.observe(FUNCTION_LATENCY, 1.0, "f", str(number))
    page = metrics.read()
    took_s = min(timeit.repeat(page.text, number=1, repeat=3))
    print(f"a page of {HISTOGRAMS} histograms, in a thread: {took_s:.2f} s, {len(page.text()) / 1e6:.1f} MB")


def best_us(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=RUNS)) / CALLS * 1e6


if __name__ == "__main__":
    main()
