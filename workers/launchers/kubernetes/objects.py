"""What the API server is given for one GPU specification. Pure: the same arguments, the same manifests.

The order in which a pod ends is what these are made around. The sidecar is a native one, and Kubernetes ends those
last: the inference container would be told to stop in the middle of its jobs. So both containers have a hook that
asks the sidecar to drain, the kubelet calls the hooks of all containers first, and no container is told to stop before
its own has answered.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from broker.errors import ConfigurationError
from broker.model import GpuSpecification, Login, Version
from broker.settings import ControllerSettings, SidecarSettings
from broker.telemetry import tracing
from workers.launchers.cards import CPU, card_count, instance_type
from workers.launchers.instances import artifacts, container_arguments, container_variables, sidecar_settings

Manifest = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
VERSION = "fnqueue.dev/version-id"
FUNCTION = "fnqueue.dev/function-id"
SPECIFICATION = "fnqueue.dev/specification-id"
PRODUCTS = "fnqueue.dev/gpu-products"
SELECTOR: dict[str, Any] = {MANAGED_BY: "fnqueue"}

CONTAINER_NAME, SIDECAR_NAME = "inference", "sidecar"

GPU_RESOURCE = "nvidia.com/gpu"
PRODUCT = "nvidia.com/gpu.product"
NODE_TYPE = "node.kubernetes.io/instance-type"
# Of two pods the one with the lower cost is taken away first.
COST = "controller.kubernetes.io/pod-deletion-cost"
IDLE_COST, BUSY_COST = "0", "1000"

# Beside the drain: for the container to end, and for what takes its time in between.
_AFTER_DRAIN_S = 30
# Below the range of outgoing connections, and rarely anybody's.
_STATUS_PORTS = (28_090, 28_091, 28_092)
_UID = 10_001
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,50}[A-Za-z0-9])?")
_DURATION: TypeAdapter[timedelta] = TypeAdapter(timedelta)
_POLL_S = 5
_COOLDOWN_S = 300
_UP_STABLE_S, _DOWN_STABLE_S = 0, 120
_LONGEST_STABLE_S = 3600
_LEAST_TARGET = 0.01
_HIDDEN = frozenset({"queue_url", "store_url", "blobs_url", "message_keys"})
# `instance_id` is the pod's UID; `secret_key` no sidecar has.
_NOT_TOLD = _HIDDEN | {"secret_key", "instance_id", "data_dir", "launcher_url"}


class Place(BaseModel):
    """Where instances run, as the URL says. `image` is that of the sidecar, `load_url` where KEDA asks for a version's
    load; `cluster` is the name under which its GPUs are offered, `pull_secret` one for the sidecar's image;
    `artifacts_claim` is a PersistentVolumeClaim with `models/<name>/<version>` and `resources/<name>/<version>`;
    functions do not reach the networks `egress_except`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespace: str = Field(pattern=f"^{_LABEL.pattern}$")
    image: str = Field(min_length=1)
    load_url: str = Field(pattern="^https?://")
    cluster: str = "kubernetes"
    runtime_class: str = ""
    pull_secret: str = ""
    artifacts_claim: str = ""
    egress_except: Annotated[tuple[str, ...], BeforeValidator(lambda text: text.split(","))] = ("169.254.0.0/16",)
    cooldown_s: int = Field(_COOLDOWN_S, ge=0)


def read_place(url: str) -> Place:
    """`kubernetes://<namespace>?image=…&load_url=…`, and whatever else a Place has. Raises ConfigurationError."""
    parts = urlsplit(url)
    given = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    try:
        return Place.model_validate(given | {"namespace": parts.netloc})
    except ValidationError as exc:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in exc.errors())
        raise ConfigurationError(
            f"FNQUEUE_LAUNCHER_URL: {faults}; it is kubernetes://NAMESPACE?image=SIDECAR_IMAGE&load_url=http://HOST:PORT"
        ) from exc


def render(
    place: Place,
    settings: ControllerSettings,
    version: Version,
    specification: GpuSpecification,
    *,
    products: frozenset[str] = frozenset(),
    secrets: bytes | None = None,
    login: Login | None = None,
) -> list[Manifest]:
    """The Deployment, without a number of pods, and behind it what it owns.

    Raises:
        ConfigurationError: it can never run, and why.
    """
    return _Rendering(place, settings, version, specification, products, secrets, login).manifests()


def owned(manifest: Manifest, owner: Manifest) -> Manifest:
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [owner]}}


def owner_reference(root: Manifest, uid: str) -> Manifest:
    return {
        "apiVersion": root["apiVersion"],
        "kind": root["kind"],
        "name": root["metadata"]["name"],
        "uid": uid,
        "controller": False,
        "blockOwnerDeletion": False,
    }


