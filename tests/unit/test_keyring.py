"""What is sealed opens with its key, for what it was bound to, and in no other way."""

from __future__ import annotations

import base64

import pytest

from broker.errors import ConfigurationError, NotConfigured
from broker.keyring import Keyring, Rotation, Sealed

OLD, NEW = f"old:{'1a' * 32}", f"new:{'2b' * 32}"
PLAIN = b"a value worth hiding"
BOUND = ("secret", "acme", "version", "NAME")


def test_what_was_sealed_opens_and_shows_nothing_of_itself() -> None:
    ring = Keyring.parse(OLD)
    sealed = ring.seal(PLAIN, *BOUND)
    assert ring.open(sealed, *BOUND) == PLAIN
    assert PLAIN.decode() not in sealed
    assert ring.seal(PLAIN, *BOUND) != sealed


@pytest.mark.parametrize("at", range(len(BOUND)))
def test_a_secret_moved_elsewhere_does_not_open(at: int) -> None:
    ring = Keyring.parse(OLD)
    sealed = ring.seal(PLAIN, *BOUND)
    moved = [*BOUND]
    moved[at] += "x"
    with pytest.raises(ConfigurationError, match="changed or moved"):
        ring.open(sealed, *moved)


def test_parts_that_are_bound_do_not_run_together() -> None:
    ring = Keyring.parse(OLD)
    sealed = ring.seal(PLAIN, "ab", "c")
    with pytest.raises(ConfigurationError):
        ring.open(sealed, "a", "bc")


def test_every_changed_bit_is_noticed() -> None:
    ring = Keyring.parse(OLD)
    head, _, text = ring.seal(PLAIN, *BOUND).rpartition(":")
    raw = base64.urlsafe_b64decode(text)
    for at in range(len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with pytest.raises(ConfigurationError):
            ring.open(f"{head}:{base64.urlsafe_b64encode(changed).decode()}", *BOUND)


@pytest.mark.parametrize(
    "sealed", ["", "1", "1:", "1:old", "1:old:", "1:old:%%%", "1:old:AAAA", "2:old:AAAA", "1:x:AA"]
)
def test_what_we_did_not_write_does_not_open(sealed: str) -> None:
    with pytest.raises(ConfigurationError):
        Keyring.parse(OLD).open(sealed, *BOUND)


def test_the_first_key_seals_and_all_of_them_open() -> None:
    before = Keyring.parse(OLD).seal(PLAIN, *BOUND)
    both = Keyring.parse(f"{NEW},{OLD}")
    assert both.open(before, *BOUND) == PLAIN
    assert both.seal(PLAIN, *BOUND).startswith("1:new:")


def test_rotation_leaves_what_is_current_and_what_does_not_open() -> None:
    both = Keyring.parse(f"{NEW}, {OLD}")
    stale, current = Keyring.parse(OLD).seal(PLAIN, *BOUND), both.seal(PLAIN, *BOUND)
    lost = Keyring.parse(f"lost:{'3c' * 32}").seal(PLAIN, *BOUND)
    given = [
        Sealed(label=label, text=text, bound=BOUND) for label, text in zip("abc", (stale, current, lost), strict=True)
    ]
    texts, counted = both.rotate(given)
    assert counted == Rotation(resealed=1, current=1, unopened=("c",))
    assert texts[1:] == [current, lost]
    assert Keyring.parse(NEW).open(texts[0], *BOUND) == PLAIN


def test_without_a_key_sealing_says_what_to_set() -> None:
    with pytest.raises(NotConfigured, match="FNQUEUE_ENCRYPTION_KEYS"):
        Keyring.parse("").seal(PLAIN, *BOUND)
    with pytest.raises(ConfigurationError, match="FNQUEUE_ENCRYPTION_KEYS"):
        Keyring.parse("").open(Keyring.parse(OLD).seal(PLAIN, *BOUND), *BOUND)


@pytest.mark.parametrize(
    "text", ["x", "a:bb", f"a:{'g' * 64}", f":{'1' * 64}", f"a:{'1' * 62}", f"{OLD},", f"{OLD},{OLD}"]
)
def test_a_bad_ring_is_refused_without_an_echo(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Keyring.parse(text)
    assert "FNQUEUE_ENCRYPTION_KEYS" in str(refused.value)
    assert text[:8] not in str(refused.value) or len(text) < 8


def test_a_ring_shows_the_names_of_its_keys_only() -> None:
    assert repr(Keyring.parse(f"{NEW},{OLD}")) == "Keyring(new, old)"
