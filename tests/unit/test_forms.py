from typing import Any

import hiredis
import pytest

from broker.backends.redis.forms import OPEN, filled, form, parts_of

PARTS = [
    pytest.param((b"one", b"two"), id="some"),
    pytest.param((b"", b"\r\n$3\r\n"), id="empty, and what looks like a frame"),
    pytest.param((b"100 %d %b", bytes(range(256))), id="any bytes"),
]


@pytest.mark.parametrize("parts", PARTS)
def test_a_filled_form_is_what_hiredis_packs(parts: tuple[bytes, bytes]) -> None:
    first, second = parts
    shape = form(("EVALSHA", "f" * 40, 2, OPEN, b"50%d \x00\xff", 0, "é", OPEN, ""))
    command: tuple[Any, ...] = ("EVALSHA", "f" * 40, 2, first, b"50%d \x00\xff", 0, "é", second, "")
    assert shape % filled(first, second) == hiredis.pack_command(command)


def test_parts_of_a_packed_command_are_those_it_was_made_of() -> None:
    assert parts_of(form(("GET", OPEN)) % filled(b"a\r\nb")) == [b"GET", b"a\r\nb"]


def test_a_form_takes_as_many_parts_as_it_leaves_open() -> None:
    shape = form(("HMGET", OPEN, "s", OPEN))
    with pytest.raises(TypeError):
        shape % filled(b"one")
    with pytest.raises(TypeError):
        shape % filled(b"one", b"two", b"three")
