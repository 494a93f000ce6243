"""The Grafana dashboard, as a list of panels: `python -m infra.docs` writes it, a test compares it, and another one
runs every query against a real product."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent / "grafana" / "dashboards" / "fnqueue.json"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_STAT_WIDTH, _STAT_HEIGHT = 4, 4

# What a version is called, beside its ID.
_NAMED = (
    "* on (function_version_id) group_left (function_name) "
    "max by (function_version_id, function_name) (nvcf_function_info)"
)
_CHOSEN = 'function_version_id=~"$version"'


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` names labels as Grafana does, {{so}}."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """`kind` is `timeseries` or `stat`; `unit` is Grafana's. `red_from` is where a stat is red, None: nowhere."""

    title: str
    about: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    red_from: float | None = None
    stacked: bool = False


def _quantiles(metric: str, by: str = "") -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{by}}}[$__rate_interval])))",
            f"p{share * 100:g}",
        )
        for share in (0.5, 0.9, 0.99)
    )


def _rate(metric: str, label: str, selector: str = "") -> tuple[Query, ...]:
    return (Query(f"sum by ({label}) (rate({metric}{{{selector}}}[$__rate_interval]))", f"{{{{{label}}}}}"),)


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "At a glance",
        (
            Panel("Waiting", "Requests that no worker has begun.", (Query("sum(fnqueue_queue_depth)"),), kind="stat"),
            Panel("Running", "Requests that a worker has.", (Query("sum(fnqueue_requests_running)"),), kind="stat"),
            Panel(
                "Oldest",
                "How long the request has waited that waits longest.",
                (Query("max(fnqueue_queue_oldest_age_seconds)"),),
                unit="s",
                kind="stat",
                red_from=900,
            ),
            Panel(
                "Slots busy",
                "Of the slots of all instances that are ready.",
                (Query("sum(fnqueue_version_slots_busy) / sum(fnqueue_version_slots)"),),
                unit="percentunit",
                kind="stat",
            ),
            Panel(
                "Servers away",
                "Whether RabbitMQ, Redis or the blob store is away for any process.",
                (Query("count(max by (server) (fnqueue_server_breaker_open) == 1) or vector(0)"),),
                kind="stat",
                red_from=1,
            ),
            Panel(
                "Blind",
                "1 if the controller cannot read how much work there is: then the first four are not known.",
                (Query("1 - min(fnqueue_queue_source_available)"),),
                kind="stat",
                red_from=1,
            ),
        ),
    ),
    (
        "Requests",
        (
            Panel(
                "Accepted and ended",
                "Invocations a second, and how requests ended.",
                (
                    Query(f"sum(rate(function_request_total{{{_CHOSEN}}}[$__rate_interval]))", "accepted"),
                    *_rate("fnqueue_requests_ended_total", "state", _CHOSEN),
                ),
                unit="reqps",
            ),
            Panel(
                "Wait",
                "From acceptance until the first attempt began.",
                _quantiles("fnqueue_request_wait_seconds", _CHOSEN),
                unit="s",
            ),
            Panel("Run", "Attempts in the container.", _quantiles("fnqueue_request_run_seconds", _CHOSEN), unit="s"),
            Panel(
                "Waiting, by function",
                "Requests that no worker has begun.",
                (
                    Query(
                        f"sum by (function_version_id) (fnqueue_queue_depth{{{_CHOSEN}}}) {_NAMED}", "{{function_name}}"
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Oldest, by function",
                "How long the request has waited that waits longest.",
                (
                    Query(
                        f"max by (function_version_id) (fnqueue_queue_oldest_age_seconds{{{_CHOSEN}}}) {_NAMED}",
                        "{{function_name}}",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Running, by function",
                "Requests that a worker has.",
                (
                    Query(
                        f"sum by (function_version_id) (fnqueue_requests_running{{{_CHOSEN}}}) {_NAMED}",
                        "{{function_name}}",
                    ),
                ),
                stacked=True,
            ),
        ),
    ),
    (
        "Front ends",
        (
            Panel(
                "HTTP by status",
                "499: the client left.",
                _rate("http_server_request_duration_seconds_count", "http_response_status_code"),
                unit="reqps",
            ),
            Panel(
                "Invocations, as upstream measures them",
                "Of accepted invocations, from the head to the last byte of the answer.",
                _quantiles("function_request_latency", _CHOSEN),
                unit="s",
            ),
            Panel(
                "Refused",
                "Requests for which there was no room or no server, by reason.",
                _rate("fnqueue_refusals_total", "reason"),
                unit="reqps",
            ),
            Panel(
                "Who is here",
                "Connections, callers that are held, listeners and channels.",
                (
                    Query("sum(fnqueue_http_connections)", "connections"),
                    Query("sum(fnqueue_waiting_callers)", "held callers"),
                    Query("sum(fnqueue_event_streams)", "listeners"),
                    Query("sum(fnqueue_channels)", "channels"),
                ),
            ),
            Panel(
                "Bodies in memory",
                "Of requests that are being accepted.",
                (Query("sum by (instance) (fnqueue_inflight_body_bytes)", "{{instance}}"),),
                unit="bytes",
            ),
            Panel(
                "Slowest routes",
                "p99 of the ten slowest routes but for those that hold their callers.",
                (
                    Query(
                        "topk(10, histogram_quantile(0.99, sum by (le, http_route) (rate("
                        'http_server_request_duration_seconds_bucket{http_route!~".*(pexec|exec|events).*|.function."}'
                        "[$__rate_interval]))))",
                        "{{http_route}}",
                    ),
                ),
                unit="s",
            ),
        ),
    ),
    (
        "Workers",
        (
            Panel(
                "Slots",
                "Of the instances that are ready.",
                (
                    Query(f"sum(fnqueue_version_slots{{{_CHOSEN}}})", "there"),
                    Query(f"sum(fnqueue_version_slots_busy{{{_CHOSEN}}})", "busy"),
                ),
            ),
            Panel(
                "Instances",
                "That report themselves, by state.",
                (Query(f"sum by (state) (fnqueue_instances{{{_CHOSEN}}})", "{{state}}"),),
                stacked=True,
            ),
            Panel(
                "Cold starts",
                "How long an instance took to become ready, and requests to find one.",
                (
                    Query(
                        "histogram_quantile(0.9, sum by (le) (rate("
                        f"fnqueue_instance_start_seconds_bucket{{{_CHOSEN}}}[$__rate_interval])))",
                        "instances, p90",
                    ),
                    Query(
                        "histogram_quantile(0.9, sum by (le) (rate("
                        f"fnqueue_cold_start_seconds_bucket{{{_CHOSEN}}}[$__rate_interval])))",
                        "requests, p90",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Attempts by end",
                "`failed`: the container was lost; `returned`: at no cost; `lost`: another one took over.",
                _rate("fnqueue_attempts_total", "end", _CHOSEN),
                unit="ops",
            ),
            Panel(
                "Time of a slot",
                "What slots are busy with, in slots.",
                tuple(
                    Query(f"sum(rate(nvcf_worker_service_{part}_seconds_total{{{_CHOSEN}}}[$__rate_interval]))", legend)
                    for part, legend in (
                        ("pre_inference", "inputs"),
                        ("inference_request_time", "container"),
                        ("post_inference", "storing results"),
                        ("worker_thread_busy", "all"),
                    )
                ),
            ),
            Panel(
                "GPUs",
                "Instances of each type that fit when nothing else runs.",
                (Query("max by (instance_type, backend) (fnqueue_gpu_capacity_instances)", "{{instance_type}}"),),
            ),
        ),
    ),
    (
        "Nothing is lost",
        (
            Panel(
                "Conservation",
                "By the auditor's last pass: accepted = queued + running + done + dead.",
                (Query("max by (state) (fnqueue_audit_requests)", "{{state}}"),),
            ),
            Panel(
                "Dead letters by cause",
                "Requests that died.",
                (Query("sum by (cause) (increase(fnqueue_dead_letters_total[$__rate_interval]))", "{{cause}}"),),
            ),
            Panel(
                "Mended",
                "What the auditor put right.",
                (Query("sum by (what) (increase(fnqueue_audit_mended_total[$__rate_interval]))", "{{what}}"),),
            ),
        ),
    ),
    (
        "Webhooks",
        (
            Panel(
                "Tries by answer",
                "What receivers said; `none`: nothing, or they could not be reached.",
                _rate("fnqueue_webhook_tries_total", "answer"),
                unit="ops",
            ),
            Panel(
                "Done with",
                "`failed`: given up. The results are there all the same.",
                _rate("fnqueue_webhooks_total", "state", _CHOSEN),
                unit="ops",
            ),
            Panel(
                "Time to deliver",
                "From the end of a request until its receiver had the webhook.",
                _quantiles("fnqueue_webhook_delivery_seconds"),
                unit="s",
            ),
            Panel(
                "Due",
                "Taken by no controller yet.",
                (Query("max(fnqueue_webhooks_due)", "webhooks"),),
            ),
            Panel(
                "Oldest due",
                "More than seconds: there are too few controllers, or receivers are slow.",
                (Query("max(fnqueue_webhooks_due_age_seconds)", "age"),),
                unit="s",
            ),
        ),
    ),
    (
        "Processes",
        (
            Panel(
                "Event loop lag, p99",
                "How late a process comes to what is due.",
                (
                    Query(
                        "histogram_quantile(0.99, sum by (le, job, instance) (rate("
                        "fnqueue_event_loop_lag_seconds_bucket[$__rate_interval])))",
                        "{{job}} {{instance}}",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "CPU",
                "Cores.",
                (
                    Query(
                        'sum by (job) (rate(process_cpu_seconds_total{job=~"fnqueue-.+"}[$__rate_interval]))', "{{job}}"
                    ),
                ),
            ),
            Panel(
                "Memory",
                "Resident.",
                (Query('sum by (job) (process_resident_memory_bytes{job=~"fnqueue-.+"})', "{{job}}"),),
                unit="bytes",
            ),
            Panel(
                "Connections made",
                "To the queue and the store. After the start, these are reconnects.",
                (
                    Query(
                        "sum by (job, server) (increase(fnqueue_server_connections_total[$__rate_interval]))",
                        "{{job}} {{server}}",
                    ),
                ),
            ),
            Panel(
                "Servers away",
                "Breakers that are open.",
                (Query("sum by (server) (fnqueue_server_breaker_open)", "{{server}}"),),
            ),
            Panel(
                "Versions",
                "Of fnqueue, by number of processes.",
                (Query("count by (version, python) (fnqueue_build_info)", "{{version}}, Python {{python}}"),),
            ),
        ),
    ),
)


def panels() -> list[Panel]:
    return [panel for _, row in ROWS for panel in row]


def dashboard() -> str:
    """As Grafana reads it."""
    document = {
        "uid": "fnqueue",
        "title": "fnqueue",
        "description": "Requests, workers and processes. The metrics: docs/metrics.md.",
        "tags": ["fnqueue"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _version()]},
        "panels": _placed(),
    }
    return json.dumps(document, indent=1) + "\n"


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _version() -> dict[str, Any]:
    return {
        "name": "version",
        "label": "Function version",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": "label_values(nvcf_function_info, function_version_id)", "refId": "version"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed() -> list[dict[str, Any]]:
    placed: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        placed.append(
            {
                "id": len(placed) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
            }
        )
        y += 1
        width, height = _size(row)
        for at, panel in enumerate(row):
            x, down = at * width % _COLUMNS, at * width // _COLUMNS * height
            placed.append(_panel(panel, len(placed) + 1, {"x": x, "y": y + down, "w": width, "h": height}))
        y += -(-len(row) * width // _COLUMNS) * height
    return placed


def _size(row: Sequence[Panel]) -> tuple[int, int]:
    return (_STAT_WIDTH, _STAT_HEIGHT) if row[0].kind == "stat" else (_WIDTH, _HEIGHT)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "stat":
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if panel.red_from is not None:
            steps.append({"color": "red", "value": panel.red_from})
        defaults |= {"thresholds": {"mode": "absolute", "steps": steps}, "noValue": "unknown"}
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    else:
        stacking = {"mode": "normal" if panel.stacked else "none"}
        defaults["custom"] = {"fillOpacity": 25 if panel.stacked else 0, "stacking": stacking, "showPoints": "never"}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for at, query in enumerate(panel.queries)
        ],
    }
