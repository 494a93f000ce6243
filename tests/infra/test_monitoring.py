"""Dashboard, alerts and scrape configurations: made of what there is, right by promtool, and true of a real product."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from broker.settings import ApiSettings, ControllerSettings
from broker.telemetry.metrics import OF_THE_PROCESS, REGISTRY, Histogram
from infra import docs
from infra.dashboards import DASHBOARD, dashboard, panels
from infra.local import binaries
from tests.kubernetes_api import SCHEMAS

INFRA = Path(__file__).parents[2] / "infra"
PROMETHEUS = INFRA / "prometheus"
COMPONENT = INFRA / "kubernetes" / "components" / "monitoring"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
CASES = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
CONFIGURATIONS = ("prometheus.yml", "compose.yml")

# What Prometheus itself says of a target.
_ITS_OWN = {"up"}
_LABELS = {label for metric in REGISTRY for label in metric.labels}
_WORDS = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_OURS = re.compile(r"(?:fnqueue|nvcf|function|app|http|process)_")


def names_in(expression: str) -> set[str]:
    """The metrics that it asks for: what is quoted is no name."""
    words = set(_WORDS.findall(re.sub(r'"[^"]*"', '""', expression)))
    return {word for word in words - _LABELS if _OURS.match(word)}


def exposed() -> set[str]:
    names = {metric.name for metric in REGISTRY if not isinstance(metric, Histogram)} | set(OF_THE_PROCESS)
    for metric in REGISTRY:
        if isinstance(metric, Histogram):
            names |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
    return names


def promtool(*arguments: str) -> str:
    binaries.ensure(binaries.MONITORING)
    done = subprocess.run(
        [str(binaries.program("promtool")), *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_is_made_of_the_code_is_what_the_code_says() -> None:
    assert DASHBOARD.read_text() == dashboard(), "run: make docs"
    assert docs.RULES.read_text() == docs.prometheus_rule(), "run: make docs"


def test_every_metric_that_a_panel_or_an_alert_names_is_in_the_registry() -> None:
    asked = [query.expression for panel in panels() for query in panel.queries]
    asked += [rule["expr"] for rule in ALERTS]
    named = set().union(*map(names_in, asked))
    assert len(named) > 30
    assert named - exposed() == set()


def test_a_name_that_is_wrong_would_be_seen() -> None:
    assert names_in('sum by (function_id) (rate(fnqueue_waits_total{http_route="fnqueue_x"}[5m]))') == {
        "fnqueue_waits_total"
    }


def test_the_dashboard_has_no_panel_twice_and_every_panel_says_what_it_shows() -> None:
    document = json.loads(DASHBOARD.read_text())
    shown = [panel for panel in document["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in shown)
    corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in document["panels"]]
    assert len(set(corners)) == len(corners)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in document["panels"])


def test_alerts_and_configurations_are_right_by_promtool() -> None:
    assert "SUCCESS" in promtool("check", "rules", "alerts.yml")
    for name in CONFIGURATIONS:
        assert "SUCCESS" in promtool("check", "config", name)
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml")


def test_each_alert_fires_in_a_test_and_leads_to_a_runbook() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    assert {case["alertname"] for test in CASES for case in test["alert_rule_test"]} == set(names)
    headings = re.findall(r"^#### (\w+)$", (docs.DOCS / "operations.md").read_text(), re.MULTILINE)
    assert headings == names, "one section each, in the order of the alerts"
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_kind_of_process_is_scraped_where_it_listens(name: str) -> None:
    text = (PROMETHEUS / name).read_text()
    jobs: dict[str, Any] = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    assert list(jobs) == ["fnqueue-api", "fnqueue-controller", "fnqueue-sidecar"]
    api, controller = (kind.model_fields["status_port"].default for kind in (ApiSettings, ControllerSettings))
    assert str(api) in json.dumps(jobs["fnqueue-api"])
    assert str(controller) in json.dumps(jobs["fnqueue-controller"])
    (discovery,) = jobs["fnqueue-sidecar"]["http_sd_configs"]
    assert discovery["url"].endswith(f":{controller}/v1/targets")
    compose = yaml.safe_load((INFRA.parent / "docker-compose.yml").read_text())["services"]
    told = {service: compose[service]["environment"]["FNQUEUE_STATUS_PORT"] for service in ("api", "controller")}
    assert told == {"api": str(api), "controller": str(controller)}


def test_in_kubernetes_prometheus_finds_the_status_ports_and_comes_to_nothing_else(tmp_path: Path) -> None:
    binaries.ensure(["kubectl"])
    root = INFRA / "kubernetes"
    up = "/".join([".."] * len(tmp_path.parts[1:]))
    bases = {"resources": [f"{up}{root}/base"], "components": [f"{up}{COMPONENT}", f"{up}{root}/components/namespace"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(bases))
    command = [str(binaries.program("kubectl")), "kustomize", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    ours = [item for item in objects if item["apiVersion"] == "monitoring.coreos.com/v1"]
    assert [item["kind"] for item in ours].count("PodMonitor") == 3
    assert {item["metadata"]["namespace"] for item in ours} == {"fnqueue"}
    (rules,) = [item for item in ours if item["kind"] == "PrometheusRule"]
    assert rules["spec"]["groups"][0]["rules"] == ALERTS
    policies = [
        item for item in objects if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] == "prometheus"
    ]
    assert {item["metadata"]["namespace"] for item in policies} == {"fnqueue", "fnqueue-functions"}
    for policy in policies:
        kubernetes_validate.validate(policy, SCHEMAS, strict=True)
        assert [port for rule in policy["spec"]["ingress"] for port in rule["ports"]] == [{"port": "status"}]
    pods = [item["spec"]["template"] for item in objects if item["kind"] == "Deployment"]
    for monitor in ours:
        wanted = monitor["spec"].get("selector", {}).get("matchLabels", {})
        if "app.kubernetes.io/component" in wanted:
            (pod,) = [each for each in pods if wanted.items() <= each["metadata"]["labels"].items()]
            ports = {port["name"] for each in pod["spec"]["containers"] for port in each["ports"]}
            assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports
