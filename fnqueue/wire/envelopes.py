"""Invocation in an envelope (contract/invocation.md §3.2, §5): JSON in, JSON out."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fnqueue.wire.fields import Wire

AssetId = Annotated[
    str, Field(pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"), AfterValidator(str.lower)
]


class EnvelopeHeader(Wire):
    """What headers say otherwise: how long to hold the call, and which assets the function is given."""

    poll_duration_seconds: Annotated[int, Field(ge=0, le=3600)] | None = None
    input_asset_references: list[AssetId] | None = None


class Envelope(Wire):
    """Body of `POST /exec/functions/{functionId}`: `requestBody` is what the function is given, any JSON but null."""

    request_header: EnvelopeHeader = EnvelopeHeader()
    request_body: Any = Field(json_schema_extra={"not": {"type": "null"}})

    def content(self) -> bytes:
        """The JSON of `request_body`. Raises ValueError: it holds a number that is not finite."""
        return json.dumps(self.request_body, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


class EnvelopeAnswer(Wire):
    """Where a request stands. `response` is the function's JSON, `responseReference` where a larger answer is."""

    req_id: str
    status: Literal["fulfilled", "in-progress", "pending-evaluation"]
    percent_complete: Annotated[int, Field(ge=0)] | None = None
    response: Any = None
    response_reference: str | None = None
