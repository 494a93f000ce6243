"""The three servers in containers, for a machine that has a Docker engine but not the programs.

Their definition is `docker-compose.yml`; `infra/local/compose.yml` adds a loopback port to each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.local.process import LOOPBACK, ServerFailed, kept_secret

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILES = ("docker-compose.yml", "infra/local/compose.yml")
PROJECT = "fnqueue-stack"
USER = "fnqueue"
BUCKET = "fnqueue"
UP_S = 600.0  # images are pulled the first time
QUESTION_S = 20.0


class Compose:
    """The servers' passwords are kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._marker = folder / "compose"

    @staticmethod
    def available() -> bool:
        """Whether a Docker engine answers."""
        if shutil.which("docker") is None:
            return False
        return _run(["docker", "info"], {}, QUESTION_S).returncode == 0

    def up(self, services: Sequence[str]) -> Mapping[str, str]:
        """Start them, wait until they are healthy, and say where they are, as settings."""
        self._marker.touch()
        self._docker("up", "--detach", "--wait", *services, patience_s=UP_S)
        found = {}
        if "rabbitmq" in services:
            found["FNQUEUE_QUEUE_URL"] = f"amqp://{USER}:{self._queue_password}@{self._address('rabbitmq', 5672)}/"
        if "redis" in services:
            found["FNQUEUE_STORE_URL"] = f"redis://:{self._store_password}@{self._address('redis', 6379)}/0"
        if "s3" in services:
            credentials = f"{USER}-access:{self._blobs_secret}"
            found["FNQUEUE_BLOBS_URL"] = f"s3://{credentials}@{self._address('s3', 9000)}/{BUCKET}?tls=false"
        return found

    def down(self) -> None:
        """Stop what `up` started; the data stays in its volumes. Idempotent."""
        if self._marker.exists():
            self._docker("down", patience_s=UP_S)
            self._marker.unlink()

    @property
    def _queue_password(self) -> str:
        return kept_secret(self._folder / "compose.queue")

    @property
    def _store_password(self) -> str:
        return kept_secret(self._folder / "compose.store")

    @property
    def _blobs_secret(self) -> str:
        return kept_secret(self._folder / "compose.blobs")

    def _address(self, service: str, port: int) -> str:
        published = self._docker("port", service, str(port), patience_s=QUESTION_S)
        return f"{LOOPBACK}:{published.strip().rsplit(':', 1)[-1]}"

    def _docker(self, *arguments: str, patience_s: float) -> str:
        files = [part for name in FILES for part in ("-f", str(REPOSITORY / name))]
        secrets = {
            "RABBITMQ_USER": USER,
            "RABBITMQ_PASSWORD": self._queue_password,
            "REDIS_PASSWORD": self._store_password,
            "S3_ACCESS_KEY": f"{USER}-access",
            "S3_SECRET_KEY": self._blobs_secret,
            "S3_BUCKET": BUCKET,
        }
        done = _run(["docker", "compose", "-p", PROJECT, *files, *arguments], secrets, patience_s)
        if done.returncode != 0:
            raise ServerFailed(f"docker compose {arguments[0]} failed:\n{done.stderr[-2000:]}")
        return done.stdout


def _run(command: Sequence[str], extra: Mapping[str, str], patience_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(command),
        env={**os.environ, **extra},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience_s,
        check=False,
    )
