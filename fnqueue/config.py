"""Where the server is, and with which key it is called."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fnqueue.errors import ConfigurationError

DEFAULT_URL = "http://127.0.0.1:8080"
KEY_VARIABLES = ("FNQUEUE_API_KEY", "FNQUEUE_ADMIN_KEY", "FNQUEUE_KEY")
_NAMES = frozenset({"url", "api_key"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`url` has no slash at its end."""

    url: str
    key: str = field(repr=False)


def load(url: str | None = None, key: str | None = None, *, environ: Mapping[str, str] | None = None) -> Config:
    """What is given, else the environment (FNQUEUE_URL, FNQUEUE_API_KEY), else the configuration file.

    The file is TOML with `url` and `api_key`: that which FNQUEUE_CONFIG names, or `fnqueue/config.toml` in
    XDG_CONFIG_HOME (`~/.config`), where there is one.

    Raises: ConfigurationError.
    """
    environ = os.environ if environ is None else environ
    path = _path(environ)
    filed = _read(path, asked="FNQUEUE_CONFIG" in environ)
    found_key = key or next((environ[name] for name in KEY_VARIABLES if environ.get(name)), "") or filed.get("api_key")
    if not found_key:
        raise ConfigurationError(
            f'no API key: give one (`key`, --key), set FNQUEUE_API_KEY, or write api_key = "…" into {path}'
        )
    if not found_key.isascii() or not found_key.isprintable() or " " in found_key:
        raise ConfigurationError("the API key cannot be sent: it has blanks or other characters that no key has")
    return Config(url=_checked(url or environ.get("FNQUEUE_URL") or filed.get("url") or DEFAULT_URL), key=found_key)


def _path(environ: Mapping[str, str]) -> Path:
    if "FNQUEUE_CONFIG" in environ:
        return Path(environ["FNQUEUE_CONFIG"])
    home = environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "fnqueue" / "config.toml"


def _read(path: Path, *, asked: bool) -> dict[str, str]:
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if asked:
            raise ConfigurationError(f"FNQUEUE_CONFIG names {path}, and there is no such file") from None
        return {}
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    strange = [name for name, value in found.items() if name not in _NAMES or not isinstance(value, str)]
    if strange:
        raise ConfigurationError(f"{path}: {strange[0]} is unknown or no string; known are {', '.join(sorted(_NAMES))}")
    return found


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError(f"{url!r} is not a server's URL: write https://host or http://host:port")
    return url.rstrip("/")
