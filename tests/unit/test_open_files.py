"""In a process of its own: a limit that was lowered cannot be raised again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from broker.errors import ConfigurationError
from workers.open_files import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
try:
    allow_open_files({slots})
except ConfigurationError as exc:
    print(exc)
else:
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def said(limits: tuple[int, int], slots: int) -> str:
    program = PROGRAM.format(limits=limits, slots=slots)
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("soft", "slots", "then"), [(1000, 10, 1000), (1000, 2000, 2256), (512, 257, 513)])
def test_the_limit_is_raised_as_far_as_the_slots_need(soft: int, slots: int, then: int) -> None:
    assert said((soft, 4000), slots) == str(then)


def test_a_limit_that_cannot_be_raised_is_named() -> None:
    told = said((1000, 4000), 16_384)
    assert told.startswith("max_request_concurrency: 16384 jobs at once take 16640 open files")
    assert "may have 4000" in told
