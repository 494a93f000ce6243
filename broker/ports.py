"""What the verbs need, as Protocols: no vendor type, no HTTP type.

A back end is done when `tests/contract` is green for it. Every method bounds its own waits and raises the
errors named here; vendor errors never pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from broker.activity import Minute
from broker.keyring import Keyring
from broker.model import (
    NO_TIMINGS,
    Account,
    Blob,
    Chunk,
    Claim,
    Cluster,
    Crash,
    DeadLetter,
    DeadLetterFilter,
    DeadLetterPage,
    DeliveryState,
    Deployment,
    Draft,
    Ended,
    Epoch,
    Excerpt,
    Flow,
    Gpu,
    GpuSpecification,
    Instance,
    Interest,
    Job,
    Key,
    Lease,
    Line,
    Load,
    LogBatch,
    LogExcerpt,
    Login,
    Look,
    Outcome,
    Part,
    Position,
    Progress,
    Record,
    Redrive,
    RegistryCredentials,
    RequestFilter,
    RequestPage,
    RequestState,
    Secrets,
    Sharing,
    Survey,
    Taken,
    Tally,
    Timings,
    Version,
    WebhookBacklog,
    WebhookDelivery,
    WebhookFilter,
    WebhookLoan,
    WebhookPage,
    WebhookSecrets,
    WebhookTry,
    Window,
)
from broker.settings import Settings
from broker.telemetry.metrics import Metrics
from broker.telemetry.tracing import Tracing

T = TypeVar("T")


# -- Queue -------------------------------------------------------------------------------------


class Delivery(Protocol):
    """One message on loan. Exactly one of the three verbs ends the loan; a lost connection ends it too, and
    then the verbs do nothing: the broker delivers the message again."""

    @property
    def job(self) -> Job: ...

    @property
    def death(self) -> str:
        """Why the message was dead-lettered (`expired`, `rejected`, `delivery_limit`, `maxlen`), else ''."""

    @property
    def fault(self) -> str:
        """'' for whatever `consume` and `take` give. Of a dead letter: why it was not ours to run, because it could not
        be read, or was not signed as it is by this deployment. Then its job's id is a claim, and nothing else of it
        is to be used."""

    async def ack(self) -> None:
        """Done with it for good."""

    async def requeue(self) -> None:
        """Give it back, unspent, to whoever is free."""

    async def reject(self) -> None:
        """Send it to the dead letters."""


class Queue(Protocol):
    """Jobs in order of arrival, one queue per function version."""

    async def declare(self, version_id: str) -> None:
        """Make the version's queue exist, and return when a crash of the broker would not lose it. Idempotent.

        Raises Unavailable, or ConfigurationError when the name belongs to something else.
        """

    async def delete(self, version_id: str) -> None:
        """Remove the version's queue and what is in it. Idempotent. Raises Unavailable."""

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        """Return once the broker has the job safely.

        Raises:
            PublishRejected: refused; it is not in the queue.
            QueueMissing: the version has no queue; it is not in one.
            PublishUnconfirmed: it may be in the queue. Publishing the same job again is harmless.
            CircuitOpen: nothing was sent, and trying again at once is of no use.
            Unavailable: nothing was sent.
        """

    def consume(self, version_id: str, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Deliveries as they come, at most `prefetch` on loan at once, across reconnects, until closed.

        Closing stops the deliveries; loans already made stay valid until the Queue itself is closed.
        A message that cannot be read is rejected and never seen here.
        """

    def dead_letters(self, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Deliveries of every dead-lettered message, whatever version it came from; as `consume`."""

    async def take(self, version_id: str) -> Delivery | None:
        """One delivery now, or None when the queue is empty or missing. Raises Unavailable."""

    async def depth(self, version_id: str) -> int | None:
        """How many messages wait in the version's queue, or with "" among the dead letters, those on loan left out;
        None when there is no such queue. Raises Unavailable."""

    async def ping(self) -> None:
        """Return if a publish could work now. Raises Unavailable."""


# -- Results -----------------------------------------------------------------------------------

PAGE_SCAN = 1000
# Updates kept of one request's progress (contract/invocation.md §11, D7).
MOST_UPDATES = 256
# The last place in a queue that is told exactly.
FURTHEST = 1000
LANDMARKS = 33


class Watch(Protocol):
    """Notices changes of one request. A hint only means "read again"."""

    async def read(self) -> Record | None:
        """The record as it is now, and ask to be told of its next change."""

    async def changed(self, timeout_s: float) -> bool:
        """Return when a hint came since the last `read` or `changed`, when woken, or after `timeout_s`; whether a
        hint came."""

    def wake(self) -> None:
        """Let `changed` return."""


class Results(Protocol):
    """Records and results of requests. Every change is one compare-and-set that is safe to run twice, and
    time is the store's own. All methods raise StoreUnavailable when the store does not answer in time."""

    async def remember_key(self, account: str, key: str, *, request_id: str, digest: str) -> str:
        """Bind an idempotency key; returns the id it is bound to, `request_id` when it was free.

        Raises IdempotencyKeyReused when it is bound to another digest.
        """

    async def forget_key(self, account: str, key: str, *, request_id: str) -> None:
        """Free the key if it is still bound to `request_id`."""

    async def create(self, draft: Draft, *, queue_limit: int, watch: bool) -> Record:
        """Store a new `queued` record at the end of its version's order and as the newest of its account's, or return
        the one that exists (and count one more submitter). `watch` asks for hints to this process, as `Watch.read`
        does.

        Raises QueueFull, leaving nothing behind, when `queue_limit` requests already wait for the version, or its
        queued and running ones have as many as `version_requests` or as much as `version_bytes`; AccountFull likewise
        for the account. Each counts until it is terminal, once, whatever crashed in between.
        """

    async def abandon(self, request_id: str, version_id: str, *, reason: str) -> bool:
        """Put a tombstone on a record that its only submitter could not publish: it will never start.
        False when it is too late: it is running or terminal, or another submitter relies on it."""

    def watch(self, request_id: str, interest: Interest = Interest.END) -> AbstractAsyncContextManager[Watch]: ...

    def listen(self, request_id: str, told: Callable[[], None]) -> AbstractContextManager[None]:
        """While the body runs, `told` is called, in the loop, for each hint that the request may be over."""

    async def read(self, request_id: str) -> Record | None:
        """The record, None if there is none. A queued record past its deadline, or never started and past its queue
        deadline, is turned `expired` first. What is returned is as durable as the store is configured to make it.

        Raises StoreUnavailable, also while that durability is out of reach."""

    async def glance(self, request_id: str) -> Record | None:
        """As `read`, without the outcome, which may be megabytes."""

    async def page(self, account: str, wanted: RequestFilter, *, limit: int, after: int = 0) -> RequestPage:
        """The account's newest requests that `wanted` keeps, at most `limit`, each as `glance` shows it.

        At most PAGE_SCAN are looked at, so that a page may be short, or empty, and still have a next one. Found are
        those of the account's newest `listed_requests`; the order is that of acceptance and never changes, so that
        page after page shows each once. Abandoned ones are left out."""

    async def claim(self, job: Job, *, worker: str, lease_s: float, max_attempts: int, token: str = "") -> Claim:
        """Ask to run one attempt. A missing record is rebuilt from the job; an attempt past `max_attempts`, or one
        after `max_worker_deaths` workers let their lease run out, turns the record `dead`. The claim of a granted
        lease is watched: a cancel sends a hint. A new attempt has made no progress.

        `token` is the lease's, '' for a new one: whoever had no answer asks again with the same, and is granted the
        same attempt, its lease renewed. A grant is as durable as an end, or attempts would not count."""

    async def renew(self, lease: Lease, *, lease_s: float) -> RequestState:
        """Extend the lease. Anything but RUNNING means: stop, the attempt's result will be refused."""

    async def release(self, lease: Lease, *, refund: bool, reason: str = "") -> RequestState:
        """Give the attempt back: the record is `queued` again at its old place, or `errored` if a part of its answer
        was streamed. `refund` takes the attempt off the count, for work that never started. Of an attempt that was
        taken for lost meanwhile, it only takes the worker's death off the record: who says so lives. `reason` is kept
        with the attempt. Returns the state left behind."""

    async def postpone(self, lease: Lease, outcome: Outcome, *, wait_s: float) -> RequestState:
        """As `release` with a refund, and nobody is granted the request for `wait_s`: a claim before that is HELD.
        `outcome` becomes the result, `errored`, if the deadline comes before the next attempt. RUNNING means that
        the deadline is not further away than `wait_s`, and that nothing was changed."""

    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings = NO_TIMINGS
    ) -> RequestState:
        """Store the attempt's result if it is the first terminal one, durably. Returns the state that now
        stands; idempotent. Raises StoreUnavailable while durability is not reached: settle again."""

    async def report(self, lease: Lease, progress: Progress, *, sequence: int) -> RequestState:
        """Append to the running attempt's progress, unless an update of this `sequence` or a later one is there.
        At most MOST_UPDATES are kept, and `progress_kept_bytes` of them; the oldest make way. Anything but RUNNING
        means that it was refused."""

    async def updates(self, request_id: str, *, after: int, limit: int) -> list[Progress]:
        """The first `limit` updates numbered above `after` that are still there, in order. Takes nothing from polls.
        Those of an ended request stay for a few minutes."""

    async def end(self, job: Job, state: RequestState, *, reason: str, cause: str = "") -> Claim:
        """End a request that nobody runs (`dead`, `expired` or `cancelled`), rebuilding a missing record. `cause` is
        the DeadCause of one that becomes dead. HELD when a worker has a live lease on it."""

    async def cancel(self, request_id: str, *, reason: str) -> RequestState | None:
        """Turn a queued or running record `cancelled`; returns the state that stood before."""

    async def forget(self, request_id: str) -> None:
        """Hide a terminal record from every later `read`."""

    async def position(self, record: Record) -> Position:
        """Exact rank among those that wait for the record's version."""

    async def places(self, version_id: str, request_ids: Sequence[str]) -> list[Position]:
        """Where these stand among those that wait for the version, in the order asked, by one look at it; 0: not
        there. Of many, those beyond place FURTHEST are not looked for, and read FURTHEST."""

    async def load(self, version_ids: Sequence[str]) -> list[Load]:
        """One Load per version, in the order asked."""

    async def line(self, version_id: str) -> Line:
        """Who waits for the version, with LANDMARKS of them at most, evenly spread."""

    async def activity(self, version_ids: Sequence[str], *, minutes: int) -> list[tuple[Minute, ...]]:
        """What ended in the last `minutes` (1 to KEPT_MINUTES) of each version, in the order asked: a Minute for each,
        oldest first, the present one last. Every end counts once, a request that was given up before it was accepted
        does not. Of one that a crash or an outage cut off from its version, it may count later, or without its
        times."""

    async def sweep(self, version_id: str, *, limit: int) -> int:
        """Expire overdue records and drop strays from the version's order; at most `limit` looked at.
        Returns how many changed."""

    async def epoch(self, *, fresh: bool = False) -> Epoch:
        """The present life of the store's data, a few seconds old at most unless `fresh`."""

    async def ping(self) -> None: ...


