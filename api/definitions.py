"""A function version between the wire and the core, both ways (contract/management.md §1.2 to §1.6)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from uuid import UUID

from api import limits
from broker.estimates import Estimate
from broker.functions import Change, Definition, ModelChange
from broker.model import (
    Health,
    Instance,
    InstanceStatus,
    LlmConfig,
    Model,
    Principal,
    Priority,
    Resource,
    Telemetries,
    Version,
)
from broker.secrets import Plain
from fnqueue import wire

# What an account sees that a version is shared with, and that does not own it, leaves these out.
_OWNERS_ONLY = (
    "inference_url",
    "inference_port",
    "container_args",
    "container_environment",
    "container_image",
    "models",
    "resources",
    "helm_chart",
    "helm_chart_service_name",
    "active_instances",
    "secrets",
    "rate_limit",
)


# -- from the wire -----------------------------------------------------------------------------


def definition(asked: wire.CreateFunction) -> Definition:
    return Definition(
        name=asked.name,
        inference_url=asked.inference_url,
        container_image=asked.container_image or "",
        inference_port=asked.inference_port,
        health=_health(asked.health) if asked.health else None,
        health_uri=asked.health_uri or "",
        container_args=asked.container_args,
        container_environment=tuple((variable.key, variable.value) for variable in asked.container_environment),
        api_body_format=asked.api_body_format,
        function_type=asked.function_type,
        description=asked.description,
        tags=tuple(asked.tags),
        models=tuple(_model(model) for model in asked.models),
        resources=tuple(Resource(name=each.name, version=each.version, uri=each.uri) for each in asked.resources),
        helm_chart=asked.helm_chart or "",
        helm_chart_service_name=asked.helm_chart_service_name or "",
        rate_limit=limits.define(asked.rate_limit) if asked.rate_limit else None,
        telemetries=_telemetries(asked.telemetries) if asked.telemetries else None,
        priority=_priority(asked.llm_invocation_config),
        secrets=plains(asked.secrets),
        queue_timeout_s=wire.seconds(asked.queue_timeout) if asked.queue_timeout else 0.0,
        run_timeout_s=wire.seconds(asked.run_timeout) if asked.run_timeout else 0.0,
    )


def change(asked: wire.UpdateFunction) -> Change:
    return Change(
        tags=None if asked.tags is None else tuple(asked.tags),
        rate_limit=limits.define(asked.rate_limit) if asked.rate_limit else None,
        models=tuple(
            ModelChange(
                name=update.model_name,
                token_rate_limit=update.llm_config.token_rate_limit or "",
                routing_method=update.llm_config.routing_method or "",
            )
            for update in asked.model_updates or ()
        ),
        priority=_priority(asked.llm_invocation_config),
    )


def plains(asked: Iterable[wire.Secret]) -> tuple[Plain, ...]:
    return tuple(Plain(name=secret.name, value=secret.value.get_secret_value()) for secret in asked)


def _health(asked: wire.Health) -> Health:
    return Health(
        protocol="gRPC" if asked.protocol == "GRPC" else "HTTP",
        uri=asked.uri,
        port=asked.port,
        timeout=asked.timeout,
        expected_status=asked.expected_status_code,
    )


def _model(asked: wire.Model) -> Model:
    llm = _llm(asked.llm_config) if asked.llm_config else None
    return Model(name=asked.name, version=asked.version or "", uri=asked.uri or "", llm=llm)


def _llm(asked: wire.LlmConfig) -> LlmConfig:
    return LlmConfig(
        uris=tuple(asked.uris),
        tokenizer=asked.tokenizer or "",
        token_rate_limit=asked.token_rate_limit or "",
        routing_method=asked.routing_method or "",
    )


def _telemetries(asked: wire.Telemetries) -> Telemetries:
    return Telemetries(
        logs=str(asked.logs_telemetry_id or ""),
        metrics=str(asked.metrics_telemetry_id or ""),
        traces=str(asked.traces_telemetry_id or ""),
    )


def _priority(asked: wire.LlmInvocationConfig | None) -> Priority | None:
    if asked is None:
        return None
    given = asked.priority or wire.Priority()
    return Priority(default=given.default_priority, per_account=tuple((given.per_account_priority or {}).items()))


# -- to the wire -------------------------------------------------------------------------------


def present(
    version: Version,
    principal: Principal,
    *,
    instances: Iterable[Instance] | None = None,
    secrets: Iterable[str] | None = None,
) -> wire.Function:
    """A version as the caller may see it; `secrets` are names."""
    foreign = version.account != principal.account
    shown = wire.Function(
        id=version.function_id,
        nca_id=version.account,
        version_id=version.id,
        name=version.name,
        status=version.status.value,
        inference_url=version.inference_url,
        owned_by_different_account=foreign,
        inference_port=version.inference_port,
        container_args=version.container_args or None,
        container_environment=[
            wire.EnvironmentVariable(key=key, value=value) for key, value in version.container_environment
        ]
        or None,
        container_image=version.container_image or None,
        models=[_shown_model(model) for model in version.models] or None,
        resources=[wire.Resource(name=each.name, version=each.version, uri=each.uri) for each in version.resources]
        or None,
        helm_chart=version.helm_chart or None,
        helm_chart_service_name=version.helm_chart_service_name or None,
        api_body_format=version.api_body_format,
        health_uri=version.health.uri,
        health=wire.FunctionHealth(
            protocol=version.health.protocol,
            uri=version.health.uri,
            port=version.health.port,
            timeout=version.health.timeout,
            expected_status_code=version.health.expected_status,
        ),
        created_at=instant(version.created_at),
        active_instances=None if instances is None else [_instance(one) for one in instances if _lives(one)],
        tags=list(version.tags) or None,
        description=version.description,
        function_type=version.function_type,
        secrets=list(secrets or ()) or None,
        rate_limit=limits.present(version.rate_limit) if version.rate_limit else None,
        telemetries=_shown_telemetries(version.telemetries) if version.telemetries else None,
        llm_invocation_config=_shown_priority(version.priority) if version.priority else None,
        queue_timeout=f"PT{version.queue_timeout_s:.15g}S" if version.queue_timeout_s else None,
        run_timeout=f"PT{version.run_timeout_s:.15g}S" if version.run_timeout_s else None,
    )
    return shown.model_copy(update=dict.fromkeys(_OWNERS_ONLY)) if foreign else shown


def eta(estimate: Estimate | None) -> wire.Eta | None:
    if estimate is None:
        return None
    return wire.Eta(p50_seconds=round(estimate.p50_s, 3), p90_seconds=round(estimate.p90_s, 3))


def instant(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


def _lives(instance: Instance) -> bool:
    return instance.status in (InstanceStatus.STARTING, InstanceStatus.RUNNING)


def _instance(instance: Instance) -> wire.Instance:
    # What asked for an instance is its GPU specification; one that was started by hand is its own.
    asked_by = instance.specification_id or instance.id
    return wire.Instance(
        instance_id=instance.id,
        function_id=instance.function_id,
        function_version_id=instance.version_id,
        instance_type=instance.instance_type,
        instance_status=instance.status.value,
        sis_request_id=asked_by,
        icms_request_id=asked_by,
        nca_id=instance.account,
        gpu=instance.gpu,
        backend=instance.backend or None,
        location=instance.location or None,
        error=instance.error or None,
        instance_created_at=instant(instance.created_at),
        instance_updated_at=instant(instance.updated_at),
    )


def _shown_model(model: Model) -> wire.FunctionModel:
    return wire.FunctionModel(
        name=model.name,
        version=model.version or None,
        uri=model.uri or None,
        llm_config=_shown_llm(model.llm) if model.llm else None,
    )


def _shown_llm(config: LlmConfig) -> wire.LlmConfig:
    return wire.LlmConfig(
        uris=list(config.uris),
        tokenizer=config.tokenizer or None,
        token_rate_limit=config.token_rate_limit or None,
        routing_method=config.routing_method or None,
    )


def _shown_telemetries(telemetries: Telemetries) -> wire.Telemetries:
    return wire.Telemetries(
        logs_telemetry_id=_uuid(telemetries.logs),
        metrics_telemetry_id=_uuid(telemetries.metrics),
        traces_telemetry_id=_uuid(telemetries.traces),
    )


def _uuid(text: str) -> UUID | None:
    return UUID(text) if text else None


def _shown_priority(priority: Priority) -> wire.LlmInvocationConfig:
    return wire.LlmInvocationConfig(
        priority=wire.Priority(
            default_priority=priority.default, per_account_priority=dict(priority.per_account) or None
        )
    )
