"""The client's classes for the kinds that we make."""

from __future__ import annotations

from typing import Any

from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Secret
from lightkube.resources.networking_v1 import NetworkPolicy
from lightkube.resources.policy_v1 import PodDisruptionBudget

ScaledObject = create_namespaced_resource("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects")

_RESOURCES: dict[str, Any] = {
    "Deployment": Deployment,
    "NetworkPolicy": NetworkPolicy,
    "PodDisruptionBudget": PodDisruptionBudget,
    "ScaledObject": ScaledObject,
    "Secret": Secret,
}


def resource_of(manifest: dict[str, Any]) -> Any:
    return _RESOURCES[manifest["kind"]]