# -- Dead letters ------------------------------------------------------------------------------


class DeadLetters(Protocol):
    """Dead requests with their inputs, for `dead_letter_ttl_s`, and of each account the latest `dead_letters_kept`.
    Every change is safe to run twice. All methods raise StoreUnavailable."""

    async def keep(self, job: Job, *, size_bytes: int) -> bool:
        """Keep the job of a request whose record is `dead`, durably. False when there is nothing to keep it for: the
        request is not dead, or its letter was kept before and is gone. `size_bytes` is that of its body."""

    async def read(self, request_id: str) -> DeadLetter | None:
        """With its job; None if there is none."""

    async def glance(self, request_id: str) -> DeadLetter | None:
        """As `read`, without the job."""

    async def page(self, account: str, wanted: DeadLetterFilter, *, limit: int, after: int = 0) -> DeadLetterPage:
        """Those of the account that died last and that `wanted` keeps, at most `limit`, each as `glance` shows it.

        At most PAGE_SCAN are looked at, so that a page may be short, or empty, and still have a next one."""

    async def tally(self, account: str, wanted: DeadLetterFilter) -> list[Tally]:
        """How many of the account's letters that `wanted` keeps have which cause in which version."""

    async def bind(self, request_id: str, candidate: str, *, after: str = "") -> Redrive | None:
        """Settle under which ID the request is started again, durably: the one that was settled before, or `candidate`
        when none was, or when that one is `after`. None without a letter.

        One that was settled longer ago than its record may have lived counts as done: whether it ran cannot be
        known."""

    async def unbind(self, request_id: str, redrive_id: str) -> None:
        """Forget an ID that was settled and that no request has."""

    async def redriven(self, request_id: str, redrive_id: str) -> None:
        """Note in letter and record that the request was started again under the ID that was settled."""

    async def drop(self, account: str, request_id: str) -> DeadLetter | None:
        """Remove a letter, and return it without its job; None if there is none. It is not kept again."""


