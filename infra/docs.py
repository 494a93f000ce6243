"""What is made from the code: pages of `docs/`, the dashboard, the alerts for Kubernetes. `python -m infra.docs` writes
them, a test compares them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from broker.settings import ApiSettings, ControllerSettings, Settings, SidecarSettings
from broker.telemetry.metrics import EVERY, OF_THE_PROCESS, REGISTRY, AnyMetric, Histogram, Process
from fnqueue.cli import cli
from infra.dashboards import DASHBOARD, dashboard

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


METRICS = """# Metrics

Every process tells what it does at `/metrics`, in Prometheus' text format, on a port that is not the public one:

| | Port | Address |
|---|---|---|
| `fnqueue api` | `FNQUEUE_STATUS_PORT`, {api} | `FNQUEUE_STATUS_HOST`, {host} |
| `fnqueue controller` | the same, {controller} | the same |
| `fnqueue sidecar` | the same, none unless set, `any` a free one; launchers give theirs one | the same |
| `fnqueue dev` | the controller's; all of it is one process | the same |

There is no key: who comes to the port may read. It listens on this machine alone until `FNQUEUE_STATUS_HOST` says
otherwise, and a process does not start whose status port is its public one. A default port that is taken is gone
without, and the log says `status_port_taken`; one that was set must be free.

**Where sidecars are**, controllers tell: `/v1/targets` of any of them is what Prometheus' `http_sd_configs` reads.
[infra/prometheus](../infra/prometheus/prometheus.yml) has a configuration for one machine, `docker compose --profile
monitoring up` runs it, and Kubernetes has PodMonitors ([component
`monitoring`](../infra/kubernetes/components/monitoring/kustomization.yaml)). The dashboard is
[infra/grafana](../infra/grafana/dashboards/fnqueue.json), the alerts are
[infra/prometheus/alerts.yml](../infra/prometheus/alerts.yml), and what to do about each is in
[operations](operations.md#alerts).

**Several front ends on one port** (`fnqueue api --processes N`) show their own figures each, which Prometheus adds up
([decision 32](decisions/0032-metrics.md)): set `FNQUEUE_STATUS_PORT`, and each has the next one. Only the first to come
has the default one.

**What it costs**: about five microseconds a request, and nothing while nobody looks. A page is written in a thread, one
at a time, about a second of it for 5,000 histograms; who comes within half a second of another gets the same page.

**Labels** are bounded. There is none for requests, accounts and instances; functions and versions are those of the
catalog. What a front end or controller counted of a version goes within ten minutes of its deletion, what a controller
shows of it with the next look, and a sidecar's figures go with it. Names without `fnqueue_` are NVCF's own or
OpenTelemetry's, so that dashboards that are made for those work.

**Zero and blind differ.** Queue depth, in-flight and oldest age come from the controller that leads, and from what it
reads anyway; while it cannot read, `fnqueue_queue_source_available` is 0 and there are no figures of versions at all.

Made from `broker/telemetry/metrics.py` by `make docs`.
"""
ALERTS = DOCS.parent / "infra" / "prometheus" / "alerts.yml"
RULES = DOCS.parent / "infra" / "kubernetes" / "components" / "monitoring" / "rules.yaml"
RULE = """\
# Made of infra/prometheus/alerts.yml by `make docs`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: fnqueue
spec:
  groups:
"""
PROCESSES = {
    Process.API: "Front ends",
    Process.SIDECAR: "Sidecars",
    Process.CONTROLLER: "Controllers",
}


def metrics_page() -> str:
    lines = METRICS.format(
        api=ApiSettings.model_fields["status_port"].default,
        controller=ControllerSettings.model_fields["status_port"].default,
        host=ApiSettings.model_fields["status_host"].default,
    ).splitlines()
    lines += _section("Every process", [metric for metric in REGISTRY if metric.by == EVERY])
    lines += ["", f"And of the process itself: {', '.join(f'`{name}`' for name in OF_THE_PROCESS)}."]
    for process, title in PROCESSES.items():
        lines += _section(title, [metric for metric in REGISTRY if process in metric.by and metric.by != EVERY])
    return "\n".join(lines) + "\n"


def _section(title: str, metrics: Iterable[AnyMetric]) -> list[str]:
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} "
        f"| {metric.help}{' NVCF has it by this name.' if metric.upstream else ''}{_buckets(metric)} |"
        for metric in metrics
    ]
    return ["", f"## {title}", "", "| Name | Type | Labels | Meaning |", "|---|---|---|---|", *rows]


def _buckets(metric: AnyMetric) -> str:
    return f" Up to {', '.join(f'{bound:g}' for bound in metric.buckets)} s." if isinstance(metric, Histogram) else ""


def prometheus_rule() -> str:
    """The alerts as Prometheus' operator takes them."""
    groups = ALERTS.read_text().partition("\ngroups:\n")[2]
    return RULE + "\n".join(f"  {line}" if line else line for line in groups.splitlines()) + "\n"


CLI_HEAD = """\
# The command line

`pip install fnqueue` brings `fnqueue`, for callers and operators alike. Every command but those of the last section
calls a server over HTTP; `fnqueue keys` there does so too, where `FNQUEUE_STORE_URL` is not set:

- **Where and as whom**: `--url` and `--key`, else `FNQUEUE_URL` and `FNQUEUE_API_KEY`, else `url` and `api_key` in
  `~/.config/fnqueue/config.toml` (`FNQUEUE_CONFIG` names another file).
- **For programs**: `--json` prints JSON on standard output, and nothing else. Progress and errors go to standard error.
- **Functions** are given by name or ID, versions and requests by ID; of dead letters and webhooks all are by ID.
- **Errors** are one line on standard error, with the next step where there is one.
- **In a pipe** nothing is coloured or written over, and progress is told line by line. A reader that goes (`| head`)
  ends the command quietly, with 1.
- **Completion**, of the names of functions too: `eval "$(fnqueue completion bash)"` in `~/.bashrc`, the same with
  `zsh` in `~/.zshrc`, or `fnqueue completion fish | source`.

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
    DOCS.joinpath("metrics.md").write_text(metrics_page())
    DASHBOARD.write_text(dashboard())
    RULES.write_text(prometheus_rule())
    DOCS.joinpath("cli.md").write_text(cli_page())


if __name__ == "__main__":
    main()
