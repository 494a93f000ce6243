"""Functions that are shared with other accounts (contract/management.md §4.6)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fnqueue.wire.fields import Wire


class AuthorizedParty(Wire):
    """Here is no client to be shared with alone: a `client_id` is refused."""

    nca_id: Annotated[str, Field(min_length=1, max_length=64)]
    client_id: str | None = None

    @model_validator(mode="after")
    def _is_an_account(self) -> AuthorizedParty:
        if self.client_id:
            raise ValueError("clientId: no such client; share with the account")
        return self


class AuthorizeParties(Wire):
    """Body of `POST /authorizations/functions/{functionId}[/versions/{versionId}]`."""

    authorized_parties: Annotated[list[AuthorizedParty], Field(min_length=1, max_length=512)]


class AuthorizeParty(Wire):
    """Body of the `PATCH …/add` and `PATCH …/remove` of the same paths."""

    authorized_party: AuthorizedParty


class Authorization(Wire):
    """Who may use a function, or the one version that is named."""

    id: str
    nca_id: str
    version_id: str | None = None
    authorized_parties: list[AuthorizedParty]


class AuthorizationAnswer(Wire):
    function: Authorization


class AuthorizationList(Wire):
    functions: list[Authorization]
