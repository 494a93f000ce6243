"""Dead letters: requests that ended `dead`, kept with their inputs (fnqueue's own)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import AwareDatetime, Field, model_validator

from fnqueue.wire.fields import Wire

MOST_AT_ONCE = 100
FASTEST_PER_S = 1000


class DeadLetter(Wire):
    """`cause` is `attempts-exhausted`, `worker-deaths`, `delivery-limit`, `rejected`, `queue-full` or `dead-lettered`,
    and `reason` says the same as a sentence. `redrivenAs` is the request that it was started again as."""

    request_id: str
    function_id: str
    function_version_id: str
    cause: str
    reason: str | None = None
    attempts: int
    size_bytes: int
    created_at: datetime
    died_at: datetime
    kept_until: datetime
    redriven_as: str | None = None
    redriven_at: datetime | None = None


class DeadLetterList(Wire):
    """The latest first. `cursor` asks for the next page, which may be empty; without one this is the last."""

    dead_letters: list[DeadLetter]
    cursor: str | None = None


class HeaderField(Wire):
    name: str
    value: str


class DeadLetterInput(Wire):
    """What the request was sent with. `body` is in Base64; where it is large, `bodyUrl` gives it for a while
    instead."""

    method: str
    target: str | None = None
    headers: list[HeaderField]
    body: str | None = None
    body_url: str | None = None
    input_assets: list[str] | None = None


class DeadLetterDetail(DeadLetter):
    """`input` is for the account that sent it."""

    input: DeadLetterInput | None = None


class DeadLetterVersionCount(Wire):
    function_id: str
    function_version_id: str
    count: int


class DeadLetterCause(Wire):
    """How many died of it, of which versions, and when the first and the last of them."""

    cause: str
    count: int
    first_died_at: datetime
    last_died_at: datetime
    versions: list[DeadLetterVersionCount]


class DeadLetterCauses(Wire):
    """The most frequent first."""

    causes: list[DeadLetterCause]


class SelectDeadLetters(Wire):
    """Which: those of `requestIds`, or those for which everything else holds that is given; `all` where nothing is."""

    request_ids: Annotated[list[UUID], Field(min_length=1, max_length=MOST_AT_ONCE)] | None = None
    function_id: UUID | None = None
    function_version_id: UUID | None = None
    causes: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=16)] | None = None
    died_after: AwareDatetime | None = None
    died_before: AwareDatetime | None = None
    all: bool = False

    @model_validator(mode="after")
    def _is_said(self) -> SelectDeadLetters:
        given = (self.function_id, self.function_version_id, self.causes, self.died_after, self.died_before)
        narrowed = any(one is not None for one in given)
        if self.request_ids is not None and (narrowed or self.all):
            raise ValueError("requestIds: nothing else goes with it")
        if not (self.request_ids or narrowed or self.all):
            raise ValueError("all: must be true where nothing else says which")
        return self


class RedriveDeadLetter(Wire):
    """To another version of its function, where one is named. `after` is the request that it was started again as last:
    to start it yet again."""

    function_version_id: UUID | None = None
    after: UUID | None = None


class DeadLetterRedriven(Wire):
    """`redrivenAs` is the new request, the same for whoever asks again."""

    request_id: str
    redriven_as: str


class RedriveDeadLetters(Wire):
    """At most `limit` of them, and `perSecond` in a second, to another version of their function where one is named;
    behind `cursor`, which the call before gave."""

    select: SelectDeadLetters
    function_version_id: UUID | None = None
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = 50
    per_second: Annotated[int, Field(ge=1, le=FASTEST_PER_S)] | None = None
    cursor: Annotated[str, Field(max_length=64)] | None = None


class DeadLetterLeft(Wire):
    request_id: str
    detail: str


class DeadLettersRedriven(Wire):
    """`left` were not started, and why. There is a `cursor` if there may be more; `stopped` says what kept the call
    from going on, if anything did."""

    redriven: list[DeadLetterRedriven]
    left: list[DeadLetterLeft]
    stopped: str | None = None
    retry_after_seconds: float | None = None
    cursor: str | None = None


class PurgeDeadLetters(Wire):
    """At most `limit` of them; behind `cursor`, which the call before gave."""

    select: SelectDeadLetters
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = 100
    cursor: Annotated[str, Field(max_length=64)] | None = None


class DeadLettersPurged(Wire):
    """There is a `cursor` if there may be more."""

    purged: int
    cursor: str | None = None