# -- Webhooks ----------------------------------------------------------------------------------


# Of one delivery, the latest that its log holds.
MOST_TRIES = 20


class Webhooks(Protocol):
    """What is to be told to the callbacks of requests that ended, for `webhook_ttl_s`, and of each account the latest
    `webhooks_kept`.

    One is there from the moment in which its request's record becomes terminal, by the same change. That it is due is
    seen at once, or, when the process that ended the request died just then, some minutes later at most. All methods
    raise StoreUnavailable.
    """

    async def take(self, *, limit: int, lease_s: float) -> tuple[list[WebhookLoan], bool]:
        """Deliveries that are due, of at most `limit` looked at, and whether there may be more. Nobody else is given
        them before `lease_s` have passed."""

    async def note(self, loan: WebhookLoan, tried: WebhookTry, *, state: DeliveryState, wait_s: float = 0.0) -> bool:
        """End the loan with what became of it, durably: a PENDING one is due again after `wait_s`. False when somebody
        else has noted this try before, or the delivery is gone; then nothing was changed."""

    async def put_back(self, loan: WebhookLoan, *, wait_s: float) -> None:
        """End the loan without a try. The delivery is due again after `wait_s`."""

    async def backlog(self) -> WebhookBacklog:
        """What is due and was taken by nobody yet."""

    async def read(self, request_id: str) -> WebhookDelivery | None: ...

    async def page(self, account: str, wanted: WebhookFilter, *, limit: int, after: int = 0) -> WebhookPage:
        """The account's latest ones that `wanted` keeps, at most `limit`, by when they were first taken.

        At most PAGE_SCAN are looked at, so that a page may be short, or empty, and still have a next one."""

    async def again(self, request_id: str) -> WebhookDelivery | None:
        """Make one due now, whatever became of it, and begin its tries anew; as it then stands, None if there is
        none."""


