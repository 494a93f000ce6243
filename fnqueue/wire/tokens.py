"""Delegated invocation tokens (contract/invocation.md §1.1)."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import Field

from fnqueue.wire.fields import Wire
from fnqueue.wire.keys import Snake

MAX_FUNCTIONS = 4


class NamedFunction(Wire):
    """A function, or one version of it."""

    function_id: UUID
    function_version_id: UUID | None = None


class CreateToken(Wire):
    """Body of `POST /tokens/functions/{functionId}[/versions/{versionId}]`. `client_id` is whoever will use the token:
    printable ASCII, for it reaches the container in a header."""

    client_id: Annotated[str, Field(max_length=128, pattern=r"^[!-~]([ -~]*[!-~])?$")]


class CreateTokenForFunctions(CreateToken):
    """Body of `POST /tokens/functions`. Without `functionVersionId`, all versions of the function."""

    functions: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_FUNCTIONS)]


class InvocationToken(Snake):
    """The token, once; `expires_in` is in seconds."""

    access_token: str
    expires_in: int
