"""Pages of `docs/` that are made from the code: `python -m infra.docs` writes them, a test compares them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from broker.settings import ApiSettings, ControllerSettings, Settings, SidecarSettings
from fnqueue.cli import cli

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
        "Tracing has [OpenTelemetry's own variables](tracing.md#settings), and [the client](client.md) has others.",
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


CLI_HEAD = """\
# The command line

`pip install fnqueue` brings `fnqueue`, for callers and operators alike. Every command but those of the last section
calls a server over HTTP:

- **Where and as whom**: `--url` and `--key`, else `FNQUEUE_URL` and `FNQUEUE_API_KEY`, else `url` and `api_key` in
  `~/.config/fnqueue/config.toml` (`FNQUEUE_CONFIG` names another file).
- **For programs**: `--json` prints JSON on standard output, and nothing else. Progress and errors go to standard error.
- **Functions** are given by name or ID, versions and requests by ID.
- **Completion**: `eval "$(fnqueue completion bash)"` in `~/.bashrc`, the same with `zsh` in `~/.zshrc`, or
  `fnqueue completion fish | source`.

| Exit status | Means |
|---|---|
| 0 | done |
| 1 | it failed: nothing answers, there is no such thing, or the key does not cover it |
| 2 | what was typed or set is wrong; the message names the option or the field |
| 3 | the request ended without a result, or the deployment cannot run |
| 4 | it is not over, and `--timeout` is; it goes on |
| 130 | interrupted; what was begun goes on |

From nothing to an answer, on a server such as `fnqueue dev`:

```sh
fnqueue functions create hello --image fnqueue/echo:latest --inference-url /echo --health-url /health
fnqueue deploy hello
fnqueue invoke hello -d '{"message": "hi"}' --watch
fnqueue top --count 1
fnqueue undeploy hello
fnqueue functions delete hello --all
```

What follows is made from the commands themselves by `make docs`, without `--url`, `--key`, `--json` and `--help`.
"""
# What the head of the page tells of all of them.
_EVERYWHERE = ("--url", "--key", "--json", "-h", "--help")
# Of a server's own machine or cluster, by its settings.
SERVER_COMMANDS = ("api", "controller", "dev", "doctor", "keys", "secrets", "sidecar")


def cli_page() -> str:
    root = click.Context(cli, info_name="fnqueue")
    names = cli.list_commands(root)
    parts = [CLI_HEAD]
    for title, chosen in (
        ("For callers", [name for name in names if name not in SERVER_COMMANDS]),
        ("For operators", [name for name in names if name in SERVER_COMMANDS]),
    ):
        parts.append(f"## {title}\n")
        for name in chosen:
            command = cli.get_command(root, name)
            assert command is not None
            parts += _commands(command, root, name)
    return "\n".join(parts)


def _commands(command: click.Command, parent: click.Context, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"### {context.command_path}\n\n    {usage}\n\n{_paragraphs(command.help or '')}\n"
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    records = (option.get_help_record(context) for option in options if option.opts[0] not in _EVERYWHERE)
    rows = [f"| `{_cell(names)}` | {_cell(told)} |" for names, told in filter(None, records)]
    if rows:
        yield "\n".join(["| Option | |", "|---|---|", *rows, ""])
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from _commands(found, context, each)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    DOCS.joinpath("settings.md").write_text(settings_page())
    DOCS.joinpath("cli.md").write_text(cli_page())


if __name__ == "__main__":
    main()