# -- Upkeep ------------------------------------------------------------------------------------


class Upkeep(Protocol):
    """Keeps the books of the store straight: records, and beside them the places of requests in their versions.

    Every method looks at a bounded number of things and may be broken off anywhere. None ends a request that is not
    overdue: a front end that was paused between record and publish may still answer 202 for it, so that only it may
    abandon it (PROTOCOL §2.4). All raise StoreUnavailable.
    """

    async def survey(self, cursor: int, *, limit: int) -> Survey:
        """Look at the records from `cursor` on, 0 for the first, about `limit` keys of the store: count them, expire
        what is overdue, and give a place to what has none, so that it expires in time. While requests come and go, one
        may be counted twice, or in the state before; one that exists all the time is seen."""

    async def straighten(self, version_id: str, *, skip: int, limit: int) -> tuple[int, bool]:
        """See that the places `skip` to `skip + limit` of the version's waiting and running requests are those of
        requests that wait and run. Returns how many changed, and whether there are more places."""

    async def restore(self, job: Job) -> RequestState:
        """Make a lost record again from its message, see that the request has its place among those that wait or run,
        and return its state."""

    async def set_aside(self, version_id: str, *, older_than_s: float, limit: int) -> int:
        """Take requests that were accepted longer ago than `older_than_s` and still wait out of the version's order, so
        that nothing is kept running for them; not those that were postponed. They stay `queued`: a claim is granted as
        ever, and they expire when they are due. Returns how many, of the oldest `limit`."""


