"""`fnqueue doctor`: what an operator should know of the servers, and how to mend it."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import click
from aiohttp import http_parser

from api.commands import told
from broker import profiles
from broker.examination import examine
from broker.facts import Finding, Level
from broker.settings import DoctorSettings, load
from broker.telemetry import logs
from fnqueue import __version__

# Those whose faults are known to matter (docs of each), and the least that has them mended.
LIBRARIES = ("aiohttp", "aio-pika", "aiormq", "redis", "hiredis", "boto3", "pydantic", "orjson", "uvloop")
UNWELL = 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--strict", is_flag=True, help="Exit with 1 on warnings too.")
def doctor(as_json: bool, strict: bool) -> None:
    """Look at RabbitMQ, Redis and S3 as FNQUEUE_* names them, and say what is wrong and how to mend it.

    Each line is ok, warn or fail, judged by FNQUEUE_PROFILE; what nobody could tell is called unknown. The exit status
    is 0 when nothing fails, 1 when something does, 2 when the settings themselves are wrong. Nothing is changed, but
    that a message to no queue is sent, and an object is put into the bucket and deleted again.
    """
    with told():
        settings = load(DoctorSettings)
        logs.configure("CRITICAL", settings.log_format)
        facts = asyncio.run(examine(settings, probe=True))
    judged = profiles.judge(facts, settings, run_timeout_s=settings.run_timeout_s)
    findings = (*_libraries(), *judged)
    counts = Counter(finding.level for finding in findings)
    if as_json:
        shown = {"profile": settings.profile, "findings": [asdict(finding) for finding in findings], "counts": counts}
        click.echo(json.dumps(shown, indent=2))
    else:
        click.echo("\n".join(lines(findings)))
        told_counts = ", ".join(f"{counts[level]} {level}" for level in Level)
        click.echo(f"\nprofile {settings.profile}: {told_counts}")
    if counts[Level.FAIL] or (strict and counts[Level.WARN]):
        sys.exit(UNWELL)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """For people: one line each, and below it how to mend it."""
    for finding in findings:
        place = f"{finding.server:<9} {finding.name}"
        yield f"{finding.level:<5} {place:<34} {finding.value}"
        if finding.level is not Level.OK:
            yield from (f"{'':<6}{word}" for word in (finding.advice, finding.mend and f"$ {finding.mend}") if word)


def _libraries() -> Iterator[Finding]:
    yield Finding(
        server="fnqueue", name="version", level=Level.OK, value=f"{__version__} on Python {platform.python_version()}"
    )
    installed = [f"{name} {found}" for name in LIBRARIES if (found := _installed(name))]
    yield Finding(server="fnqueue", name="libraries", level=Level.OK, value=", ".join(installed))
    slow = http_parser.HttpRequestParser is http_parser.HttpRequestParserPy
    yield Finding(
        server="fnqueue",
        name="HTTP parser",
        level=Level.FAIL if slow else Level.OK,
        value="Python" if slow else "C",
        advice="aiohttp's extension is missing; the other one is not strict, and no process starts" if slow else "",
        mend="pip install --force-reinstall --only-binary :all: aiohttp" if slow else "",
    )


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # uvloop is not everywhere
        return ""
