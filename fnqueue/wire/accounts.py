"""Accounts and their limits (contract/management.md §4.5)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from fnqueue.wire.fields import Wire
from fnqueue.wire.registries import RegistryCredential

AccountName = Annotated[str, Field(min_length=4, max_length=36, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Quota = Annotated[int, Field(ge=0, le=2**31 - 1)]


class CreateAccount(Wire):
    """Body of `POST /accounts/{ncaId}`."""

    name: AccountName
    admin_client_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    max_functions_allowed: Quota | None = None
    max_tasks_allowed: Quota | None = None
    max_telemetries_allowed: Annotated[int, Field(ge=0, le=25)] | None = None
    max_registry_credentials_allowed: Annotated[int, Field(ge=0, le=25)] | None = None


class UpdateAccount(Wire):
    """Body of `PATCH /accounts/{ncaId}`: something of it is needed."""

    name: AccountName | None = None
    max_functions_allowed: Quota | None = None
    max_tasks_allowed: Quota | None = None
    max_telemetries_allowed: Annotated[int, Field(ge=0, le=50)] | None = None
    max_registry_credentials_allowed: Annotated[int, Field(ge=0, le=50)] | None = None


class Account(Wire):
    nca_id: str
    name: str
    client_ids: list[str] | None = None
    admin_client_ids: list[str] | None = None
    max_functions_allowed: int
    max_tasks_allowed: int
    max_telemetries_allowed: int
    max_registry_credentials_allowed: int
    current_number_functions: int | None = None
    registry_credentials: list[RegistryCredential] | None = None
    last_updated_at: datetime | None = None


class AccountAnswer(Wire):
    account: Account


class AccountList(Wire):
    cloud_accounts: list[Account]