# -- Streams -----------------------------------------------------------------------------------


class StreamWriter(Protocol):
    """Appends to the stream of one attempt, as long as its lease holds."""

    async def append(self, chunks: Sequence[Chunk] = (), *, head: Outcome | None = None) -> Flow:
        """Append `chunks`, in order and without gaps, and make `head` known; repeating an append is harmless.
        Without either, only say how the stream stands.

        Once a chunk was appended, the request is not run again: an attempt that then is released, or whose worker
        falls silent, ends `errored` with STREAM_CUT.
        """

    async def drained(self, timeout_s: float) -> None:
        """Return when a reader has caught up with what the last append left unread, or after `timeout_s`."""


class StreamReader(Protocol):
    """Reads the stream of one request."""

    async def read(self, after: int, *, limit_bytes: int, attended_s: float = 0.0) -> Excerpt | None:
        """What is in the stream behind offset `after`, about `limit_bytes` of it and at least one chunk, and ask to
        be told when there is more. None if there is no such request.

        A worker that has been silent past its lease for as long again as a lease lasts is taken for dead here: after
        an outage of the store, readers and workers are back at about the same time.

        The first chunk begins at `after` unless what lies between is not kept any more. `attended_s` says how long
        the caller means to be there, and that it is done with everything before `after`; 0 is for one who only looks.
        The writer learns of that in steps, of a sixteenth of what is kept at most.
        """

    async def changed(self, timeout_s: float) -> None:
        """Return when a hint came since the last `read` or `changed`, or after `timeout_s`."""

    async def leave(self, *, expected_back: bool) -> None:
        """Nobody reads here now. Unless a reader is `expected_back` at any time, the writer's patience begins to
        run out."""


class Streams(Protocol):
    """Answers that are handed on while they come: for each request one ordered log of limited size, in which the
    latest `stream_bytes` are kept, for as long as the request's record. All methods raise StoreUnavailable."""

    def write(self, lease: Lease) -> AbstractAsyncContextManager[StreamWriter]: ...

    def follow(self, request_id: str) -> AbstractAsyncContextManager[StreamReader]: ...


# -- Catalog -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """An item and the revision under which it stands."""

    item: T
    revision: int


class Table(Protocol[T]):
    """Items of one noun by key, with optimistic revisions. All raise StoreUnavailable."""

    async def get(self, key: str) -> Row[T] | None: ...

    async def list(self, index: str = "", value: str = "") -> list[Row[T]]:
        """All rows, or those whose `index` equals `value`, or holds it if it is a tuple; oldest key first.
        Unknown indexes are a bug."""

    async def put(self, item: T, *, revision: int = 0) -> int:
        """Write if the stored revision is `revision` (0: if there is none); returns the new revision, which no row
        of this key had before, also if it was deleted meanwhile. Raises RevisionConflict."""

    async def delete(self, key: str) -> bool:
        """Whether there was one."""


# What is held against an instance that neither answers nor is replaced.
CRASHES_KEPT_S = 86_400.0


class Catalog(Protocol):
    """What was defined and desired, and what the instances report."""

    @property
    def versions(self) -> Table[Version]:
        """Key: version id. Indexes: `function_id`, `account`."""

    @property
    def deployments(self) -> Table[Deployment]:
        """Key: version id. Index: `account`."""

    @property
    def keys(self) -> Table[Key]:
        """Key: hash. Index: `account`."""

    @property
    def clusters(self) -> Table[Cluster]:
        """Key: cluster id. Index: `account`."""

    @property
    def accounts(self) -> Table[Account]:
        """Key: account id."""

    @property
    def sharing(self) -> Table[Sharing]:
        """Key: function id. Index: `shared_with`."""

    @property
    def secrets(self) -> Table[Secrets]:
        """Key: version id."""

    @property
    def registry_credentials(self) -> Table[RegistryCredentials]:
        """Key: account."""

    @property
    def webhook_secrets(self) -> Table[WebhookSecrets]:
        """Key: account."""

    async def beat(self, instance: Instance, *, ttl_s: float) -> None:
        """Report an instance; it vanishes `ttl_s` after its last beat."""

    async def instances(self, version_id: str) -> list[Instance]: ...

    async def retire(self, instance: Instance) -> None:
        """Take an instance's report away at once."""

    async def note_crash(self, version_id: str, instance_id: str, crash: Crash) -> None:
        """Add to what is held against an instance; nothing, if it is there already. All of it is forgotten
        CRASHES_KEPT_S after the last one."""

    async def crashes(self, version_id: str, instance_id: str) -> list[Crash]:
        """What is held against an instance, in no order."""

    async def forget_crashes(self, version_id: str, instance_id: str) -> None: ...

    async def offer(self, gpus: Sequence[Gpu], *, ttl_s: float) -> None:
        """Publish the inventory of the controller's launcher."""

    async def gpus(self) -> list[Gpu]: ...

    async def lead(self, holder: str, *, ttl_s: float) -> bool:
        """Become or stay the one active controller; false while another holder's time has not run out."""

    async def resign(self, holder: str) -> None: ...