def only_replicas(root: Manifest, replicas: int) -> Manifest:
    return {
        "apiVersion": root["apiVersion"],
        "kind": root["kind"],
        "metadata": {"name": root["metadata"]["name"], "namespace": root["metadata"]["namespace"]},
        "spec": {"replicas": replicas},
    }


def wants_cards(specification: GpuSpecification) -> bool:
    return specification.gpu != CPU


@dataclass(frozen=True, slots=True)
class _Rendering:
    place: Place
    settings: ControllerSettings
    version: Version
    specification: GpuSpecification
    products: frozenset[str]
    secrets: bytes | None
    login: Login | None

    def manifests(self) -> list[Manifest]:
        if self.version.helm_chart:
            raise ConfigurationError("functions of Helm charts cannot be run here")
        if not _LABEL.fullmatch(self.specification.id):
            raise ConfigurationError(f"the specification's ID {self.specification.id!r} is not fit for a name")
        return [
            self._deployment(),
            self._secret("settings", self._hidden_settings()),
            self._secret("secrets", {"secrets.json": self.secrets} if self.secrets is not None else {}),
            self._secret("pull", {".dockerconfigjson": self._docker_config()}, kind="kubernetes.io/dockerconfigjson"),
            self._budget(),
            self._network_policy(),
            self._scaled_object(),
        ]

    # -- the pods ----------------------------------------------------------------------------------

    def _deployment(self) -> Manifest:
        manifest = self._object("apps/v1", "Deployment", "")
        if self.products:
            manifest["metadata"]["annotations"] = {PRODUCTS: ",".join(sorted(self.products))}
        return manifest | {
            "spec": {
                "selector": {"matchLabels": self._selector()},
                # The old ones first: there may be no card free for one more. Meanwhile the queue keeps what comes.
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
                "progressDeadlineSeconds": math.ceil(self.settings.deploy_timeout_s),
                "revisionHistoryLimit": 1,
                "template": {"metadata": {"labels": self._labels()}, "spec": self._pod()},
            }
        }

    def _pod(self) -> Manifest:
        pulls = [self._name("pull"), *([self.place.pull_secret] if self.place.pull_secret else [])]
        pod: Manifest = {
            "terminationGracePeriodSeconds": math.ceil(self.settings.drain_s) + _AFTER_DRAIN_S,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # What the sidecar lays for its container, and what that writes, is of one group.
            "securityContext": {"fsGroup": _UID, "seccompProfile": {"type": "RuntimeDefault"}},
            "imagePullSecrets": [{"name": name} for name in pulls],
            "initContainers": [self._sidecar()],
            "containers": [self._container()],
            "volumes": [
                {"name": "requests", "emptyDir": {}},
                {"name": "scratch", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                {"name": "secrets", "secret": {"secretName": self._name("secrets"), "optional": True}},
            ],
        }
        if self._artifacts():
            claim = {"claimName": self.place.artifacts_claim, "readOnly": True}
            pod["volumes"].append({"name": "artifacts", "persistentVolumeClaim": claim})
        if self.place.runtime_class and self._cards:
            pod["runtimeClassName"] = self.place.runtime_class
        return pod | self._placement()

    def _sidecar(self) -> Manifest:
        return {
            "name": SIDECAR_NAME,
            "image": self.place.image,
            "args": ["sidecar"],
            "restartPolicy": "Always",
            "env": [
                {"name": "FNQUEUE_INSTANCE_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                *_variables(self._open_settings()),
            ],
            "envFrom": [{"secretRef": {"name": self._name("settings")}}],
            "ports": [{"name": "status", "containerPort": self._status_port}],
            "livenessProbe": self._probe("live", period_s=10, failures=6),
            "readinessProbe": self._probe("ready", period_s=5, failures=2),
            "lifecycle": {"preStop": {"httpGet": {"path": "/v1/drain", "port": self._status_port}}},
            "resources": {"requests": {"cpu": "100m", "memory": "192Mi"}},
            "securityContext": {
                "runAsUser": _UID,
                "runAsGroup": _UID,
                "runAsNonRoot": True,
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "requests", "mountPath": "/var/inf"},
                {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108  a volume of its own
            ],
        }

    def _probe(self, what: str, *, period_s: int, failures: int) -> Manifest:
        return {
            "httpGet": {"path": f"/v1/health/{what}", "port": self._status_port},
            "periodSeconds": period_s,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        }

    def _container(self) -> Manifest:
        arguments = container_arguments(self.version)
        container: Manifest = {
            "name": CONTAINER_NAME,
            "image": self.version.container_image.partition("://")[2] or self.version.container_image,
            "env": _variables(self._container_environment()),
            "ports": [{"containerPort": port} for port in sorted({self.version.inference_port, self._health_port})],
            "lifecycle": {"preStop": {"httpGet": {"path": "/v1/drain", "port": self._status_port}}},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["NET_RAW"]}},
            "volumeMounts": [
                {"name": "requests", "mountPath": "/var/inf"},
                {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  a volume of its own
                {"name": "secrets", "mountPath": "/var/secrets", "readOnly": True},
                *self._artifacts(),
            ],
        }
        if arguments:
            container["args"] = arguments
        if self._cards:
            # Of an extended resource the request equals the limit.
            container["resources"] = {"limits": {GPU_RESOURCE: str(self._cards)}}
        return container

    def _container_environment(self) -> dict[str, str]:
        return {
            **dict(self.version.container_environment),
            "PORT": str(self.version.inference_port),
            **container_variables(self.version, self._sidecar_settings()),
        }

    def _artifacts(self) -> list[Manifest]:
        """Folders of the claim, in the container: of each model and resource."""
        wanted = artifacts(self.version)
        if wanted and not self.place.artifacts_claim:
            raise ConfigurationError(
                f"the version has {wanted[0].kind}: `artifacts_claim` in FNQUEUE_LAUNCHER_URL must name the "
                "PersistentVolumeClaim that holds them"
            )
        return [
            {"name": "artifacts", "mountPath": each.target, "subPath": each.folder, "readOnly": True} for each in wanted
        ]

    def _placement(self) -> Manifest:
        """Where pods may run: on nodes with the right cards, or of the instance type that the cloud names so."""
        specification = self.specification
        terms = [("topology.kubernetes.io/zone", specification.availability_zones)]
        placement: Manifest = {"nodeSelector": {"kubernetes.io/os": "linux"}}
        if self._cards:
            placement["tolerations"] = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}]
            if specification.instance_type == instance_type(specification.gpu, self._cards):
                if not self.products:
                    raise ConfigurationError(f"no node of the cluster has {specification.gpu} cards")
                terms.append((PRODUCT, tuple(sorted(self.products))))
            else:
                placement["nodeSelector"][NODE_TYPE] = specification.instance_type
        wanted = [{"key": key, "operator": "In", "values": list(values)} for key, values in terms if values]
        if wanted:
            required = {"nodeSelectorTerms": [{"matchExpressions": wanted}]}
            placement["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
        return placement

    # -- the sidecar's settings --------------------------------------------------------------------

    def _sidecar_settings(self) -> SidecarSettings:
        return sidecar_settings(
            self.settings,
            "",
            self.version,
            self.specification,
            backend=self.place.cluster,
            gpu_count=self._cards,
            inference_host="127.0.0.1",
            inference_port=self.version.inference_port,
            health_port=self._health_port,
            status_port=self._status_port,
            status_host="0.0.0.0",  # the kubelet and Prometheus come by the pod's address
        )

    def _open_settings(self) -> dict[str, str]:
        """Those that are not the image's own defaults, and no secret."""
        settings = self._sidecar_settings()
        return {
            f"FNQUEUE_{name.upper()}": str(value)
            for name, field in SidecarSettings.model_fields.items()
            if name not in _NOT_TOLD and (value := getattr(settings, name)) != field.default
        }

    def _hidden_settings(self) -> dict[str, bytes]:
        settings = self._sidecar_settings()
        values: dict[str, SecretStr] = {name: getattr(settings, name) for name in sorted(_HIDDEN)}
        hidden = {f"FNQUEUE_{name.upper()}": value.get_secret_value().encode() for name, value in values.items()}
        # The headers of an exporter are often a key.
        return hidden | {name: value.encode() for name, value in tracing.inherited().items()}

    @property
    def _health_port(self) -> int:
        return self.version.health.port or self.version.inference_port

    @property
    def _status_port(self) -> int:
        """In a pod all containers share the ports."""
        taken = {self.version.inference_port, self._health_port}
        return next(port for port in _STATUS_PORTS if port not in taken)

    @property
    def _cards(self) -> int:
        return card_count(self.specification.instance_type) if wants_cards(self.specification) else 0

    # -- what goes with them -----------------------------------------------------------------------

    def _secret(self, suffix: str, content: Mapping[str, bytes], *, kind: str = "Opaque") -> Manifest:
        data = {name: base64.b64encode(value).decode() for name, value in content.items()}
        return self._object("v1", "Secret", suffix) | {"type": kind, "data": data}

    def _docker_config(self) -> bytes:
        """Docker Hub goes by the name of its first API."""
        if self.login is None:
            return json.dumps({"auths": {}}).encode()
        host = "https://index.docker.io/v1/" if self.login.hostname == "docker.io" else self.login.hostname
        pair = base64.b64encode(f"{self.login.username}:{self.login.password}".encode()).decode()
        return json.dumps({"auths": {host: {"auth": pair}}}).encode()

    def _budget(self) -> Manifest:
        """A drained node takes one instance after another with it, and never waits for one that is ill."""
        return self._object("policy/v1", "PodDisruptionBudget", "") | {
            "spec": {
                "maxUnavailable": 1,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": self._selector()},
            }
        }

    def _network_policy(self) -> Manifest:
        """Nobody calls a function but its sidecar and, for probes and hooks, its node. The sidecar and its container
        share an address, so what one may reach, the other may."""
        world = [{"ipBlock": {"cidr": "0.0.0.0/0", "except": list(self.place.egress_except)}}]
        domain_names = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
        return self._object("networking.k8s.io/v1", "NetworkPolicy", "") | {
            "spec": {
                "podSelector": {"matchLabels": self._selector()},
                "policyTypes": ["Ingress", "Egress"],
                # A name server may stand on the node itself, at an address that is closed otherwise.
                "egress": [{"to": world}, {"to": [{"ipBlock": {"cidr": "::/0"}}]}, {"ports": domain_names}],
            }
        }

    def _scaled_object(self) -> Manifest:
        """As many pods as the queued and running requests need slots. Those that run are in the number, so that a
        full instance holds its own place; and KEDA goes to zero only when none of either is left."""
        specification = self.specification
        behavior = {
            "scaleUp": self._scaling(up=True),
            "scaleDown": self._scaling(up=False),
        }
        return self._object("keda.sh/v1alpha1", "ScaledObject", "") | {
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": self._name("")},
                "pollingInterval": _POLL_S,
                "cooldownPeriod": self.place.cooldown_s,
                "minReplicaCount": specification.min_instances,
                "maxReplicaCount": max(specification.max_instances, 1),
                "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
                "triggers": [
                    {
                        "type": "metrics-api",
                        "metricType": "AverageValue",
                        "metadata": {
                            "url": f"{self.place.load_url.rstrip('/')}/v1/versions/{self.version.id}/load",
                            "valueLocation": "load",
                            "targetValue": f"{self._target():g}",
                        },
                    }
                ],
            }
        }

    def _target(self) -> float:
        """Requests per pod: its slots, or the part of them that the user's policy wants taken."""
        policy = self.specification.autoscaling
        share = policy.up.threshold / 100 if policy and policy.up and policy.up.threshold > 0 else 1.0
        return max(self.specification.max_request_concurrency * min(share, 1.0), _LEAST_TARGET)

    def _scaling(self, *, up: bool) -> Manifest:
        """A user's factor as the steps in which the number changes, and how long he wants it to last before it does."""
        autoscaling = self.specification.autoscaling
        policy = (autoscaling.up if up else autoscaling.down) if autoscaling else None
        stable_s = _UP_STABLE_S if up else _DOWN_STABLE_S
        per_cent = 100
        if policy is not None:
            per_cent = round((policy.factor - 1) * 100 if up else (1 - policy.factor) * 100)
            if policy.stickiness is not None:
                stable_s = min(round(_seconds(policy.stickiness.size)), _LONGEST_STABLE_S)
        steps = [{"type": "Percent", "value": min(max(per_cent, 1), 1000 if up else 100), "periodSeconds": 15}]
        if up:
            steps.append({"type": "Pods", "value": 4, "periodSeconds": 15})
        return {"stabilizationWindowSeconds": stable_s, "selectPolicy": "Max", "policies": steps}

    # -- names -------------------------------------------------------------------------------------

    def _object(self, api_version: str, kind: str, suffix: str) -> Manifest:
        metadata = {"name": self._name(suffix), "namespace": self.place.namespace, "labels": self._labels()}
        return {"apiVersion": api_version, "kind": kind, "metadata": metadata}

    def _name(self, suffix: str) -> str:
        return "-".join(part for part in ("fnq", self.specification.id.lower(), suffix) if part)

    def _labels(self) -> dict[str, str]:
        return {
            "app.kubernetes.io/name": "fnqueue-function",
            **SELECTOR,
            FUNCTION: self.version.function_id,
            VERSION: self.version.id,
            SPECIFICATION: self.specification.id,
        }

    def _selector(self) -> dict[str, str]:
        return {SPECIFICATION: self.specification.id}


def _variables(environment: Mapping[str, str]) -> Sequence[Manifest]:
    """`$(NAME)` in a value would be replaced: a doubled dollar stands for one."""
    return [{"name": name, "value": value.replace("$(", "$$(")} for name, value in sorted(environment.items())]


def _seconds(duration: str) -> float:
    try:
        return max(0.0, _DURATION.validate_python(duration).total_seconds())
    except ValidationError as exc:
        raise ConfigurationError(f"autoscaling: {duration!r} is not an ISO-8601 duration") from exc
