"""POSTs to the receivers of webhooks: servers of anybody's choice, of which nothing is believed and little is taken.

A name is looked up once for each POST, all that it leads to is checked, and what is connected to is one of those
addresses, checked once more where the socket is made: literal addresses come by no resolver. No redirect is followed,
no proxy of the environment used, and nothing read but the head of the answer.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from broker.egress import Egress
from broker.webhooks import Answer

Lookup = Callable[[str, int], Sequence[str]]
"""The addresses of a name, for a port; blocks. Raises OSError."""

# A resolver that does not answer holds a thread for longer than anybody waits for it.
_LOOKUPS = 16
_HEAD_BYTES = 16 * 1024
_REFUSED = "the address may not be reached"
_USER_AGENT = "fnqueue-webhooks"


class AddressRefused(OSError):
    """An address that webhooks may not reach; which one, is nothing that a tenant should learn."""

    def __init__(self) -> None:
        super().__init__(_REFUSED)


def look_up(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Receivers:
    """Opened by `open_receivers`."""

    def __init__(self, session: aiohttp.ClientSession, *, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> Answer:
        """What came of it; raises nothing but a cancellation. `url` is one that was checked when it was accepted, and
        may be checked more strictly by now."""
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(
                    URL(url, encoded=True),
                    data=content,
                    headers={"User-Agent": _USER_AGENT, **headers},
                    allow_redirects=False,
                ) as response,
            ):
                return _answer(response)
        except TimeoutError:
            return Answer(error=f"no answer within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return _failure(exc)


@asynccontextmanager
async def open_receivers(
    egress: Egress, *, timeout_s: float, calls: int, lookup: Lookup = look_up, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receivers]:
    """`calls` may be under way at once."""

    def connectable(address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, where = address
        if not egress.allows(str(where[0])):
            raise AddressRefused
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made

    threads = ThreadPoolExecutor(max_workers=_LOOKUPS, thread_name_prefix="webhooks")
    try:
        connector = aiohttp.TCPConnector(
            resolver=_Checked(egress, lookup, threads),
            use_dns_cache=False,
            force_close=True,
            limit=calls,
            ssl=tls or True,
            socket_factory=connectable,
        )
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,
            auto_decompress=False,
            max_line_size=_HEAD_BYTES,
            max_field_size=_HEAD_BYTES,
        ) as session:
            yield Receivers(session, timeout_s=timeout_s)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


class _Checked(AbstractResolver):
    """One look-up for each connection. If a name leads anywhere that is refused, it leads nowhere."""

    def __init__(self, egress: Egress, lookup: Lookup, threads: ThreadPoolExecutor) -> None:
        self._egress = egress
        self._lookup = lookup
        self._threads = threads

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await asyncio.get_running_loop().run_in_executor(self._threads, self._lookup, host, port)
        if not all(self._egress.allows(address) for address in addresses):
            raise AddressRefused
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        return


def _answer(response: aiohttp.ClientResponse) -> Answer:
    status = response.status
    if 200 <= status < 300:
        return Answer(status=status)
    if 300 <= status < 400:
        return Answer(status=status, error="redirects are not followed")
    return Answer(
        status=status,
        error=f"answered {status}",
        retry_after_s=_retry_after_s(response.headers.get("Retry-After", "")),
    )


def _failure(exc: Exception) -> Answer:
    """In words of ours: what a server says of itself in its errors is not repeated."""
    cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
    if isinstance(cause, AddressRefused) or _REFUSED in str(cause):
        return Answer(error=_REFUSED, hopeless=True)
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return Answer(error="its host was not found")
    if isinstance(exc, aiohttp.ClientSSLError):
        return Answer(error="no TLS with a certificate that is good for its host")
    if isinstance(exc, aiohttp.ClientConnectorError):
        return Answer(error="no connection")
    if isinstance(exc, aiohttp.InvalidURL):
        return Answer(error="its URL cannot be used", hopeless=True)
    return Answer(error="what came is no answer")


def _retry_after_s(said: str) -> float:
    """RFC 9110 §10.2.3; 0 when it cannot be read."""
    if re.fullmatch(r"[0-9]{1,9}", said.strip()):
        return float(said)
    try:
        at = parsedate_to_datetime(said)
    except ValueError:
        return 0.0
    return max(0.0, at.replace(tzinfo=at.tzinfo or UTC).timestamp() - time.time())