# -- Counters ----------------------------------------------------------------------------------

WINDOW_PARTS = 50


class Counters(Protocol):
    """Counts what was taken in sliding windows, for all processes that share the store.

    Time is cut into parts of a WINDOW_PARTS-th of a window, by the store's clock, and a window covers the current
    part and the WINDOW_PARTS before it. So, for a rate of N in W seconds:
      - never are more than N granted in any span of W seconds, wherever it begins, with any number of processes;
      - what was taken is given back after W, and at most W / WINDOW_PARTS later; until then a burst may take all N.
    A log of every take would give back on time, at the price of N entries a window.
    """

    async def take(self, partition: str, windows: Sequence[Window]) -> Taken:
        """Take one from every window, or from none when one of them has nothing left.

        Windows of one partition are taken together atomically, and of different ones never. A take whose answer
        is lost on the way may be counted and not known, or counted twice: the limit holds, and less is granted.

        Raises StoreUnavailable.
        """


# -- Instance logs -----------------------------------------------------------------------------

# Of one part of an instance, what is copied at once.
LOG_LINES = 1000
LOG_BYTES = 128 * 1024
# Of one version, what is kept; and how long once nobody looks.
LOGS_KEPT_BYTES = 4 * 1024 * 1024
LOGS_KEPT_S = 60.0
# Of instances that are gone: how long their last lines are shown, of how many of a version, and how much of each.
ENDED_KEPT_S = 3600.0
MOST_ENDED = 5
ENDED_LINES = 200
ENDED_BYTES = 64 * 1024
# So much may be looked at at once, by all accounts and by one.
MOST_LOOKS = 256
MOST_ACCOUNT_LOOKS = 32


class InstanceLogs(Protocol):
    """What instances write, by way of those who run them to those who ask: it is copied here only while somebody looks,
    and the latest LOGS_KEPT_BYTES of a version are kept. All methods raise StoreUnavailable."""

    async def look(self, look: Look, *, ttl_s: float) -> None:
        """Ask for copies for `ttl_s`, or for that long again. The first look at a version begins anew: nothing is
        there, and no position.

        Raises Overloaded: MOST_LOOKS or MOST_ACCOUNT_LOOKS others go on."""

    async def looks(self) -> list[Look]:
        """All that go on."""

    async def positions(self, version_id: str) -> Mapping[tuple[str, Part], str]:
        """Up to where each part of each instance was copied; none for those of which nothing was yet."""

    async def append(self, batch: LogBatch, *, before: str, after: str) -> bool:
        """Add the lines and move the part's position from `before` to `after`, or do nothing and return False where it
        stands elsewhere: somebody else copied them. There may be no lines."""

    async def read(self, version_id: str, *, after: str = "", limit: int) -> list[LogBatch]:
        """The first `limit` batches behind the one of the ID `after`, in order."""


# -- Blobs -------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes bytes in order, and blocks while they cannot be taken."""

    def write(self, data: bytes, /) -> int: ...

    def flush(self) -> None: ...


