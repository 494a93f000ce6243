"""API keys (contract/management.md §4.3, §4.4)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BeforeValidator, ConfigDict, Field, model_validator

from fnqueue.wire.fields import Wire, upper


class Snake(Wire):
    """The key service alone speaks snake_case."""

    model_config = ConfigDict(alias_generator=None)


class KeyResource(Snake):
    """`account-functions` or `authorized-functions` with the id `*`, or `function` with `<id>/*` or
    `<id>/<version id>`."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Annotated[str, Field(min_length=1, max_length=64)]


class KeyPolicy(Snake):
    """Without `resources` it is about every function that the account sees; with none of them, about none."""

    scopes: list[str]
    resources: list[KeyResource] | None = None
    aud: Annotated[str, Field(max_length=256)] | None = None
    auds: list[Annotated[str, Field(max_length=256)]] | None = None
    product: Annotated[str, Field(max_length=256)] | None = None


class KeyAuthorizations(Snake):
    policies: Annotated[list[KeyPolicy], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _is_short(self) -> KeyAuthorizations:
        if len(self.to_json()) > 2048:
            raise ValueError("must not be longer than 2048 characters")
        return self


class CreateKey(Snake):
    """Body of `POST /v1/keys`. `nca_id` is for who may make keys of another account."""

    description: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9 _-]+$")] | None = None
    expires_at: AwareDatetime | None = None
    authorizations: KeyAuthorizations
    audience_service_ids: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=16)] = []
    nca_id: str | None = None


class UpdateKeyAuthorizations(Snake):
    authorizations: KeyAuthorizations


class UpdateKeyStatus(Snake):
    status: Annotated[Literal["ACTIVE", "SUSPENDED"], BeforeValidator(upper)]


class ApiKey(Snake):
    """`value` is the key itself, once; `hint` is enough to tell it from others."""

    id: str
    status: str
    value: str | None = None
    hint: str
    nca_id: str
    owner_type: str = "USER"
    owner_id: str
    issuer_service_id: str | None = None
    audience_service_ids: list[str]
    description: str | None = None
    created_at: datetime
    expires_at: datetime | None = None
    authorizations: KeyAuthorizations | None = None


class ApiKeyList(Snake):
    keys: list[ApiKey]


class Introspect(Snake):
    """Body of `POST /v1/introspect`."""

    key: Annotated[str, Field(min_length=1, max_length=512)]
    audience_service_id: str | None = None


class Introspected(Snake):
    key_id: str
    nca_id: str
    owner_type: str = "USER"
    owner_id: str
    issuer_service_id: str | None = None
    authorizations: KeyAuthorizations
    expires_at: datetime | None = None


class Credentials(Wire):
    """The form of `POST /v3/keys/get-caller-info`; without it the Authorization header counts."""

    credentials: str | None = None


class RequestStatus(Wire):
    """NGC's own services wrap every answer in one; some clients take a key for good only with it."""

    status_code: str = "SUCCESS"


class CallerInfo(Wire):
    """What NGC's SDK and CLI ask of a key: a SERVICE_KEY belongs to an org and to no user."""

    request_status: RequestStatus = RequestStatus()
    type: str = "SERVICE_KEY"
    org_name: str
    key_id: str | None = None
    products: list[str]
    roles: list[str] = []
