"""The RabbitMQ user of a version's sidecars: its name and password follow from the version, so nothing is stored."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit, urlunsplit

from pydantic import SecretStr

from broker.errors import ConfigurationError
from broker.settings import ControllerSettings
from broker.signatures import Signatures

_OF_A_VERSION = b"fnqueue/version-user/1"


def name_of(version_id: str) -> str:
    return f"fnqueue-v-{version_id}"


def password_of(settings: ControllerSettings, version_id: str) -> str:
    """The same on every controller; 64 hex digits. It changes with the last of the signing keys, or with `secret_key`
    where there is one.

    Raises:
        ConfigurationError: there is neither.
    """
    keys = tuple(Signatures.of(settings).keys.values())
    if not keys:
        raise ConfigurationError("FNQUEUE_VERSION_USERS needs FNQUEUE_SECRET_KEY or FNQUEUE_SIGNING_KEYS")
    # A new signing key is put behind the others first, and then all instances are replaced: that is when it may change.
    return hmac.digest(keys[-1], _OF_A_VERSION + version_id.encode(), hashlib.sha256).hex()


def url_for(settings: ControllerSettings, version_id: str, url: SecretStr) -> SecretStr:
    """`url` with that user in place of its own. Raises ConfigurationError."""
    parts = urlsplit(url.get_secret_value())
    place = parts.netloc.rpartition("@")[2]
    user = f"{name_of(version_id)}:{password_of(settings, version_id)}"
    return SecretStr(urlunsplit(parts._replace(netloc=f"{user}@{place}")))
