"""Where webhooks may go: what their URLs may look like, and which addresses may be connected to.

A URL is read by one strict pattern, so that no two parsers can take it for different ones. Names are not looked up
here; whoever connects asks for every address that a name led to, and connects to that very address.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from broker.errors import BadRequest, ConfigurationError
from broker.settings import SecretSettings

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

LONGEST_URL = 2048

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][A-Za-z0-9._~:/?@!$&'()*+,;=%\[\]-]*)?",
    re.ASCII,
)
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
# What is read as an IPv4 address, in whatever way it is written (WHATWG URL, "ends in a number").
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Not public, though the standard library says so, at least in some of its versions: protocol assignments, among them
# the metadata of Oracle's cloud; relays of 6to4; and what hands out metadata in Azure.
_SPECIAL: Sequence[IpNetwork] = tuple(
    ipaddress.ip_network(each) for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")
)
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Egress:
    """`networks` are allowed although they are not public; `ports` are ranges, ends included."""

    networks: tuple[IpNetwork, ...]
    ports: tuple[tuple[int, int], ...]
    http: bool

    @classmethod
    def of(cls, settings: SecretSettings) -> Self:
        """Raises ConfigurationError."""
        return cls(
            networks=tuple(_network(part) for part in _parts(settings.webhook_networks)),
            ports=tuple(_range(part) for part in _parts(settings.webhook_ports)),
            http=settings.webhook_http,
        )

    def check_url(self, url: str, *, field: str) -> str:
        """The URL. Raises BadRequest, which names `field` and repeats nothing of the URL: it may hold a token."""
        found = _URL.fullmatch(url) if len(url) <= LONGEST_URL else None
        if found is None:
            raise BadRequest(
                f"{field} must be a URL of at most {LONGEST_URL} ASCII characters, as https://host/path, without user, "
                "password and fragment",
                field=field,
            )
        if found["scheme"] == "http" and not self.http:
            raise BadRequest(f"{field} must begin with https://", field=field)
        port = int(found["port"] or _DEFAULT_PORTS[found["scheme"]])
        if not any(first <= port <= last for first, last in self.ports):
            raise BadRequest(f"{field}: port {port} is not among those that may be used", field=field)
        self._check_host(found["host"], field)
        return url

    def allows(self, address: str) -> bool:
        """Whether an IP address, as a name was resolved to, may be connected to."""
        try:
            given = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        plain = _embedded(given)
        if any(each in network for each in (given, plain) for network in self.networks):
            return True
        return _is_public(given) and _is_public(plain)

    def _check_host(self, host: str, field: str) -> None:
        if host.startswith("["):
            literal = host[1:-1]
        elif _NUMBER.fullmatch(host):
            literal = host
        else:
            if not all(0 < len(label) <= 63 for label in host.removesuffix(".").split(".")):
                raise BadRequest(f"{field}: its host is no name", field=field)
            return
        # Of numbers, only the plain form is an address here: 127.1, 0x7f000001 and 2130706433 are none.
        if not self.allows(literal):
            raise BadRequest(f"{field}: its address is not one that webhooks may reach", field=field)


def host_of(url: str) -> str:
    """Of a URL that was checked: host and port, in lower case, as far as they are written."""
    return url.partition("://")[2].partition("?")[0].partition("/")[0].lower()


def _is_public(address: IpAddress) -> bool:
    if any(address in network for network in _SPECIAL):
        return False
    if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST_6:
        return address in _NAT64  # what is in it is looked at, too
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    return address.is_global and not special and not address.is_link_local


def _embedded(address: IpAddress) -> IpAddress:
    """The IPv4 address that an IPv6 address leads to: mapped, by 6to4 or by NAT64; or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _network(text: str) -> IpNetwork:
    try:
        return ipaddress.ip_network(text)
    except ValueError as exc:
        raise ConfigurationError(f"FNQUEUE_WEBHOOK_NETWORKS: {text[:50]!r} is no network; write 10.1.0.0/16") from exc


def _range(text: str) -> tuple[int, int]:
    found = _PORTS.fullmatch(text)
    first = int(found[1]) if found else 0
    last = int(found[2] or found[1]) if found else 0
    if not 1 <= first <= last <= 65_535:
        raise ConfigurationError(f"FNQUEUE_WEBHOOK_PORTS: {text[:50]!r} is no port; write 443 or 9000-9099")
    return first, last
