"""Rate limits of a function version (contract/management.md §1.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from fnqueue.wire.fields import Wire


class RateLimitModel(Wire):
    """How often a version may be invoked. Rates are text such as `100-S, 500-H`: a number, a dash, and one of S, M,
    H, D. What makes a good rate, and which fields go together, is the server's to say."""

    rate_limit: Annotated[str, Field(max_length=256)] | None = None
    exempted_nca_ids: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=32)] | None = None
    per_nca_id_rate: (
        Annotated[
            dict[Annotated[str, Field(max_length=128)], Annotated[str, Field(max_length=256)]], Field(max_length=32)
        ]
        | None
    ) = None
    per_user_rate: Annotated[str, Field(max_length=256)] | None = None
    sync_check: bool | None = None


class SetRateLimit(RateLimitModel):
    """Body of `PUT /ratelimit/functions/{functionId}/versions/{versionId}`: the object itself, or within
    `{"rateLimit": …}` as it stands in a function."""

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, given: Any) -> Any:
        inner = given.get("rateLimit") if isinstance(given, Mapping) else None
        return inner if isinstance(inner, Mapping) else given
