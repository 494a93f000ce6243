"""Deployments and GPU specifications between the wire and the core, both ways (contract/management.md §2)."""

from __future__ import annotations

from typing import Any

from api.definitions import instant
from broker.model import Autoscaling, Deployment, GpuSpecification, HealthInfo, Scaling, Stickiness, Version
from broker.specifications import Change
from fnqueue import wire

# As upstream when no request for an instance is to blame.
NO_REQUEST = "00000000-0000-0000-0000-000000000000"


# -- from the wire -----------------------------------------------------------------------------


def specification(asked: wire.GpuSpecificationRequest) -> GpuSpecification:
    """`broker.deployments` fills in what is empty, and the id."""
    return GpuSpecification(
        id="",
        gpu=asked.gpu,
        instance_type=asked.instance_type or "",
        backend=asked.backend or "",
        min_instances=asked.min_instances,
        max_instances=asked.max_instances,
        max_request_concurrency=asked.max_request_concurrency,
        clusters=tuple(asked.clusters or ()),
        regions=tuple(asked.regions or ()),
        attributes=tuple(asked.attributes or ()),
        availability_zones=tuple(asked.availability_zones or ()),
        preferred_order=asked.preferred_order or 1,
        autoscaling=_autoscaling(asked.autoscaling_configuration),
    )


def change(asked: wire.GpuSpecificationChange) -> Change:
    return Change(
        id=asked.gpu_specification_id or "",
        gpu=asked.gpu,
        instance_type=asked.instance_type,
        backend=asked.backend,
        clusters=None if asked.clusters is None else tuple(asked.clusters),
        min_instances=asked.min_instances,
        max_instances=asked.max_instances,
        max_request_concurrency=asked.max_request_concurrency,
    )


def patch(specification_id: str, asked: wire.UpdateGpuSpecification) -> Change:
    return Change(
        id=specification_id,
        min_instances=asked.min_instances,
        max_instances=asked.max_instances,
        autoscaling=_autoscaling(asked.autoscaling_configuration),
        platform_scaling=asked.autoscaling_configuration_policy == "PLATFORM_CONFIGURATION",
    )


def _autoscaling(asked: wire.AutoscalingConfiguration | None) -> Autoscaling | None:
    if asked is None:
        return None
    return Autoscaling(up=_scaling(asked.scale_up_details), down=_scaling(asked.scale_down_details))


def _scaling(asked: wire.Scaling | None) -> Scaling | None:
    if asked is None:
        return None
    kept = asked.stickiness
    return Scaling(
        factor=asked.factor,
        threshold=asked.threshold,
        metric=asked.metric or "",
        stickiness=Stickiness(size=kept.size, threshold=kept.threshold) if kept else None,
    )


# -- to the wire -------------------------------------------------------------------------------


def present(version: Version, deployment: Deployment) -> wire.Deployment:
    return wire.Deployment(
        function_id=deployment.function_id,
        function_version_id=deployment.version_id,
        deployment_id=deployment.id,
        function_name=version.name,
        nca_id=deployment.account,
        function_status=version.status.value,
        health_info=[_health(info) for info in deployment.health] or None,
        deployment_specifications=[shown(each) for each in deployment.specifications],
        created_at=instant(deployment.created_at),
        last_updated_at=instant(deployment.updated_at),
    )


def shown(specification: GpuSpecification) -> wire.GpuSpecification:
    facts: dict[str, str] = dict(specification.facts)
    return wire.GpuSpecification(
        gpu_specification_id=specification.id,
        gpu=specification.gpu,
        instance_type=specification.instance_type,
        backend=specification.backend or None,
        clusters=list(specification.clusters) or None,
        regions=list(specification.regions) or None,
        attributes=list(specification.attributes) or None,
        availability_zones=list(specification.availability_zones) or None,
        min_instances=specification.min_instances,
        max_instances=specification.max_instances,
        max_request_concurrency=specification.max_request_concurrency,
        preferred_order=specification.preferred_order,
        autoscaling_configuration=_shown_autoscaling(specification.autoscaling),
        cpu_arch=facts.get("cpu_arch"),
        os=facts.get("os"),
        driver_version=facts.get("driver_version"),
        system_memory=facts.get("system_memory"),
        gpu_memory=facts.get("gpu_memory"),
    )


def _health(info: HealthInfo) -> wire.HealthInfo:
    asked_by = info.specification_id or NO_REQUEST
    return wire.HealthInfo(
        sis_request_id=asked_by,
        icms_request_id=asked_by,
        gpu=info.gpu,
        backend=info.backend or None,
        instance_type=info.instance_type,
        error=info.error,
    )


def _shown_autoscaling(policy: Autoscaling | None) -> wire.AutoscalingConfiguration | None:
    if policy is None:
        return None
    return wire.AutoscalingConfiguration(
        scale_up_details=policy.up and wire.ScaleUp(**_details(policy.up)),
        scale_down_details=policy.down and wire.ScaleDown(**_details(policy.down)),
    )


def _details(scaling: Scaling) -> dict[str, Any]:
    kept = scaling.stickiness
    return {
        "factor": scaling.factor,
        "threshold": scaling.threshold,
        "metric": scaling.metric or None,
        "stickiness": kept and wire.Stickiness(size=kept.size, threshold=kept.threshold),
    }
