"""The three servers in containers, for a machine that has a Docker engine but not the programs.

Their definition is `docker-compose.yml`; `infra/local/compose.yml` adds a loopback port to each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra import access
from infra.local.process import LOOPBACK, ServerFailed, kept_secret

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILES = ("docker-compose.yml", "infra/local/compose.yml")
PROJECT = "fnqueue-stack"
ACCESS_KEY = "fnqueue-access"
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
        found: dict[str, str] = {}
        if "rabbitmq" in services:
            address, management = self._address("rabbitmq", 5672), self._address("rabbitmq", 15672)
            found |= {
                "FNQUEUE_QUEUE_URL": f"amqp://{self._user('api')}@{address}/",
                "FNQUEUE_CONTROLLER_QUEUE_URL": f"amqp://{self._user('controller')}@{address}/",
                "FNQUEUE_QUEUE_MANAGEMENT_URL": f"http://{self._user('controller')}@{management}",
                "FNQUEUE_VERSION_USERS": "true",
            }
        if "redis" in services:
            address = self._address("redis", 6379)
            found |= {
                "FNQUEUE_STORE_URL": f"redis://{self._user('api')}@{address}/0",
                "FNQUEUE_CONTROLLER_STORE_URL": f"redis://{self._user('controller')}@{address}/0",
                "FNQUEUE_SIDECAR_STORE_URL": f"redis://{self._user('sidecar')}@{address}/0",
            }
        if "s3" in services:
            credentials = f"{ACCESS_KEY}:{self._blobs_secret}"
            found["FNQUEUE_BLOBS_URL"] = f"s3://{credentials}@{self._address('s3', 9000)}/{BUCKET}?tls=false"
        return found

    def down(self) -> None:
        """Stop what `up` started; the data stays in its volumes. Idempotent."""
        if self._marker.exists():
            self._docker("down", patience_s=UP_S)
            self._marker.unlink()

    def _password(self, role: str) -> str:
        return kept_secret(self._folder / f"compose.{role}")

    def _user(self, role: str) -> str:
        return f"{access.user_of(role)}:{self._password(role)}"

    @property
    def _blobs_secret(self) -> str:
        return kept_secret(self._folder / "compose.blobs")

    def _address(self, service: str, port: int) -> str:
        published = self._docker("port", service, str(port), patience_s=QUESTION_S)
        return f"{LOOPBACK}:{published.strip().rsplit(':', 1)[-1]}"

    def _docker(self, *arguments: str, patience_s: float) -> str:
        files = [part for name in FILES for part in ("-f", str(REPOSITORY / name))]
        secrets = {
            **{f"{role.upper()}_PASSWORD": self._password(role) for role in access.ROLES},
            "S3_ACCESS_KEY": ACCESS_KEY,
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
