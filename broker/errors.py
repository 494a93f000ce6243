"""Every error that the core raises on purpose.

    FnqueueError
    ├── BadRequest                  the caller sent something that can never work; names the field
    │   ├── PayloadTooLarge
    │   ├── IdempotencyKeyReused    same key, other body
    │   ├── NotConfigured           this server is not set up for it; says what its operator has to set
    │   └── StateConflict           the object is not in a state that allows this
    ├── Unauthenticated             no credential, or one that is not valid
    ├── Forbidden                   a valid credential that lacks the scope
    ├── NotFound                    unknown, or not the caller's: told apart nowhere
    │   ├── RequestExpired          was the caller's, and its time to live has passed
    ├── StreamNotKept               that part of a streamed answer is gone, or never was
    ├── AlreadyExists               there is one of that name
    ├── AlreadyFinished             a terminal request cannot be cancelled
    ├── RevisionConflict            somebody else wrote first; read again and retry
    ├── TryLater                    carries `retry_after_s`
    │   ├── QueueFull               the version has as much as it may
    │   ├── AccountFull             the account has as much queued and running as it may
    │   ├── RateLimited             the function's rate limit, as its author set it
    │   ├── TooManyRequests         too many management calls, or changes of a key
    │   ├── Overloaded              this process is at one of its own limits
    │   ├── NoCapacity              every card that could do it is taken
    │   └── Unavailable             a server behind us is away
    │       ├── QueueMissing        nothing consumes or holds this version's jobs
    │       ├── PublishUnconfirmed  the job may or may not be in the queue
    │       ├── CircuitOpen         it did not answer for so long that it was not asked
    │       ├── PublishRejected     the queue's own backstop refused the job
    │       ├── StoreUnavailable
    │       ├── RecordDamaged        what is stored there is nothing that any release of ours wrote
    │       ├── BlobsUnavailable
    │       └── LauncherUnavailable what runs instances is away, or failed at it
    └── ConfigurationError          a setting is wrong; the process cannot start

No class knows a status code: `api.problems` holds the only table.
"""

from __future__ import annotations


class FnqueueError(Exception):
    """Base of all; `str(error)` is one sentence fit to show to the caller."""


class BadRequest(FnqueueError):
    """`field` names the header, path part or body field at fault, when there is one."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PayloadTooLarge(BadRequest):
    """`limit_bytes` is the largest size that would have been accepted."""

    def __init__(self, message: str, *, limit_bytes: int) -> None:
        super().__init__(message)
        self.limit_bytes = limit_bytes


class IdempotencyKeyReused(BadRequest):
    pass


class NotConfigured(BadRequest):
    pass


class StateConflict(BadRequest):
    pass


class Unauthenticated(FnqueueError):
    pass


class Forbidden(FnqueueError):
    pass


class NotFound(FnqueueError):
    pass


class RequestExpired(NotFound):
    pass


class StreamNotKept(FnqueueError):
    pass


class AlreadyExists(FnqueueError):
    pass


class AlreadyFinished(FnqueueError):
    pass


class RevisionConflict(FnqueueError):
    pass


class TryLater(FnqueueError):
    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(TryLater):
    """`limit` is the setting that was met, "" for the queue's own backstop."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, limit: str = "") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class AccountFull(QueueFull):
    pass


class RateLimited(TryLater):
    pass


class TooManyRequests(TryLater):
    pass


class Overloaded(TryLater):
    pass


class NoCapacity(TryLater):
    pass


class Unavailable(TryLater):
    """`outcome_unknown` is true when the refused request could still run (PROTOCOL P5)."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, outcome_unknown: bool = False) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.outcome_unknown = outcome_unknown


class QueueMissing(Unavailable):
    pass


class PublishUnconfirmed(Unavailable):
    pass


class CircuitOpen(Unavailable):
    pass


class PublishRejected(Unavailable):
    pass


class StoreUnavailable(Unavailable):
    pass


class RecordDamaged(Unavailable):
    """Of a request: whoever has its message makes the record anew, so that it may still run. Of anything else: it
    takes an operator."""

    def __init__(self, message: str, *, outcome_unknown: bool = True) -> None:
        super().__init__(message, retry_after_s=5.0, outcome_unknown=outcome_unknown)


class BlobsUnavailable(Unavailable):
    pass


class LauncherUnavailable(Unavailable):
    pass


class ConfigurationError(FnqueueError):
    pass
