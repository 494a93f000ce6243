"""`fnqueue dev` as a process of its own, used from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

UP_WITHIN_S = 60.0
DOWN_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dev:
    process: subprocess.Popen[str]
    output: str
    url: str
    key: str
    function_id: str
    curl: str

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def invoke_url(self) -> str:
        return f"{self.url}/v2/nvcf/pexec/functions/{self.function_id}"

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """The exit status."""
        self.process.send_signal(number)
        return self.process.wait(DOWN_WITHIN_S)


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FNQUEUE_")}
    return kept | {"PYTHONUNBUFFERED": "1"} | extra


def fnqueue(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        _command(arguments), env=env or environment(), capture_output=True, text=True, timeout=60, check=False
    )


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "fnqueue", *arguments]


@contextlib.contextmanager
def running(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Dev]:
    """A server on a free port, from when it has said how to use it."""
    command = _command(["dev", "--port", "0", "--data-dir", str(folder / "data"), *arguments])
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    with output.open("wb") as out, (folder / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            command, env=env or environment(), stdout=out, stderr=errors, text=True, start_new_session=True
        )
    try:
        yield _welcomed(process, output, folder / "errors.txt")
    finally:
        for left in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            left.kill()
        process.kill()
        process.wait()


def _welcomed(process: subprocess.Popen[str], output: Path, errors: Path) -> Dev:
    deadline = time.monotonic() + UP_WITHIN_S
    while "Ctrl-C" not in (said := output.read_text()):
        assert process.poll() is None, f"ended with {process.returncode}: {errors.read_text()}"
        assert time.monotonic() < deadline, f"not up within {UP_WITHIN_S} s: {errors.read_text()}"
        time.sleep(0.05)
    return Dev(
        process=process,
        output=said,
        url=_found(r"URL +(\S+)", said),
        key=_found(r"API key +(\S+)", said),
        function_id=_found(r"Function +echo, (\S+)", said),
        curl=_found(r"(curl .+)", said),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in {text!r}"
    return match.group(1)
