"""Which command stands for which container image, when instances are plain processes.

The samples' `images.toml` documents the format; a user's file adds to it and overrides it.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.errors import ConfigurationError

# In a wheel the samples lie inside this package, in a checkout beside it.
_SAMPLES = (Path(__file__).parents[1] / "examples", Path(__file__).parents[2] / "examples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """`folder` is where its file lies: `{examples}` in the command, and the command's working directory."""

    reference: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    folder: Path

    def command_for(self, port: int) -> list[str]:
        return [self._filled(part, port) for part in self.command]

    def environment_for(self, port: int) -> dict[str, str]:
        return {name: self._filled(value, port) for name, value in self.environment}

    def _filled(self, text: str, port: int) -> str:
        text = text.replace("{python}", sys.executable).replace("{examples}", str(self.folder))
        return text.replace("{port}", str(port))


def read_images(user_file: Path | None) -> Mapping[str, Image]:
    """The samples' images and the user's, by reference. Raises ConfigurationError, naming the file."""
    files = [folder / "images.toml" for folder in _SAMPLES if (folder / "images.toml").is_file()][:1]
    if user_file is not None:
        files.append(user_file)
    images: dict[str, Image] = {}
    for file in files:
        images.update(_read(file))
    return images


def find_image(images: Mapping[str, Image], reference: str) -> Image:
    """Raises ConfigurationError, which lists the known ones."""
    try:
        return images[reference]
    except KeyError:
        known = ", ".join(sorted(images)) or "none"
        raise ConfigurationError(
            f"no command is known for the image {reference!r}; known images: {known}. "
            "Add yours to a file named by FNQUEUE_IMAGES_FILE"
        ) from None


def _read(file: Path) -> dict[str, Image]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"images file {file.name}: {exc}") from exc
    return {reference: _image(reference, table, file) for reference, table in tables.items()}


def _image(reference: str, table: Any, file: Path) -> Image:
    where = f"images file {file.name}, [{reference!r}]"
    command = table.get("command") if isinstance(table, dict) else None
    if not isinstance(command, list) or not command or not all(isinstance(part, str) for part in command):
        raise ConfigurationError(f"{where}: command must be a list of at least one string")
    environment = table.get("env", {})
    if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
        raise ConfigurationError(f"{where}: env must be a table of strings")
    return Image(
        reference=reference,
        command=tuple(command),
        environment=tuple(environment.items()),
        folder=file.parent.resolve(),
    )
