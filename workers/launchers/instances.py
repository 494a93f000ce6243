"""What every launcher tells a container and its sidecar, and what it tells of a dead one."""

from __future__ import annotations

import posixpath
import shlex
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import SecretStr, TypeAdapter, ValidationError

from broker import version_users
from broker.deployments import left_out
from broker.errors import ConfigurationError, NoCapacity
from broker.model import GpuSpecification, Place, Version
from broker.settings import ControllerSettings, Settings, SidecarSettings, load
from broker.signatures import Signatures
from broker.telemetry import tracing

ERROR_BYTES = 4096

_DURATION: TypeAdapter[timedelta] = TypeAdapter(timedelta)


def place_of(settings: ControllerSettings) -> Place:
    """Where this controller's instances run."""
    attributes = (name.strip() for name in settings.attributes.split(","))
    return Place(
        cluster=settings.cluster, region=settings.region, attributes=tuple(name for name in attributes if name)
    )


def refuse_elsewhere(specification: GpuSpecification, place: Place) -> None:
    """Raises NoCapacity for what was placed by a controller somewhere else."""
    if field := left_out(specification, place):
        raise NoCapacity(
            f"{field}: {', '.join(getattr(specification, field))}: no controller runs there now, only in "
            f"{place.cluster} of {place.region}"
        )


def sidecar_settings(
    controller: ControllerSettings,
    instance_id: str,
    version: Version,
    specification: GpuSpecification,
    *,
    backend: str,
    **placed: Any,
) -> SidecarSettings:
    """The settings of an instance's sidecar; `placed` are those that only its launcher knows, such as ports and
    folders. Raises ConfigurationError."""
    shared = {name: getattr(controller, name) for name in Settings.model_fields}
    told: dict[str, Any] = {
        "drain_s": controller.drain_s,
        # It runs beside a user's code: it can check the messages of its version, and make nothing of ours.
        "secret_key": SecretStr(""),
        "message_keys": Signatures.of(controller).for_sidecar(version.id),
        **_servers(controller, version.id),
        "function_id": version.function_id,
        "function_version_id": version.id,
        "function_name": version.name,
        "account": version.account,
        "instance_id": instance_id,
        "specification_id": specification.id,
        "gpu": specification.gpu,
        "instance_type": specification.instance_type,
        "backend": specification.backend or backend,
        "region": controller.region,
        "environment": backend,
        "inference_url": version.inference_url,
        "health_protocol": version.health.protocol,
        "health_uri": version.health.uri,
        "health_timeout_s": _seconds(version.health.timeout),
        "health_expected_status": version.health.expected_status,
        "max_request_concurrency": specification.max_request_concurrency,
    }
    return load(SidecarSettings, **shared | told | placed)


def _servers(controller: ControllerSettings, version_id: str) -> dict[str, Any]:
    """URLs with fewer rights than the controller's, as far as there are any. Raises ConfigurationError."""
    own: dict[str, SecretStr] = {
        name: url
        for name in ("queue_url", "store_url", "blobs_url")
        if (url := getattr(controller, f"sidecar_{name}")).get_secret_value()
    }
    if controller.version_users:
        queue_url = own.get("queue_url", controller.queue_url)
        own["queue_url"] = version_users.url_for(controller, version_id, queue_url)
    # Only the controller's user may look at what a profile is checked by, and it has.
    return own | ({"profile_asserted": True} if "store_url" in own else {})


def sidecar_variables(settings: SidecarSettings) -> dict[str, str]:
    """Every setting of the sidecar as an environment variable, and none of anybody else; and how it is traced."""
    own = {f"FNQUEUE_{name.upper()}": _as_text(getattr(settings, name)) for name in SidecarSettings.model_fields}
    return own | tracing.inherited()


def container_variables(version: Version, settings: SidecarSettings) -> dict[str, str]:
    """What contract/management.md §7.2 promises a container beside its own environment."""
    return {
        "NVCF_BACKEND": settings.backend,
        "NVCF_ENV": settings.environment,
        "NVCF_FUNCTION_ID": version.function_id,
        "NVCF_FUNCTION_NAME": version.name,
        "NVCF_FUNCTION_VERSION_ID": version.id,
        "NVCF_INSTANCETYPE": settings.instance_type,
        "NVCF_NCA_ID": version.account,
        "NVCF_REGION": settings.region,
    }


def container_arguments(version: Version) -> list[str]:
    """Raises ConfigurationError."""
    try:
        return shlex.split(version.container_args)
    except ValueError as exc:
        raise ConfigurationError(f"containerArgs cannot be split into words: {exc}") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A model or resource of a version: where it is kept, below a root, and where its container sees it."""

    kind: str
    name: str
    folder: str

    @property
    def target(self) -> str:
        return posixpath.join("/config", self.kind, self.name)


def artifacts(version: Version) -> list[Artifact]:
    """Raises ConfigurationError for a name that is no folder's."""
    wanted = [("models", model.name, model.version) for model in version.models if model.llm is None]
    wanted += [("resources", resource.name, resource.version) for resource in version.resources]
    return [
        Artifact(kind=kind, name=_step(name), folder=posixpath.join(kind, name, _step(number)))
        for kind, name, number in wanted
    ]


def told(what: str, container_log: str, sidecar_log: str = "") -> str:
    """Why an instance is dead, with the ends of its logs: at most ERROR_BYTES."""
    sidecar_log = last(sidecar_log, ERROR_BYTES // 4)
    head = last(what, ERROR_BYTES // 2)
    room = ERROR_BYTES - sum(len(part.encode()) + 1 for part in (head, sidecar_log))
    return "\n".join(part for part in (head, sidecar_log, last(container_log, room)) if part)


def last(text: str, limit_bytes: int) -> str:
    """Its end, of at most so many bytes."""
    return text.encode()[-limit_bytes:].decode(errors="ignore").strip()


def _seconds(duration: str) -> float:
    """An ISO-8601 duration in seconds, at most what the sidecar takes. Raises ConfigurationError."""
    try:
        return min(max(_DURATION.validate_python(duration).total_seconds(), 0.1), 600.0)
    except ValidationError as exc:
        raise ConfigurationError(f"health.timeout: {duration!r} is not an ISO-8601 duration") from exc


def _step(name: str) -> str:
    """One step of a path."""
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ConfigurationError(f"a model or resource named {name!r} is no folder's name")
    return name


def _as_text(value: object) -> str:
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value)
