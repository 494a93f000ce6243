"""Messages are signed for their version, and nothing that was changed, moved or made elsewhere passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from broker.errors import ConfigurationError
from broker.settings import ApiSettings, ControllerSettings, Settings, SidecarSettings
from broker.signatures import NO_SIGNATURES, NotOurs, Signatures

OURS = Signatures(keys={"k1": b"1" * 32})
SECRET = SecretStr("s" * 32)


def sidecar_of(signatures: Signatures, version_id: str) -> Signatures:
    keys = signatures.for_sidecar(version_id)
    return Signatures.of(SidecarSettings(function_id="f", function_version_id=version_id, message_keys=keys))


@given(envelope=st.binary(max_size=60), body=st.binary(max_size=60), at=st.integers(0), bit=st.integers(0, 7))
def test_every_changed_bit_is_noticed(envelope: bytes, body: bytes, at: int, bit: int) -> None:
    signature = OURS.sign("v", envelope, body)
    OURS.check("v", signature, envelope, body)
    sidecar_of(OURS, "v").check("v", signature, envelope, body)
    message = bytearray(envelope + body or b" ")
    message[at % len(message)] ^= 1 << bit
    with pytest.raises(NotOurs, match="altered"):
        OURS.check("v", signature, bytes(message[: len(envelope)]), bytes(message[len(envelope) :]))


def test_no_byte_moves_between_envelope_and_body() -> None:
    with pytest.raises(NotOurs):
        OURS.check("v", OURS.sign("v", b"ab", b"c"), b"a", b"bc")


def test_a_signature_is_good_for_one_version() -> None:
    for checking in (OURS, sidecar_of(OURS, "w")):
        with pytest.raises(NotOurs):
            checking.check("w", OURS.sign("v", b"e", b""), b"e", b"")
    with pytest.raises(NotOurs):
        OURS.check("w", sidecar_of(OURS, "v").sign("w", b"e", b""), b"e", b"")
    with pytest.raises(NotOurs, match="not known here"):
        sidecar_of(OURS, "v").check("w", OURS.sign("w", b"e", b""), b"e", b"")


@pytest.mark.parametrize("signature", ["", ":", "k1", "k1:", "k1:ü", "other:00", 7, b"k1:00", ["k1"]])
def test_what_is_no_signature_of_ours_is_refused(signature: object) -> None:
    with pytest.raises(NotOurs):
        OURS.check("v", signature, b"e", b"")
    with pytest.raises(NotOurs):
        replace(OURS, lenient=True).check("v", signature, b"e", b"")


def test_what_is_not_signed_passes_only_where_that_is_accepted() -> None:
    with pytest.raises(NotOurs, match="not signed"):
        OURS.check("v", None, b"e", b"")
    replace(OURS, lenient=True).check("v", None, b"e", b"")
    NO_SIGNATURES.check("v", None, b"e", b"")
    assert NO_SIGNATURES.sign("v", b"e", b"") == ""


def test_keys_are_rotated_without_a_message_lost() -> None:
    both = Signatures(keys={"k2": b"2" * 32, "k1": b"1" * 32})
    both.check("v", OURS.sign("v", b"e", b""), b"e", b"")
    sidecar_of(both, "v").check("v", OURS.sign("v", b"e", b""), b"e", b"")
    assert both.sign("v", b"e", b"").startswith("k2:")
    with pytest.raises(NotOurs, match="not known here"):
        OURS.check("v", both.sign("v", b"e", b""), b"e", b"")


def test_front_ends_and_controllers_with_one_secret_have_one_key() -> None:
    front, controller = ApiSettings(secret_key=SECRET), ControllerSettings(secret_key=SECRET)
    signature = Signatures.of(front).sign("v", b"e", b"")
    Signatures.of(controller).check("v", signature, b"e", b"")
    ring = ApiSettings(secret_key=SECRET, signing_keys=SecretStr(f"k:{'ab' * 32}"))
    assert Signatures.of(ring).sign("v", b"e", b"").startswith("k:")
    Signatures.of(ring).check("v", signature, b"e", b"")
    assert not Signatures.of(Settings(secret_key=SECRET))


def test_nothing_shows_a_key() -> None:
    assert "31" * 32 not in repr(OURS)
    with pytest.raises(ConfigurationError) as error:
        Signatures.of(ApiSettings(signing_keys=SecretStr("k:secret")))
    assert "secret" not in str(error.value)
