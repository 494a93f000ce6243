"""Registry credentials (contract/management.md §6.3)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from fnqueue.wire.fields import Tags, Wire, upper
from fnqueue.wire.secrets import MAX_SECRET_CHARACTERS, SecretName

ArtifactType = Annotated[Literal["CONTAINER", "HELM", "MODEL", "RESOURCE"], BeforeValidator(upper)]


class RegistrySecret(Wire):
    """`value` is the base64 of `user:password`."""

    name: SecretName
    value: Annotated[SecretStr, Field(min_length=1, max_length=MAX_SECRET_CHARACTERS)]


class CreateRegistryCredential(Wire):
    """Body of `POST /registry-credentials`."""

    registry_hostname: Annotated[
        str, Field(max_length=253, pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?$")
    ]
    secret: RegistrySecret
    artifact_types: Annotated[list[ArtifactType], Field(min_length=1, max_length=16)]
    tags: Tags = []
    description: Annotated[str, Field(max_length=256)] = ""


class UpdateRegistryCredential(Wire):
    """Body of `PATCH /registry-credentials/{registryCredentialId}`. Artifact types, by either name, are added."""

    secret: RegistrySecret | None = None
    artifact_types: Annotated[list[ArtifactType], Field(max_length=16)] = []
    artifact_type_enums: Annotated[list[ArtifactType], Field(max_length=16)] = []
    tags: Tags | None = None
    description: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> UpdateRegistryCredential:
        if not (self.secret or self.artifact_types or self.artifact_type_enums) and (
            self.tags is None and self.description is None
        ):
            raise ValueError("give one of secret, artifactTypes, tags and description")
        return self


class RegistryCredential(Wire):
    registry_credential_id: str
    nca_id: str
    registry_credential_name: str
    registry_name: str
    registry_hostname: str
    artifact_types: list[str]
    tags: list[str] | None = None
    description: str | None = None
    provisioned_by: str
    last_updated_at: datetime
    created_at: datetime


class RegistryCredentialAnswer(Wire):
    registry_credential: RegistryCredential


class RegistryCredentialList(Wire):
    registry_credentials: list[RegistryCredential]


class RecognizedRegistry(Wire):
    """`*` in `hostname` stands for any part of one."""

    name: str
    hostname: str


class RecognizedRegistries(Wire):
    """By artifact type."""

    recognized_registries: dict[str, list[RecognizedRegistry]]
