"""Seals small secrets with AES-256-GCM: the first key of the ring seals, every key of it opens.

A sealed secret is `1:<key id>:<base64url of nonce and ciphertext>`. What it belongs to is bound into it as associated
data: moved to another account, version or name, it does not open. A nonce is 96 random bits, which is safe for far
more secrets per key than a store holds.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from broker.errors import ConfigurationError, NotConfigured

SETTING = "FNQUEUE_ENCRYPTION_KEYS"

_FORMAT = "1"
_NONCE_BYTES = 12
_KEY = re.compile(r"([A-Za-z0-9_.-]{1,32}):([0-9A-Fa-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A sealed secret and what it is bound to; `label` names it to an operator."""

    label: str
    text: str
    bound: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How many were sealed again, how many were under the first key already; `unopened` names those that no key of
    the ring opens, which were left as they are."""

    resealed: int = 0
    current: int = 0
    unopened: tuple[str, ...] = ()

    def __add__(self, other: Rotation) -> Rotation:
        return Rotation(
            resealed=self.resealed + other.resealed,
            current=self.current + other.current,
            unopened=self.unopened + other.unopened,
        )


def parse_keys(setting: str, text: str) -> dict[str, bytes]:
    """Keys by id, in order, of `id:hex,id:hex`, each 64 hex digits; '' for none. Raises ConfigurationError, which
    names the setting and echoes nothing."""
    keys: dict[str, bytes] = {}
    for number, part in enumerate(text.split(",") if text.strip() else [], 1):
        found = _KEY.fullmatch(part.strip())
        if found is None:
            raise ConfigurationError(
                f"{setting}: key {number} is not of the form id:hex with 64 hex digits; "
                "make one with: openssl rand -hex 32"
            )
        if found[1] in keys:
            raise ConfigurationError(f"{setting}: key {number} has the id of an earlier one")
        keys[found[1]] = bytes.fromhex(found[2])
    return keys


class Keyring:
    """Keys by id, in order. One without keys opens and seals nothing."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}

    @classmethod
    def parse(cls, text: str) -> Self:
        """`id:hex,id:hex`, each key 64 hex digits; '' for no keys. Raises ConfigurationError, which echoes nothing."""
        return cls(parse_keys(SETTING, text))

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._ciphers)})"

    def seal(self, plain: bytes, *bound: str) -> str:
        """Raises NotConfigured when there is no key."""
        if not self._ciphers:
            raise NotConfigured(
                f"this server keeps no secrets: its operator has to set {SETTING}=id:hex, "
                "with a key from: openssl rand -hex 32"
            )
        key_id, cipher = next(iter(self._ciphers.items()))
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + cipher.encrypt(nonce, plain, _bound(bound))
        return f"{_FORMAT}:{key_id}:{base64.urlsafe_b64encode(sealed).decode()}"

    def open(self, sealed: str, *bound: str) -> bytes:
        """What was sealed with the same `bound`. Raises ConfigurationError: its key is not here, or it was changed."""
        version, _, rest = sealed.partition(":")
        key_id, _, text = rest.partition(":")
        if version != _FORMAT:
            raise ConfigurationError("a stored secret was written by another release")
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise ConfigurationError(f"a stored secret needs the key {key_id[:32]!r}, which is not in {SETTING}")
        try:
            raw = base64.urlsafe_b64decode(text)
            return cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _bound(bound))
        except (InvalidTag, ValueError) as exc:
            raise ConfigurationError(
                f"a stored secret does not open with the key {key_id[:32]!r}: it was changed or moved, or the key was"
            ) from exc

    def rotate(self, secrets: Iterable[Sealed]) -> tuple[list[str], Rotation]:
        """The same secrets, in order, each under the first key if it can be opened."""
        texts, total = [], Rotation()
        for secret in secrets:
            text, counted = self._rotated(secret)
            texts.append(text)
            total += counted
        return texts, total

    def _rotated(self, secret: Sealed) -> tuple[str, Rotation]:
        if secret.text.startswith(f"{_FORMAT}:{next(iter(self._ciphers), '')}:"):
            return secret.text, Rotation(current=1)
        try:
            plain = self.open(secret.text, *secret.bound)
        except ConfigurationError:
            return secret.text, Rotation(unopened=(secret.label,))
        return self.seal(plain, *secret.bound), Rotation(resealed=1)


def _bound(parts: tuple[str, ...]) -> bytes:
    return orjson.dumps(parts)
