"""Deployments and their GPU specifications (contract/management.md §2)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fnqueue.wire.fields import MAX_INSTANCES, Duration, Instances, Name, Places, Wire, seconds, upper

MAX_STICKINESS_S = 3600.0


class Stickiness(Wire):
    """For at least `threshold` out of the last `size`."""

    size: Duration
    threshold: Duration

    @model_validator(mode="after")
    def _fits(self) -> Stickiness:
        if seconds(self.size) > MAX_STICKINESS_S:
            raise ValueError("size: at most PT1H")
        if seconds(self.threshold) >= seconds(self.size):
            raise ValueError("threshold: must be shorter than size")
        return self


class Scaling(Wire):
    factor: float
    threshold: Annotated[int, Field(ge=0, le=MAX_INSTANCES)]
    metric: Annotated[str, Field(max_length=256)] | None = None
    stickiness: Stickiness | None = None


class ScaleUp(Scaling):
    factor: Annotated[float, Field(gt=1, le=1000, allow_inf_nan=False)]


class ScaleDown(Scaling):
    factor: Annotated[float, Field(gt=0, lt=1)]


class AutoscalingConfiguration(Wire):
    scale_up_details: ScaleUp | None = None
    scale_down_details: ScaleDown | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AutoscalingConfiguration:
        if not (self.scale_up_details or self.scale_down_details):
            raise ValueError("autoscalingConfiguration: one of scaleUpDetails and scaleDownDetails is needed")
        return self


class Wanted(Wire):
    """Instances of one kind. Ranges and names are checked against what is on offer by the server."""

    gpu: Annotated[str, Field(min_length=1, max_length=256)]
    instance_type: Annotated[str, Field(max_length=256)] | None = None
    backend: Annotated[str, Field(max_length=256)] | None = None
    clusters: Places | None = None
    regions: Places | None = None
    attributes: Places | None = None
    availability_zones: Places | None = None
    min_instances: Instances
    max_instances: Instances
    max_request_concurrency: Annotated[int, Field(le=MAX_INSTANCES)] = 1
    preferred_order: Annotated[int, Field(ge=1, le=99)] | None = None
    autoscaling_configuration: AutoscalingConfiguration | None = None


class GpuSpecification(Wanted):
    """`cpu_arch` and what follows are facts of the inventory, as of the deployment."""

    gpu_specification_id: str | None = None
    cpu_arch: str | None = None
    os: str | None = None
    driver_version: str | None = None
    system_memory: str | None = None
    gpu_memory: str | None = None


class ExtraKubernetesType(Wire):
    group: Annotated[str, Field(max_length=256)] = ""
    version: Name
    kind: Name


class HelmValidationPolicy(Wire):
    name: Annotated[Literal["DEFAULT", "UNRESTRICTED"], BeforeValidator(upper)] = "DEFAULT"
    extra_kubernetes_types: Annotated[list[ExtraKubernetesType], Field(max_length=256)] = []


class GpuSpecificationRequest(Wanted):
    """`configuration` and `helm_validation_policy` are for Helm functions, which are not deployed here."""

    configuration: dict[str, Any] = {}
    helm_validation_policy: HelmValidationPolicy | None = None

    @model_validator(mode="after")
    def _can_run_here(self) -> GpuSpecificationRequest:
        if self.clusters and self.backend:
            raise ValueError("clusters: not together with backend")
        if self.configuration:
            raise ValueError("configuration: Helm values; this is a container function")
        return self


class CreateDeployment(Wire):
    """Body of `POST /deployments/functions/{functionId}/versions/{versionId}`."""

    deployment_specifications: Annotated[list[GpuSpecificationRequest], Field(min_length=1, max_length=64)]


class GpuSpecificationChange(Wire):
    """One element of an update. What is absent stays; of what may not change, what is given must be as deployed."""

    gpu_specification_id: str | None = None
    gpu: Annotated[str, Field(max_length=256)] | None = None
    instance_type: Annotated[str, Field(max_length=256)] | None = None
    backend: Annotated[str, Field(max_length=256)] | None = None
    clusters: Places | None = None
    min_instances: Instances | None = None
    max_instances: Instances | None = None
    max_request_concurrency: Annotated[int, Field(le=MAX_INSTANCES)] | None = None


class UpdateDeployment(Wire):
    """Body of the deprecated `PUT /deployments/functions/{functionId}/versions/{versionId}`."""

    deployment_specifications: Annotated[list[GpuSpecificationChange], Field(min_length=1, max_length=64)]


class UpdateGpuSpecification(Wire):
    """Body of `PATCH /deployments/{deploymentId}/gpu-specifications/{gpuSpecificationId}`."""

    min_instances: Annotated[int, Field(ge=0, le=MAX_INSTANCES)] | None = None
    max_instances: Annotated[int, Field(ge=1, le=MAX_INSTANCES)] | None = None
    autoscaling_configuration: AutoscalingConfiguration | None = None
    autoscaling_configuration_policy: (
        Annotated[Literal["CUSTOM_CONFIGURATION", "PLATFORM_CONFIGURATION"], BeforeValidator(upper)] | None
    ) = None

    @model_validator(mode="after")
    def _says_something(self) -> UpdateGpuSpecification:
        if not self.model_fields_set:
            raise ValueError("minInstances: at least one field to change is needed")
        if self.autoscaling_configuration and self.autoscaling_configuration_policy == "PLATFORM_CONFIGURATION":
            raise ValueError("autoscalingConfiguration: not together with the policy PLATFORM_CONFIGURATION")
        return self


class GpuSpecificationAnswer(Wire):
    gpu_specification: GpuSpecification


class HealthInfo(Wire):
    sis_request_id: str
    icms_request_id: str
    gpu: str
    backend: str | None = None
    instance_type: str
    error: str


class Deployment(Wire):
    function_id: str
    function_version_id: str
    deployment_id: str
    function_name: str
    nca_id: str
    function_status: str
    health_info: list[HealthInfo] | None = None
    deployment_specifications: list[GpuSpecification]
    created_at: datetime
    last_updated_at: datetime


class DeploymentAnswer(Wire):
    deployment: Deployment


class DeploymentList(Wire):
    deployments: list[Deployment]
