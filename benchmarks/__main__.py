"""`python -m benchmarks`: measure fnqueue against a direct POST to the same function."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from benchmarks import cpu, machine, plot, report
from benchmarks.load import LoadFailed, generator
from benchmarks.measure import Bench, Measurement, Plan, Workload
from benchmarks.pipes import KINDS
from benchmarks.summary import summarise
from benchmarks.targets import SetUpFailed, Target, embedded, floor, pipe, processes, production, started
from infra.local import binaries
from infra.local.process import ServerFailed

DATA = Path(".fnqueue")
SMALLEST_BODY_BYTES = 32
LARGEST_BODY_BYTES = 1024 * 1024  # the echo function's message


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is started."""

    slots: int
    is_embedded: bool
    with_pipes: bool
    fronts: int
    is_pinned: bool
    settings: Mapping[str, str]

    def check(self) -> None:
        """Raises click.UsageError."""
        if self.is_embedded and (self.fronts or self.is_pinned or self.settings):
            raise click.UsageError("--embedded has no front end of its own: leave out --processes, --pin and --set")
        if self.is_pinned and len(os.sched_getaffinity(0)) < 2:
            raise click.UsageError("--pin takes two cores or more")


def _counts(_context: click.Context, _parameter: click.Parameter, value: str) -> list[int]:
    counts = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
    if not all(0 < count <= 1000 for count in counts):
        raise click.BadParameter("give numbers from 1 to 1000, separated by commas, such as 1,64")
    return counts


def _workloads(_context: click.Context, _parameter: click.Parameter, value: str) -> list[Workload]:
    try:
        return [Workload(part.strip()) for part in value.split(",")]
    except ValueError:
        known = ", ".join(Workload)
        raise click.BadParameter(f"{value!r}; known, to be separated by commas, are {known}") from None