class Blobs(Protocol):
    """Large bytes by key (`assets/<account>/<uuid>`, `inputs/…`, `results/…`). Raise BlobsUnavailable."""

    def upload_url(
        self, key: str, *, content_type: str, description: str, expires_s: float, size_bytes: int = 0
    ) -> str:
        """A URL that takes one PUT with exactly this Content-Type and x-amz-meta-nvcf-asset-description, of exactly
        `size_bytes` unless that is 0."""

    def download_url(self, key: str, *, filename: str, expires_s: float) -> str:
        """A URL that gives the object to whoever holds it, as an attachment, until it expires."""

    async def head(self, key: str) -> Blob | None: ...

    async def list(self, prefix: str) -> list[Blob]:
        """Everything under `prefix`, which ends in '/'; content type and description may be empty."""

    async def put(self, key: str, body: bytes, *, content_type: str) -> str:
        """Returns the body's SHA-256, in hex, which is worked out on the way."""

    async def get(self, key: str, *, limit_bytes: int) -> bytes:
        """Raises NotFound, or PayloadTooLarge past the limit."""

    async def upload(self, key: str, write: Callable[[Sink], None], *, content_type: str, scratch: Path) -> None:
        """Store what `write` writes, whole or not at all; memory stays flat, and so does what lies in the folder
        `scratch` meanwhile. `write` runs in a thread, and what it raises is raised here. When this is cancelled, its
        next write fails."""

    async def download(self, key: str, path: Path) -> None:
        """Write an object to a new file; memory stays flat. Raises NotFound."""

    async def copy(self, source: str, target: str) -> None:
        """Store an object once more under another key, without its description. Raises NotFound."""

    async def delete(self, key: str) -> bool:
        """Whether it was there."""

    async def discard(self, key: str) -> None:
        """As `delete`, for who does not ask."""

    async def page(self, prefix: str, *, after: str, limit: int) -> tuple[Blob, ...]:
        """As `list`, by key, at most `limit` (up to 1000) of those behind the key `after`, "" for the first ones. None
        are there any more when it is empty."""

    async def discard_unfinished(self, *, older_than_s: float) -> int:
        """Remove what writes left behind that began so long ago and never ended; returns how many."""

    async def ping(self) -> None: ...


# -- Launcher ----------------------------------------------------------------------------------


class Launched(Protocol):
    """An instance as its launcher sees it. `error` is why it is not alive, with the tail of its log."""

    @property
    def instance_id(self) -> str: ...

    @property
    def version_id(self) -> str: ...

    @property
    def specification_id(self) -> str: ...

    @property
    def alive(self) -> bool: ...

    @property
    def error(self) -> str: ...


class Launcher(Protocol):
    """Starts and stops instances: a container and its sidecar each."""

    @property
    def leaves_running(self) -> bool:
        """Whether its instances go on when their controller ends, for another one to find. Otherwise the controller
        drains and stops them first."""

    async def gpus(self) -> list[Gpu]: ...

    async def start(
        self,
        instance_id: str,
        version: Version,
        specification: GpuSpecification,
        *,
        secrets: bytes | None = None,
        login: Login | None = None,
    ) -> None:
        """Begin to start an instance, and return soon; its sidecar reports when it is ready, and what goes wrong
        meanwhile is its `error`. `secrets` is the content of its secrets file, there before the container starts;
        None for a version without. `login` is for the registry of its image, None for one that needs none.

        Raises:
            ConfigurationError: it can never start (an unknown image, say).
            NoCapacity: only room is missing.
            LauncherUnavailable: what runs instances is away.
        """

    async def deliver(self, instance_id: str, secrets: bytes) -> None:
        """Replace an instance's secrets file in one step. Nothing, if the instance is gone or started without."""

    async def stop(self, instance_id: str, *, grace_s: float) -> None:
        """Drain for at most `grace_s`, then end it and forget it. Idempotent."""

    async def launched(self) -> list[Launched]:
        """Every instance started here and not yet stopped, the dead ones included."""

    async def log(self, instance_id: str, part: Part, *, after: str) -> LogExcerpt:
        """What a part of an instance wrote behind a position, or from the beginning with '': of it the latest
        LOG_LINES in LOG_BYTES at most. Nothing of an instance that is not there and not one of `ended`. Raises
        LauncherUnavailable."""

    async def ended(self) -> Sequence[Ended]:
        """The instances that were stopped here in the last ENDED_KEPT_S and whose logs are still there, newest first.
        Raises LauncherUnavailable."""


