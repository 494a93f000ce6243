"""POSTs to receivers: only to addresses that were checked, and nothing that a receiver does costs much."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.egress import Egress
from broker.settings import SecretSettings
from broker.webhooks import Answer
from tests.receiver import Receiver, receiving
from workers.controller.receivers import Lookup, look_up, open_receivers

STRICT = Egress.of(SecretSettings())
LOOPBACK = Egress.of(SecretSettings(webhook_networks="127.0.0.0/8,::1/128"))
REFUSED = Answer(error="the address may not be reached", hopeless=True)
# As the bound for a hang: what ends sooner ends at once.
PATIENT_S = 30.0


class Names:
    """Answers look-ups, each by the next of `answers`, the last one for good."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as opened:
        yield opened


async def post(
    url: str,
    *,
    egress: Egress = LOOPBACK,
    lookup: Lookup = look_up,
    timeout_s: float = PATIENT_S,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    async with open_receivers(egress, timeout_s=timeout_s, calls=4, lookup=lookup, tls=tls) as receivers:
        return await receivers.post(url, {"webhook-id": "msg_1", "Content-Type": "application/json"}, b'{"a":1}')


def port_of(receiver: Receiver) -> str:
    return receiver.url.rpartition(":")[2]


async def test_what_is_sent_arrives_as_it_is(receiver: Receiver) -> None:
    assert await post(f"{receiver.url}/a/b?c=%2F&d=%20") == Answer(status=204)
    [came] = receiver.came
    assert (came.path, came.body) == ("/a/b?c=%2F&d=%20", b'{"a":1}')
    assert (came.headers["webhook-id"], came.headers["content-type"]) == ("msg_1", "application/json")


# -- where it may go ---------------------------------------------------------------------------


async def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(receiver: Receiver) -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    assert (await post(f"http://flips.example:{port_of(receiver)}/", lookup=names)).status == 204
    assert names.asked == ["flips.example"]
    assert receiver.came[0].headers["host"] == f"flips.example:{port_of(receiver)}"


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["169.254.169.254"],
        ["fe80::1%lo"],
        ["64:ff9b::7f00:1"],
    ],
    ids=" ".join,
)
async def test_a_name_that_leads_inside_is_not_connected_to(receiver: Receiver, addresses: Sequence[str]) -> None:
    answer = await post(f"http://inside.example:{port_of(receiver)}/", egress=STRICT, lookup=Names(addresses))
    assert answer == REFUSED
    assert receiver.came == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost"]
)
async def test_an_address_that_nobody_looks_up_is_checked_too(receiver: Receiver, host: str) -> None:
    """Whatever the check of URLs may have let through."""
    answer = await post(f"http://{host}:{port_of(receiver)}/", egress=STRICT)
    assert (answer.status, answer.hopeless, receiver.came) == (0, True, [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(receiver: Receiver, status: int) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": "/inside"})

    receiver.answers.append(elsewhere)
    assert await post(receiver.url) == Answer(status=status, error="redirects are not followed")
    assert [came.path for came in receiver.came] == ["/"]


async def test_no_proxy_of_the_environment_is_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    assert (await post(receiver.url)).status == 204


# -- what it may do ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 410, 429, 500, 503])
async def test_a_refusal_is_told_by_its_number(receiver: Receiver, status: int) -> None:
    receiver.answers.append(status)
    assert await post(receiver.url) == Answer(status=status, error=f"answered {status}")


def _in(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("120", 120, 120), (_in(3600), 3000, 3600), (_in(-60), 0, 0), ("soon", 0, 0), ("-5", 0, 0), ("1" * 30, 0, 0)],
    ids=["seconds", "date", "past", "words", "negative", "too many digits"],
)
async def test_the_patience_that_is_asked_for_is_read(receiver: Receiver, said: str, least: float, most: float) -> None:
    async def later(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": said})

    receiver.answers.append(later)
    assert least <= (await post(receiver.url)).retry_after_s <= most


async def test_an_answer_without_an_end_is_not_waited_for(receiver: Receiver) -> None:
    left = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65_536)
        finally:
            left.set()

    receiver.answers.append(endless)
    assert await post(receiver.url) == Answer(status=200)
    await asyncio.wait_for(left.wait(), PATIENT_S)


async def test_a_head_that_is_too_large_is_no_answer(receiver: Receiver) -> None:
    async def swollen(request: web.Request) -> web.StreamResponse:
        return web.Response(headers={"X-Much": "x" * 65_536})

    receiver.answers.append(swollen)
    assert await post(receiver.url) == Answer(error="what came is no answer")


async def test_who_does_not_answer_is_not_waited_for(receiver: Receiver) -> None:
    """A real time-out: it is what is tested."""
    freed = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        await freed.wait()
        return web.Response()

    receiver.answers.append(silent)
    assert await post(receiver.url, timeout_s=0.1) == Answer(error="no answer within 0.1 s")
    freed.set()


async def test_a_name_server_that_does_not_answer_is_not_waited_for() -> None:
    """A real time-out: it is what is tested."""
    freed = threading.Event()

    def slow(host: str, port: int) -> Iterable[str]:
        freed.wait(PATIENT_S)
        return []

    answer = await post("http://slow.example/", lookup=slow, timeout_s=0.1)  # type: ignore[arg-type]  # never returns
    freed.set()
    assert answer == Answer(error="no answer within 0.1 s")


async def test_nobody_there_is_told_without_what_the_system_says() -> None:
    def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known, by 10.0.0.53")

    assert await post("http://unknown.example/", lookup=unknown) == Answer(error="its host was not found")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert await post(f"http://127.0.0.1:{taken.getsockname()[1]}/") == Answer(error="no connection")


async def test_what_is_no_http_is_no_answer() -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    async with server:
        answer = await post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert answer == Answer(error="what came is no answer")


async def test_a_certificate_must_be_good_for_the_host(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hooks.example")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain = tmp_path / "chain.pem"
    chain.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    served, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(chain))
    served.load_cert_chain(chain)
    async with receiving(tls=served) as receiver:
        here = Names(["127.0.0.1"])
        good, bad = (f"https://{host}:{port_of(receiver)}/" for host in ("hooks.example", "other.example"))
        assert await post(good, lookup=here, tls=trusting) == Answer(status=204)
        refused = Answer(error="no TLS with a certificate that is good for its host")
        assert await post(good, lookup=here) == refused
        assert await post(bad, lookup=here, tls=trusting) == refused
        assert len(receiver.came) == 1