def _settings(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    if bad := next((one for one in given if "=" not in one), ""):
        raise click.BadParameter(f"{bad!r}; give NAME=VALUE")
    return dict(one.split("=", 1) for one in given)


@click.command()
@click.option("--workload", "workloads", default="sync,submit,status", show_default=True, callback=_workloads)
@click.option("--concurrency", "concurrencies", default="1,64", show_default=True, callback=_counts, help="Callers.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 60), default=2.0, show_default=True, help="Of one burst.")
@click.option(
    "--body-bytes",
    type=click.IntRange(SMALLEST_BODY_BYTES, LARGEST_BODY_BYTES),
    default=1024,
    show_default=True,
    help="Size of a request's JSON body; the answer is about as large.",
)
@click.option("--slots", type=click.IntRange(1, 1000), default=64, show_default=True, help="maxRequestConcurrency.")
@click.option("--drain-s", type=click.FloatRange(1, 600), default=60.0, show_default=True, help="Wait for results.")
@click.option("--embedded", "is_embedded", is_flag=True, help="Measure `fnqueue dev`, which needs no servers.")
@click.option(
    "--processes",
    "fronts",
    type=click.IntRange(0, 64),
    default=0,
    help="Measure a front end of so many processes, too, behind which everything else is the same.",
)
@click.option(
    "--pin",
    "is_pinned",
    is_flag=True,
    help="Give the front end the first core for itself, and everything else, the load generator too, the others.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_settings,
    help="Environment of fnqueue, such as FNQUEUE_INLINE_BODY_BYTES=2097152; may be repeated.",
)
@click.option("--pipes/--no-pipes", "with_pipes", default=True, show_default=True, help="Measure the pipes, too.")
@click.option("--output", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write JSON here too.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Draw bars here too, as SVG.",
)
def main(
    *,
    workloads: list[Workload],
    concurrencies: list[int],
    rounds: int,
    seconds: float,
    body_bytes: int,
    slots: int,
    drain_s: float,
    is_embedded: bool,
    with_pipes: bool,
    fronts: int,
    is_pinned: bool,
    settings: dict[str, str],
    output: Path | None,
    picture: Path | None,
) -> None:
    """Measure fnqueue against a direct POST to the same function, and against pipes that do nothing but pass it on, in
    alternation, in one run.

    Starts all it needs on free loopback ports, with its data below .fnqueue, and leaves nothing behind. Exits
    with 1 when a request failed or an accepted one was lost.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    shape = Shape(
        slots=slots,
        is_embedded=is_embedded,
        with_pipes=with_pipes,
        fronts=fronts,
        is_pinned=is_pinned,
        settings=settings,
    )
    shape.check()
    plan = Plan(
        workloads=workloads,
        concurrencies=concurrencies,
        rounds=rounds,
        seconds=seconds,
        body_bytes=body_bytes,
        drain_s=drain_s,
    )
    try:
        facts, measurements = _run(plan, shape)
    except (LoadFailed, ServerFailed, SetUpFailed) as exc:
        raise click.ClickException(str(exc)) from exc
    summaries = summarise(measurements, floor="floor")
    click.echo(report.text(facts, summaries))
    if output is not None:
        output.write_text(report.as_json(report.document(facts, summaries, measurements)))
    if picture is not None:
        picture.write_text(plot.drawn(summaries))
    if faults := report.faults(measurements):
        click.echo("\nNot clean:\n" + "\n".join(faults), err=True)
        sys.exit(1)


def _run(plan: Plan, shape: Shape) -> tuple[dict[str, str], list[Measurement]]:
    with contextlib.ExitStack() as opened:
        cores = sorted(os.sched_getaffinity(0))
        if shape.is_pinned:
            os.sched_setaffinity(0, cores[1:])  # everything that is started inherits it
            opened.callback(os.sched_setaffinity, 0, cores)
        folder = opened.enter_context(_data_folder())
        if not shape.is_embedded:
            binaries.ensure()
        facts = machine.describe(data=folder, servers=not shape.is_embedded)
        _say("starting" + (" fnqueue dev" if shape.is_embedded else " RabbitMQ, Redis, S3, api, controller, sidecar"))
        direct = opened.enter_context(floor(folder))
        others: list[Target] = []
        if shape.is_embedded:
            target = opened.enter_context(embedded(folder, slots=shape.slots))
        else:
            servers = opened.enter_context(started(folder))
            target = opened.enter_context(
                production(folder, slots=shape.slots, servers=servers, settings=shape.settings)
            )
            if shape.fronts:
                others.append(opened.enter_context(processes(folder, target, shape.fronts)))
            kinds = KINDS if shape.with_pipes else ()
            others += [opened.enter_context(pipe(folder, kind, servers, slots=shape.slots)) for kind in kinds]
        if shape.is_pinned:
            for one in (target, *others):
                cpu.pin(one.trees()["api"], cores[:1])
        send = opened.enter_context(generator())
        bench = Bench(send, plan, say=_say)
        idle_ms = bench.idle(target)
        measurements = bench.run(direct, target, *others)
        facts |= _conditions(plan, target, idle_ms)
        return facts | ({"pinned": "the front end alone on one core"} if shape.is_pinned else {}), measurements


def _conditions(plan: Plan, target: Target, idle_ms: Mapping[str, float]) -> dict[str, str]:
    given = ", ".join(f"{name}={value}" for name, value in target.settings.items())
    return {
        "load after": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "settings": f"defaults but for {given}; bearer key checked, INFO logs written",
        "CPU when idle": ", ".join(f"{role} {used:.0f}" for role, used in idle_ms.items() if used) + " (ms/s)",
        "run": f"{plan.rounds} rounds of {plan.seconds:g} s, bodies of {plan.body_bytes} bytes",
    }


@contextlib.contextmanager
def _data_folder() -> Iterator[Path]:
    """Below the working folder, where a disk is more likely than under the system's temporary one."""
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA, ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def _say(what: str) -> None:
    click.echo(f"... {what}", err=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
