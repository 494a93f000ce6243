"""Where webhooks may go: URLs of one form only, and no address that is not public."""

from __future__ import annotations

import pytest

from broker.egress import Egress, host_of
from broker.errors import BadRequest, ConfigurationError
from broker.settings import SecretSettings

STRICT = Egress.of(SecretSettings())
OPEN = Egress.of(SecretSettings(webhook_ports="80,443,1024-65535", webhook_http=True))

INSIDE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:169.254.169.254",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "ff02::1",
    "5f00::1",
]
OUTSIDE = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not STRICT.allows(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_a_public_address_is_allowed(address: str) -> None:
    assert STRICT.allows(address)


@pytest.mark.parametrize("garbage", ["", "localhost", "1.1.1", "0x7f.1", "2130706433", "1.1.1.1 "])
def test_what_is_no_address_is_refused(garbage: str) -> None:
    assert not STRICT.allows(garbage)


def test_named_networks_are_allowed_and_nothing_beside_them() -> None:
    egress = Egress.of(SecretSettings(webhook_networks="10.1.0.0/16, fd00:1::/64"))
    assert egress.allows("10.1.2.3")
    assert egress.allows("::ffff:10.1.2.3")
    assert egress.allows("fd00:1::7")
    assert not egress.allows("10.2.0.1")
    assert not egress.allows("127.0.0.1")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com/",
        "https://example.com:8443/a/b?c=d&e=%20f",
        "https://xn--bcher-kva.example/x",
        "https://8.8.8.8/hook",
        "https://[2606:4700:4700::1111]/hook",
        "https://example.com./",
        "https://EXAMPLE.com/;v=1",
        "https://1password.example/",
    ],
)
def test_a_url_of_a_public_host_is_good(url: str) -> None:
    assert STRICT.check_url(url, field="url") == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "//example.com",
        "https://",
        "https:///x",
        "https:example.com",
        "ftp://example.com",
        "file:///etc/passwd",
        "gopher://example.com",
        "unix:/var/run/docker.sock",
        "https://user@example.com",
        "https://user:secret@example.com",
        "https://example.com@127.0.0.1/",
        "https://127.0.0.1#@example.com/",
        "https://example.com\\@127.0.0.1/",
        "https://127.0.0.1\\.example.com/",
        "https://example.com/#part",
        "https://example.com/ x",
        "https://example.com/\r\nX: y",
        "https://example.com\n",
        "https://example.com/\x00",
        "https://exämple.com/",
        "https://。/",
        "https://①②⑦.0.0.1/",
        "https://127。0。0。1/",
        "https://%31%32%37.0.0.1/",
        "https://exa%6dple.com/",
        "https://.example.com/",
        "https://example..com/",
        f"https://{'a' * 64}.com/",
        f"https://example.com/{'a' * 2048}",
        "https://example.com:0/",
        "https://example.com:70000/",
        "https://example.com:/",
        "https://example.com:22/",
        "https://example.com:6379/",
        "http://example.com/",
        # Loopback, private and metadata addresses, however they are written.
        "https://127.0.0.1/",
        "https://127.1/",
        "https://127.0.1/",
        "https://127.0.0.1./",
        "https://2130706433/",
        "https://017700000001/",
        "https://0177.0.0.1/",
        "https://0x7f.0.0.1/",
        "https://0x7f000001/",
        "https://0x7F.1/",
        "https://0/",
        "https://0.0.0.0/",
        "https://00000177.0.0.1/",
        "https://127.000.000.001/",
        "https://1.1.1.1.1/",
        "https://4294967297/",
        "https://10.0.0.1/",
        "https://192.168.0.1/",
        "https://172.16.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://2852039166/",
        "https://0xa9fea9fe/",
        "https://0251.0376.0251.0376/",
        "https://168.63.129.16/",
        "https://100.100.100.200/",
        "https://[::1]/",
        "https://[::]/",
        "https://[0:0:0:0:0:0:0:1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[::127.0.0.1]/",
        "https://[64:ff9b::127.0.0.1]/",
        "https://[2002:7f00:1::]/",
        "https://[fd00:ec2::254]/",
        "https://[fe80::1%25lo]/",
        "https://[fe80::1]/",
        "https://[::1]",
        "https://[::1",
        "https://[127.0.0.1]/",
        "https://[v1.fe80::a+en1]/",
        "https://[]/",
    ],
)
def test_any_other_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        STRICT.check_url(url, field="url")
    assert refused.value.field == "url"
    assert len(url) < 12 or url not in str(refused.value)


def test_plain_http_and_other_ports_are_for_those_who_are_told_to_allow_them() -> None:
    assert OPEN.check_url("http://example.com/", field="url")
    assert OPEN.check_url("https://example.com:9000/", field="url")
    with pytest.raises(BadRequest):
        OPEN.check_url("https://example.com:22/", field="url")
    with pytest.raises(BadRequest):
        OPEN.check_url("http://127.0.0.1/", field="url")


@pytest.mark.parametrize("networks", ["10.0.0.1/8", "here", "10.0.0.0/8,x"])
def test_networks_that_are_none_are_refused_at_the_start(networks: str) -> None:
    with pytest.raises(ConfigurationError, match="FNQUEUE_WEBHOOK_NETWORKS"):
        Egress.of(SecretSettings(webhook_networks=networks))


@pytest.mark.parametrize("ports", ["x", "0", "70000", "9-8", "443;8443"])
def test_ports_that_are_none_are_refused_at_the_start(ports: str) -> None:
    with pytest.raises(ConfigurationError, match="FNQUEUE_WEBHOOK_PORTS"):
        Egress.of(SecretSettings(webhook_ports=ports))


def test_a_host_is_counted_with_its_port_and_nothing_else() -> None:
    assert host_of("https://Example.com:8443/a/b?c://d") == "example.com:8443"
    assert host_of("https://example.com?x=/") == "example.com"
