"""Signatures of messages: what is in the queue was put there by a front end of ours, and nobody changed it since.

Every version has keys of its own, derived from the deployment's. A front end and a controller know the deployment's
and so sign and check for every version; a sidecar is given its version's and can forge nothing for another one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

from pydantic import SecretStr

from broker.keyring import parse_keys
from broker.settings import SecretSettings, Settings, SidecarSettings

_OF_A_VERSION = b"fnqueue/message/1"
_OF_THE_SECRET_KEY = b"fnqueue/signing-key/1"
# Names the key that is derived from `secret_key`.
_SECRET_KEY = "secret-key"  # noqa: S105  a name
_MAC_BYTES = 32


class NotOurs(ValueError):
    """A message that this deployment did not sign as it is; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signatures:
    """Keys by id, in order: the first signs, all are good. Without any, nothing is signed and everything accepted.

    `version_id` "" means that `keys` are the deployment's, from which those of any version follow. `lenient` accepts
    what carries no signature at all.
    """

    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    version_id: str = ""
    lenient: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those that the settings name. Raises ConfigurationError."""
        lenient = settings.unsigned_messages == "accept"
        if isinstance(settings, SidecarSettings):
            keys = parse_keys("FNQUEUE_MESSAGE_KEYS", settings.message_keys.get_secret_value())
            return cls(keys=keys, version_id=settings.function_version_id, lenient=lenient)
        if not isinstance(settings, SecretSettings):
            return cls()
        keys = parse_keys("FNQUEUE_SIGNING_KEYS", settings.signing_keys.get_secret_value())
        if secret := settings.secret_key.get_secret_value():
            keys.setdefault(_SECRET_KEY, hmac.digest(secret.encode(), _OF_THE_SECRET_KEY, hashlib.sha256))
        return cls(keys=keys, lenient=lenient)

    def __bool__(self) -> bool:
        return bool(self.keys)

    def for_sidecar(self, version_id: str) -> SecretStr:
        """The `message_keys` of the version's sidecars."""
        return SecretStr(",".join(f"{name}:{self._key(name, version_id).hex()}" for name in self.keys))

    def sign(self, version_id: str, envelope: bytes, body: bytes) -> str:
        """`<key id>:<hex>`; '' without a key. Microseconds, and a millisecond for a MiB."""
        name = next(iter(self.keys), "")
        return f"{name}:{_mac(self._key(name, version_id), envelope, body)}" if name else ""

    def check(self, version_id: str, signature: object, envelope: bytes, body: bytes) -> None:
        """Raises NotOurs unless `sign` made the signature for the same version, envelope and body."""
        if not self.keys:
            return
        if signature is None:
            if self.lenient:
                return
            raise NotOurs("it is not signed")
        name, _, mac = signature.partition(":") if isinstance(signature, str) else ("", "", "")
        if name not in self.keys or version_id != (self.version_id or version_id):
            raise NotOurs("it is signed with a key that is not known here")
        if not hmac.compare_digest(mac.encode(), _mac(self._key(name, version_id), envelope, body).encode()):
            raise NotOurs("it was altered after it was signed")

    def _key(self, name: str, version_id: str) -> bytes:
        key = self.keys[name]
        return key if self.version_id else _key_of(key, version_id)


NO_SIGNATURES = Signatures()


@lru_cache(maxsize=1024)
def _key_of(key: bytes, version_id: str) -> bytes:
    return hmac.digest(key, _OF_A_VERSION + version_id.encode(), hashlib.sha256)


def _mac(key: bytes, envelope: bytes, body: bytes) -> str:
    # The length keeps a byte from moving between the two unnoticed.
    mac = hashlib.blake2b(len(envelope).to_bytes(8, "big"), key=key, digest_size=_MAC_BYTES)
    mac.update(envelope)
    mac.update(body)
    return mac.hexdigest()
