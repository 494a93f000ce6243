"""Pages of `docs/` that are made from the code: `python -m infra.docs` writes them, a test compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from broker.settings import ApiSettings, ControllerSettings, Settings, SidecarSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"

SECTIONS: tuple[tuple[str, type[Settings]], ...] = (
    ("Every process", Settings),
    ("`fnqueue api` and `fnqueue dev`", ApiSettings),
    ("`fnqueue controller` and `fnqueue dev`", ControllerSettings),
    ("`fnqueue sidecar`", SidecarSettings),
)


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Read from the environment when a process starts; a value that is not valid is one clear line and exit code 2.",
        "Names that end in `_S` are seconds, `_BYTES` bytes. Made from `broker/settings.py` by `make docs`.",
    ]
    for title, kind in SECTIONS:
        inherited = set(Settings.model_fields) if kind is not Settings else set()
        lines += ["", f"## {title}", "", "| Name | Default | Range | Meaning |", "|---|---|---|---|"]
        lines += [_row(name, field) for name, field in kind.model_fields.items() if name not in inherited]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    names = [f"FNQUEUE_{name.upper()}"]
    if isinstance(field.validation_alias, AliasChoices):
        names += [str(alias) for alias in field.validation_alias.choices if str(alias) not in (name, *names)]
    cells = (
        " or ".join(f"`{each}`" for each in names),
        _default(field.default),
        _range(field.metadata),
        (field.description or "").replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return f"`{value}`" if value not in ("", None) else ""


def _range(limits: list[Any]) -> str:
    bounds = {word: getattr(limit, word) for limit in limits for word in ("gt", "ge", "le") if hasattr(limit, word)}
    shown = [f"> {bounds['gt']}"] if "gt" in bounds else [f"≥ {bounds['ge']}"] if "ge" in bounds else []
    return ", ".join([*shown, f"≤ {bounds['le']}"] if "le" in bounds else shown)


def main() -> None:
    DOCS.joinpath("settings.md").write_text(settings_page())


if __name__ == "__main__":
    main()