# -- Fleet -------------------------------------------------------------------------------------


class Replica(Launched, Protocol):
    """An instance that its platform started, and starts again in its place when its containers end. One that is being
    ended is not alive, and stands here until it has gone."""

    @property
    def delay(self) -> str:
        """What keeps it from being started, '' if nothing does: no room, most often."""

    @property
    def restarts(self) -> int:
        """How often one of its containers was started again."""


@runtime_checkable
class Fleet(Protocol):
    """Keeps whole GPU specifications running, where a platform starts and stops the instances by itself and chooses
    their number between minimum and maximum. In the place of a Launcher. All methods raise LauncherUnavailable."""

    async def gpus(self) -> list[Gpu]: ...

    async def keep(
        self,
        version: Version,
        specification: GpuSpecification,
        *,
        secrets: bytes | None = None,
        login: Login | None = None,
    ) -> None:
        """Make the platform keep instances of `specification`, now as it is given here. Idempotent, and cheap while
        nothing changes. `secrets` is the content of their secrets file, which running ones see replaced within about
        a minute; `login` is for the registry of the image. Raises ConfigurationError when they can never start."""

    async def drop(self, specification_id: str, *, grace_s: float) -> None:
        """Begin to end the instances of a specification, and all that was made for it. Idempotent; it is over when
        neither `kept` nor `replicas` shows it."""

    async def evict(self, instance_id: str) -> None:
        """Begin to drain and end one instance; the platform puts another one in its place. Idempotent."""

    async def weigh(self, busy: Mapping[str, bool]) -> None:
        """Tell which instances have work and which do not, so that of two the platform takes the idle one away."""

    async def kept(self) -> Mapping[str, str]:
        """The version's ID of each specification that is kept, or not yet wholly dropped."""

    async def replicas(self) -> Sequence[Replica]:
        """Every instance of the kept specifications."""

    async def log(self, instance_id: str, part: Part, *, after: str) -> LogExcerpt:
        """As that of a Launcher."""


# -- Users -------------------------------------------------------------------------------------


class Users(Protocol):
    """Users of the queue's server for the sidecars of single versions."""

    async def admit(self, version_ids: Collection[str], *, look: bool = False) -> None:
        """They are there from now on. Idempotent, and cheap for those that it made before, unless it is to `look`
        whether they still are. Raises LauncherUnavailable."""

    async def expel(self, version_id: str) -> None:
        """Remove a version's, which ends its connections. Idempotent. Raises LauncherUnavailable."""


class NoUsers:
    """Where sidecars come in by one user for all."""

    async def admit(self, version_ids: Collection[str], *, look: bool = False) -> None:
        return

    async def expel(self, version_id: str) -> None:
        return


class Circuit(Protocol):
    """How this process and one server get on; both counts are since it began."""

    @property
    def server(self) -> str:
        """`queue`, `store` or `blobs`."""

    @property
    def open(self) -> bool:
        """Whether it has been away for so long that it is not asked."""

    @property
    def opened(self) -> int:
        """How often it came to that."""

    @property
    def connections(self) -> int:
        """How many were made to it; 0 where nobody counts them."""


@runtime_checkable
class Guarded(Protocol):
    """A back end whose server can be away."""

    @property
    def circuit(self) -> Circuit: ...


class Store(NamedTuple):
    """The ports that one store serves together."""

    results: Results
    catalog: Catalog
    counters: Counters
    streams: Streams
    upkeep: Upkeep
    dead_letters: DeadLetters
    webhooks: Webhooks
    instance_logs: InstanceLogs


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """The data ports of one process, opened together by `broker.connect` and handed to every verb, and what the process
    tells of itself."""

    queue: Queue
    results: Results
    streams: Streams
    catalog: Catalog
    counters: Counters
    upkeep: Upkeep
    dead_letters: DeadLetters
    webhooks: Webhooks
    instance_logs: InstanceLogs
    blobs: Blobs
    settings: Settings
    keyring: Keyring
    users: Users = field(default_factory=NoUsers)
    circuits: tuple[Circuit, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)
    tracing: Tracing | None = None
