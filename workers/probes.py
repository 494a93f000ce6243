"""How a container is asked whether it is well: by HTTP or by gRPC (contract/invocation.md §8.1)."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import aiohttp
from yarl import URL

from broker.errors import ConfigurationError
from broker.settings import SidecarSettings

NOT_FOUND_PAUSE_S = (2.0, 30.0)  # first and longest, of a path that may only not be served yet

# grpc.health.v1.Health/Check: an empty message asks for the server as a whole; field 1 of the answer is its status.
GRPC_CHECK = "/grpc.health.v1.Health/Check"
GRPC_SERVING = b"\x08\x01"


@dataclass(frozen=True, slots=True)
class Finding:
    """`fault` is '' for a container that is well; `silent` tells that it did not answer in time, rather than badly."""

    fault: str = ""
    silent: bool = False


class Probe(Protocol):
    @property
    def subject(self) -> str:
        """What is asked, for people."""

    async def check(self) -> Finding:
        """Ask once, within `health_timeout_s`."""


class HttpProbe:
    """Well is exactly the expected status. `session` is looked up for each check."""

    def __init__(self, settings: SidecarSettings, session: Callable[[], aiohttp.ClientSession]) -> None:
        self._url = url_of(settings, settings.health_port or settings.inference_port, settings.health_uri)
        self._expected = settings.health_expected_status
        self._timeout_s = settings.health_timeout_s
        self._session = session
        self.subject = f"GET {self._url}"

    async def check(self) -> Finding:
        silence = Finding(f"{self.subject} was not answered within {self._timeout_s:g} s", silent=True)
        until = asyncio.get_running_loop().time() + self._timeout_s
        pause_s, longest_s = NOT_FOUND_PAUSE_S
        try:
            async with asyncio.timeout_at(until):
                while (status := await self._status()) == 404 != self._expected:
                    silence = self._bad(status)
                    if asyncio.get_running_loop().time() + pause_s >= until:
                        break
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, longest_s)
        except TimeoutError:
            return silence
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return Finding(f"{self.subject} failed: {type(exc).__name__}")
        return Finding() if status == self._expected else self._bad(status)

    async def _status(self) -> int:
        async with self._session().get(self._url, allow_redirects=False) as response:
            return response.status

    def _bad(self, status: int) -> Finding:
        return Finding(f"{self.subject} answered {status}, not {self._expected}")


class GrpcProbe:
    """Well is SERVING. Every check has a connection of its own: a channel that is kept waits longer and longer between
    its tries to reach a container that was away.

    Raises ConfigurationError when grpcio is not installed.
    """

    def __init__(self, settings: SidecarSettings) -> None:
        self._grpc = _grpc()
        self._target = f"{settings.inference_host}:{settings.health_port or settings.inference_port}"
        self._timeout_s = settings.health_timeout_s
        self.subject = f"{GRPC_CHECK[1:]} at {self._target}"

    async def check(self) -> Finding:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._grpc.aio.insecure_channel(self._target, options=options) as channel,
            ):
                answer = await channel.unary_unary(GRPC_CHECK)(b"", timeout=self._timeout_s)
        except self._grpc.aio.AioRpcError as exc:
            if exc.code() is self._grpc.StatusCode.DEADLINE_EXCEEDED:
                return self._silence()
            return Finding(f"{self.subject} failed: {exc.code().name}")
        except TimeoutError:
            return self._silence()
        return Finding() if answer == GRPC_SERVING else Finding(f"{self.subject} answered that it is not serving")

    def _silence(self) -> Finding:
        return Finding(f"{self.subject} was not answered within {self._timeout_s:g} s", silent=True)


def url_of(settings: SidecarSettings, port: int, path: str) -> URL:
    """Host and port are ours whatever `path` holds: it is never joined, only placed after them."""
    origin = URL.build(scheme="http", host=settings.inference_host, port=port)
    return URL(f"{origin}/{path.lstrip('/')}")


def _grpc() -> ModuleType:
    """20 MB of memory and 100 ms that only a container with gRPC costs."""
    try:
        return importlib.import_module("grpc")
    except ImportError as exc:
        raise ConfigurationError(
            "health_protocol: gRPC needs a package that is not installed; use: pip install 'fnqueue[grpc]'"
        ) from exc
