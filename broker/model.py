"""The nouns of the house and their states: frozen values, no behaviour that needs a server.

Times that end in `_at` are unix seconds by the store's clock; durations end in `_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

from broker.nouns import noun

# -- webhooks, as they are asked for -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Callback:
    """Where it is told that a request ended, and of which ends: states of requests, () for all. No blanks in it."""

    url: str
    events: tuple[str, ...] = ()


# -- functions ---------------------------------------------------------------------------------


class FunctionStatus(StrEnum):
    """Status of one version (contract/management.md §1.10)."""

    ACTIVE = "ACTIVE"
    DEPLOYING = "DEPLOYING"
    ERROR = "ERROR"
    INACTIVE = "INACTIVE"
    DELETED = "DELETED"
    DEGRADING = "DEGRADING"
    DEGRADED = "DEGRADED"

    @property
    def invocable(self) -> bool:
        return self in (FunctionStatus.ACTIVE, FunctionStatus.DEGRADING)

    @property
    def busy(self) -> bool:
        """Deployed, and its deployment may be changed."""
        return self not in (FunctionStatus.INACTIVE, FunctionStatus.ERROR, FunctionStatus.DELETED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How to ask a container whether it is ready. `timeout` is an ISO-8601 duration as the user wrote it."""

    protocol: str = "HTTP"
    uri: str = "/v2/health/ready"
    port: int = 8000
    timeout: str = "PT10S"
    expected_status: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """At most `limit` in any span of `window_s` seconds."""

    limit: int
    window_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """How often a version may be invoked (contract/management.md §1.4). All rates of a tuple hold together.

    `rates` count each calling account by itself; `per_account` replaces them for the accounts it names, and
    `exempted` accounts have none. `per_user` holds beside those, for each credential. `sync_check` is kept and
    shown only: every check here is the strict one.
    """

    rates: tuple[Rate, ...] = ()
    exempted: tuple[str, ...] = ()
    per_account: tuple[tuple[str, tuple[Rate, ...]], ...] = ()
    per_user: tuple[Rate, ...] = ()
    sync_check: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmConfig:
    """Of a model of an LLM function; stored and shown, and read by nothing here."""

    uris: tuple[str, ...] = ()
    tokenizer: str = ""
    token_rate_limit: str = ""
    routing_method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`llm` is there for the models of LLM functions; `version` and `uri` for all others."""

    name: str
    version: str = ""
    uri: str = ""
    llm: LlmConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    name: str
    version: str
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Priority:
    """Of an LLM function's invocations; stored and shown, and read by nothing here."""

    default: int | None = None
    per_account: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetries:
    """IDs of the endpoints that a version's logs, metrics and traces go to; '' for none."""

    logs: str = ""
    metrics: str = ""
    traces: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One immutable definition of a function. After creation only `status`, `tags`, `rate_limit`, `priority`, the
    token limits and routing of `models` change, and `weight`: its per cent of the calls that name the function only,
    None for an even part of what the others leave, and `callback`, for requests of its own account that bring none.

    `queue_timeout_s` and `run_timeout_s` hold for requests that bring no limit of their own; 0 is none.
    """

    id: str
    function_id: str
    account: str
    name: str
    inference_url: str
    container_image: str
    created_at: float
    inference_port: int = 8000
    health: Health = field(default_factory=Health)
    container_args: str = ""
    container_environment: tuple[tuple[str, str], ...] = ()
    api_body_format: str = "CUSTOM"
    function_type: str = "DEFAULT"
    description: str = ""
    tags: tuple[str, ...] = ()
    status: FunctionStatus = FunctionStatus.INACTIVE
    models: tuple[Model, ...] = ()
    resources: tuple[Resource, ...] = ()
    helm_chart: str = ""
    helm_chart_service_name: str = ""
    rate_limit: RateLimit | None = None
    telemetries: Telemetries | None = None
    priority: Priority | None = None
    queue_timeout_s: float = 0.0
    run_timeout_s: float = 0.0
    weight: float | None = None
    callback: Callback | None = None


EVERYONE = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """The accounts beside its owner's that may see and invoke a function: `parties` all its versions, future ones
    included, and in `versions` those of one version only. EVERYONE makes it public."""

    function_id: str
    account: str
    parties: tuple[str, ...] = ()
    versions: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def shared_with(self) -> tuple[str, ...]:
        """Everybody named on any level, once."""
        named = (*self.parties, *(party for _, parties in self.versions for party in parties))
        return tuple(dict.fromkeys(named))

    def level(self, version_id: str) -> tuple[str, ...]:
        """The parties of one version alone, or those of the function for ""."""
        return dict(self.versions).get(version_id, ()) if version_id else self.parties

    def of(self, version_id: str) -> tuple[str, ...]:
        """Who may use a version: the function's parties and its own."""
        return tuple(dict.fromkeys((*self.parties, *self.level(version_id))))


# -- deployments -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stickiness:
    """For at least `threshold` out of the last `size`: ISO-8601 durations as the user wrote them."""

    size: str
    threshold: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """When utilisation passes `threshold` per cent, multiply the instances by `factor`."""

    factor: float
    threshold: int
    metric: str = ""
    stickiness: Stickiness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """A user's own policy; a half that is None is the platform's."""

    up: Scaling | None = None
    down: Scaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpecification:
    """How many instances of one kind a deployment keeps: `min_instances` to `max_instances`.

    It may be placed in any of the `clusters` and `regions`, where there are all of the `attributes`; empty ones are no
    bound. `facts` is what the inventory told of the machine (`cpu_arch`, `os`, …); they and `availability_zones` are
    shown and read by nothing.
    """

    id: str
    gpu: str
    instance_type: str
    min_instances: int
    max_instances: int
    max_request_concurrency: int = 1
    backend: str = ""
    clusters: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    availability_zones: tuple[str, ...] = ()
    preferred_order: int = 1
    autoscaling: Autoscaling | None = None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthInfo:
    """Why a GPU specification has no healthy instance; `error` is the tail of a log, or a sentence."""

    gpu: str
    instance_type: str
    backend: str
    error: str
    specification_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The desired state of one version. `draining` means undeployed, and kept until its queue is empty;
    `removing`, that the controller deletes the queue now, and nobody may deploy in its place. `evicted` are IDs of
    instances that an operator wants gone."""

    id: str
    function_id: str
    version_id: str
    account: str
    specifications: tuple[GpuSpecification, ...]
    created_at: float
    updated_at: float
    health: tuple[HealthInfo, ...] = ()
    undeployed: bool = False
    draining: bool = False
    removing: bool = False
    evicted: tuple[str, ...] = ()


class InstanceStatus(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    ERRORED = "ERRORED"
    TERMINATED = "TERMINATED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One replica: an inference container and its sidecar. Written by the sidecar, kept alive by its beat. One that is
    `quarantined` takes no more work, and is there to be replaced. `status_address` is `host:port` of its metrics, ""
    for none."""

    id: str
    function_id: str
    version_id: str
    account: str
    gpu: str
    instance_type: str
    backend: str
    status: InstanceStatus
    created_at: float
    updated_at: float
    slots: int = 1
    busy: int = 0
    error: str = ""
    specification_id: str = ""
    location: str = ""
    quarantined: bool = False
    status_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """A request that was in an instance when its container or its sidecar died. Times are by the clock of `origin`, the
    process that saw it; "" is the store, where a lease ran out."""

    request_id: str
    origin: str
    began_at: float
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a controller's instances run, in its operator's words."""

    cluster: str = ""
    region: str = ""
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One instance type on offer. Of one GPU, the first type on offer is its default.

    `capacity` counts the instances of this type that fit when nothing else runs. `gpu_count`, `cpu_cores` and
    `system_memory_bytes` are what one instance may count on; `gpu_memory_bytes` is that of each card. 0 and '' mean
    not known, or none.
    """

    name: str
    instance_type: str
    backend: str
    capacity: int
    gpu_count: int = 0
    cpu_cores: int = 0
    system_memory_bytes: int = 0
    gpu_memory_bytes: int = 0
    cpu_arch: str = ""
    os: str = ""
    driver_version: str = ""
    place: Place = Place()


# -- clusters ----------------------------------------------------------------------------------


class ClusterState(StrEnum):
    """What an operator can meet (contract/management.md §3.4). UNHEALTHY and ABANDONED follow from silence."""

    READY = "READY"
    NOT_READY = "NOT_READY"
    UNHEALTHY = "UNHEALTHY"
    PAUSED = "PAUSED"
    FAILED = "FAILED"
    CORDON = "CORDON"
    CORDON_AND_DRAIN = "CORDON_AND_DRAIN"
    ABANDONED = "ABANDONED"
    DELETED = "DELETED"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterType:
    """One instance type of a registered cluster. `value` is what its nodes call it."""

    name: str
    value: str
    description: str = ""
    default: bool = False
    gpu_count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterGpu:
    """One GPU of a registered cluster: how many of it the cluster has, and how many are in use."""

    name: str
    capacity: int
    types: tuple[ClusterType, ...]
    allocated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster as it was registered, and what its agent last said of it. `state` is the agent's own word, at
    `seen_at`; 0: it has never been heard. `authorized` accounts see its group beside the owner; `*` is everyone."""

    id: str
    account: str
    name: str
    group: str
    cloud_provider: str
    region: str
    created_at: float
    updated_at: float
    agent_version: str = ""
    kubernetes_version: str = ""
    authorized: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    custom_attributes: tuple[tuple[str, str], ...] = ()
    oidc_issuer: str = ""
    jwks: str = ""
    gpus: tuple[ClusterGpu, ...] = ()
    state: ClusterState = ClusterState.NOT_READY
    seen_at: float = 0.0


# -- requests ----------------------------------------------------------------------------------


class RequestState(StrEnum):
    """`queued -> running -> one terminal state`; the first terminal state never changes (PROTOCOL §2.4).

    EXPIRED came too late for its queue timeout or for its deadline, which `Record.overslept` tells apart; TIMED_OUT
    was cut off in an attempt that took longer than its run timeout.
    """

    QUEUED = "queued"
    RUNNING = "running"
    FULFILLED = "fulfilled"
    ERRORED = "errored"
    EXPIRED = "expired"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    DEAD = "dead"
    ABANDONED = "abandoned"

    @property
    def terminal(self) -> bool:
        return self is not RequestState.QUEUED and self is not RequestState.RUNNING


EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """Where the one front end that holds the caller's connection waits for the sidecar that runs the job.

    `token` opens it once and is a secret. `websocket` tells whether the caller asked for a WebSocket; else
    `body_bytes` is the declared length of the body that will come over the channel, -1 when it was not declared.
    """

    url: str
    token: str = field(repr=False)
    websocket: bool = False
    body_bytes: int = -1


@noun(frozen=True, slots=True, kw_only=True)
class Job:
    """What travels through the queue: enough to run the request and to rebuild its record.

    `body` is the request body unless it was too large for a message; then `body_key` names the blob, which has
    `blob_bytes`, and `body_sha256` is the digest of what is in it, in hex; "" of a job that an older release accepted.
    `headers` are the client's, already filtered; `poll_s` is how long the accepting call may wait, `region` where it
    was accepted. `queue_deadline_at` and `run_timeout_s` are as in `Record`.
    `target` is the path and query to ask the container for, "" for its inference path. `streaming` sends the answer
    to the request's stream as it comes (`broker.ports.Streams`). With a `channel`, body and answer go over it, and
    there is one attempt only: what a container was sent over a channel cannot be sent again.
    """

    id: str
    account: str
    function_id: str
    version_id: str
    subject: str
    created_at: float
    deadline_at: float
    digest: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    body_key: str = ""
    assets: tuple[str, ...] = ()
    passthrough: bool = False
    poll_s: int = 60
    queue_deadline_at: float = 0.0
    run_timeout_s: float = 0.0
    region: str = ""
    method: str = "POST"
    target: str = ""
    streaming: bool = False
    channel: Channel | None = None
    body_sha256: str = ""
    blob_bytes: int = 0
    callback: Callback | None = None

    @property
    def size_bytes(self) -> int:
        """Of the request body, wherever it is."""
        return len(self.body) + self.blob_bytes


@noun(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the container answered, or what we answer in its place.

    `blob_key` names a zip in the blob store when the answer was too large to keep inline, and `streamed` says that
    the whole body went to the request's stream; `body` is then empty.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    blob_key: str = ""
    streamed: bool = False

    @property
    def event_stream(self) -> bool:
        """Whether the body is server-sent events, and not compressed, so that one can be told from the next."""
        named = {name.lower(): value.lower() for name, value in self.headers}
        kind = named.get("content-type", "").partition(";")[0].strip()
        return kind == EVENT_STREAM and named.get("content-encoding", "identity") == "identity"


class DeadCause(StrEnum):
    """Why a request is `dead`. REJECTED: a worker could not take its message for one of its own; OTHER: the queue gave
    its message up and does not say why."""

    ATTEMPTS = "attempts-exhausted"
    WORKER_DEATHS = "worker-deaths"
    DELIVERY_LIMIT = "delivery-limit"
    REJECTED = "rejected"
    QUEUE_FULL = "queue-full"
    OTHER = "dead-lettered"


class AttemptEnd(StrEnum):
    """What became of an attempt. RETURNED cost none of the attempts that a request has; the last six are those of the
    request that ended with it."""

    RUNNING = "running"
    LOST = "lost"
    FAILED = "failed"
    RETURNED = "returned"
    FULFILLED = "fulfilled"
    ERRORED = "errored"
    EXPIRED = "expired"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    DEAD = "dead"


@noun(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One worker's turn: LOST when its lease ran out, FAILED when it lost its container, RETURNED when it gave the
    request back unspent. `ended_at` is 0 while it runs. `reason` is its worker's word on why it came to nothing, in one
    sentence; '' where it said none."""

    number: int
    worker: str
    started_at: float
    ended_at: float
    end: AttemptEnd
    reason: str = ""


@noun(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long the parts of the attempt took that ended its request, by its worker's clock.

    `cold_start_s` is the part of the wait before it in which no instance of the version was ready, of which only the
    first instance to become so can tell. `inputs_s` is what laying out assets and body took, `container_s` the
    container's own time, `upload_s` that of storing a large answer.

    `start_s` and `lead_s` are of the worker's instance, for the activity of its version, and not kept with the request:
    how long its start took, and how long the request had waited when it began; 0 where there is nothing to tell.
    """

    cold_start_s: float = 0.0
    inputs_s: float = 0.0
    container_s: float = 0.0
    upload_s: float = 0.0
    start_s: float = 0.0
    lead_s: float = 0.0


NO_TIMINGS = Timings()


@noun(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a container said of its work so far: `percent` 0 to 100, and `partial`, a JSON object or `null`.
    `number` counts the updates of a request from 1, across attempts; the store gives it."""

    percent: int
    partial: bytes = b"null"
    number: int = 0


@noun(frozen=True, slots=True, kw_only=True)
class Record:
    """Where one request stands. `outcome` is set when the container or the sidecar produced an answer, and
    `status_code` is its HTTP status; `reason` says in one sentence why a request ended without one; `head` is
    that of an answer that is being streamed. `progress` is the update of the running attempt that this read was
    given; `unread` tells that no other was given it before.

    `queue_deadline_at` is until when its first attempt must start, `run_timeout_s` how long each may take; 0 is no
    limit but that of `deadline_at`. `attempts` are in order, the newest MOST_ATTEMPTS_KEPT of those that came to
    nothing, and then the one that runs or ended the request. `cause` is a DeadCause of one that is dead, "" of others
    and of one that an older release ended; `redriven_as` is the request that was made of it. `rank` is its place among
    those that wait, as `Position` tells it, known only to whoever has just made it; else 0.
    """

    id: str
    account: str
    function_id: str
    version_id: str
    state: RequestState
    created_at: float
    deadline_at: float
    attempt: int = 0
    started_at: float = 0.0
    finished_at: float = 0.0
    worker: str = ""
    reason: str = ""
    outcome: Outcome | None = None
    status_code: int = 0
    queue_deadline_at: float = 0.0
    run_timeout_s: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    timings: Timings | None = None
    head: Outcome | None = None
    progress: Progress | None = None
    unread: bool = False
    cause: str = ""
    redriven_as: str = ""
    rank: int = field(default=0, compare=False)

    @property
    def due_at(self) -> float:
        """When it expires unless a worker takes it before."""
        waits = self.queue_deadline_at and self.attempt == 0
        return min(self.queue_deadline_at, self.deadline_at) if waits else self.deadline_at

    @property
    def overslept(self) -> bool:
        """Whether it is the queue timeout for which an EXPIRED request came too late."""
        return self.state is RequestState.EXPIRED and self.due_at < self.deadline_at

    @property
    def flowing(self) -> bool:
        """Whether a body that is no stream of events is on its way: it must be read to come to an end."""
        return self.state is RequestState.RUNNING and self.head is not None and not self.head.event_stream


MOST_ATTEMPTS_KEPT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFilter:
    """Which requests of an account; what is left empty or 0 leaves nothing out. `since` is included, `until` is not."""

    function_id: str = ""
    version_id: str = ""
    states: frozenset[RequestState] = frozenset()
    since: float = 0.0
    until: float = 0.0

    def keeps(self, record: Record) -> bool:
        return (
            self.function_id in ("", record.function_id)
            and self.version_id in ("", record.version_id)
            and (not self.states or record.state in self.states)
            and self.since <= record.created_at
            and (not self.until or record.created_at < self.until)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPage:
    """Records without their outcomes, newest first. `after` is where the next page begins; 0 when there is none."""

    records: tuple[Record, ...]
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead request that can be started once more: what is known of it, and `job`, its input, where it was asked for.

    `size_bytes` is that of the body, which is in the blob store when there is a `body_key`. `redriven_as` is the
    request that its redrive makes, from before that is accepted; `redriven_at` is set once it is.
    """

    id: str
    account: str
    function_id: str
    version_id: str
    cause: str
    reason: str
    attempts: int
    created_at: float
    died_at: float
    kept_until: float
    size_bytes: int = 0
    body_key: str = ""
    redriven_as: str = ""
    redriven_at: float = 0.0
    job: Job | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterFilter:
    """Which dead letters of an account; what is left empty, 0 or None leaves nothing out. `since` and `until` are about
    when they died; the first is included, the second is not."""

    function_id: str = ""
    version_id: str = ""
    causes: frozenset[str] = frozenset()
    since: float = 0.0
    until: float = 0.0
    redriven: bool | None = None

    def keeps(self, letter: DeadLetter) -> bool:
        return (
            self.function_id in ("", letter.function_id)
            and self.version_id in ("", letter.version_id)
            and (not self.causes or letter.cause in self.causes)
            and self.since <= letter.died_at
            and (not self.until or letter.died_at < self.until)
            and self.redriven in (None, letter.redriven_at > 0)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterPage:
    """Dead letters without their jobs, the latest first. `after` is where the next page begins; 0 when there is
    none."""

    letters: tuple[DeadLetter, ...]
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many dead letters of one version have one cause, and when the first and the last of them died."""

    function_id: str
    version_id: str
    cause: str
    count: int
    first_at: float
    last_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Redrive:
    """The request that a dead letter is started again as; `done` once it was accepted."""

    id: str
    done: bool


class Interest(IntEnum):
    """What a watch of a request is told of; each level includes those before it.

    END: that it ended. PROGRESS: that there is progress; this is a poll, and each of its reads takes the next update
    that no poll has been given. STEPS: that an attempt started or was given back; its reads take nothing.
    """

    END = 0
    PROGRESS = 1
    STEPS = 2


@noun(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request that is about to be accepted. The limits count from acceptance, by the store's clock; those that are
    0 are none."""

    id: str
    account: str
    function_id: str
    version_id: str
    digest: str
    deadline_s: float
    queue_timeout_s: float = 0.0
    run_timeout_s: float = 0.0
    size_bytes: int = 0
    callback: Callback | None = None


@noun(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One life of a store's data. `number` (0 to 255) goes into every request ID minted meanwhile, so that an
    ID which the store does not know can be told to be from before it was wiped. `now` is when this was read."""

    number: int
    born_at: float
    now: float


@noun(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to run one attempt. `token` is a secret: settling needs it, so a worker that lost its
    lease cannot overwrite its successor's work. `started_at` is when it was granted, 0 when that is not known."""

    request_id: str
    version_id: str
    attempt: int
    token: str
    started_at: float = 0.0


class Verdict(StrEnum):
    """Answer to a claim."""

    GRANTED = "granted"
    HELD = "held"
    SETTLED = "settled"


@noun(frozen=True, slots=True, kw_only=True)
class Claim:
    """GRANTED carries `lease`, and what is left until the deadline by the store's clock; HELD carries `wait_s`: when
    the other worker's lease ends unless renewed, or, with the `state` QUEUED, until when the request was postponed;
    SETTLED carries the terminal `state`: acknowledge and forget. `lost` is the attempt that this claim found to have
    come to nothing, because its worker fell silent."""

    verdict: Verdict
    state: RequestState
    lease: Lease | None = None
    remaining_s: float = 0.0
    wait_s: float = 0.0
    lost: Attempt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """`rank` 1 is next, 0 is running or done. `length` counts all who wait for the version."""

    rank: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A version's work: accepted and unclaimed, claimed and unfinished, and the longest wait so far."""

    queued: int
    running: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Who waits for a version, as it was `at` this time of the store's. `landmarks` are some of them, the first and the
    last included, as rank (from 1) and when they were accepted, in order; `running` are claimed and unfinished."""

    at: float
    queued: int
    running: int
    landmarks: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one look at a part of all records found. `states` counts those that can be read, by state; `unreadable`
    the others. `expired` were overdue and are not any more, `placed` were missing from their version's books. `cursor`
    is where the next look goes on; 0 when all were seen."""

    cursor: int
    states: Mapping[RequestState, int]
    unreadable: int = 0
    expired: int = 0
    placed: int = 0


# -- streams -----------------------------------------------------------------------------------

STREAM_CUT = "the worker stopped in the middle of the answer, which is not begun again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a streamed body. `end` is the offset in the body just behind it.

    `event` says that it is one whole server-sent event, and `event_id` is the ID that the container gave it, ""
    when it gave none that tells this event from the one before.
    """

    data: bytes
    end: int
    event: bool = False
    event_id: str = ""

    @property
    def start(self) -> int:
        return self.end - len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What the writer of a stream has to know. Anything but RUNNING means: nothing was appended, stop; and so does
    `cut`: what was written before is lost.

    `unread_bytes` were written and not yet asked for. `unattended_s` is for how long nobody has been reading where
    somebody was or should be, 0 where all is well.
    """

    state: RequestState
    cut: bool = False
    unread_bytes: int = 0
    unattended_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A part of a stream, and where the whole stands. `attempt` wrote it; `written` is the length of the body so far.

    In a terminal `state` nothing is written any more. `head` holds the status and headers, None until they are known.
    """

    state: RequestState
    attempt: int
    written: int
    head: Outcome | None = None
    chunks: tuple[Chunk, ...] = ()


# -- webhooks ----------------------------------------------------------------------------------


class DeliveryState(StrEnum):
    """FAILED was given up: the receiver said so, or every try was in vain."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookTry:
    """One POST to a receiver. `status` is that of its answer, 0 without one; `error` says what was wrong, "" if
    nothing."""

    took_s: float
    status: int = 0
    error: str = ""
    number: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookDelivery:
    """What is to be told of the end of one request, and what became of that.

    `request_state` to `timings` are as in Record. `tried` counts all tries, of which `tries` are the latest; `series`
    those since it was last asked for. A pending one is due at `next_at`.
    """

    request_id: str
    account: str
    function_id: str
    version_id: str
    callback: Callback
    request_state: RequestState
    created_at: float
    started_at: float
    finished_at: float
    attempts: int = 0
    reason: str = ""
    status_code: int = 0
    timings: Timings | None = None
    state: DeliveryState = DeliveryState.PENDING
    next_at: float = 0.0
    tried: int = 0
    series: int = 0
    tries: tuple[WebhookTry, ...] = ()

    @property
    def id(self) -> str:
        """By which a receiver knows it again: the same for each try."""
        return f"msg_{self.request_id.replace('-', '')}"

    @property
    def event(self) -> str:
        return f"request.{self.request_state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookLoan:
    """A delivery that is due, on loan to one controller; `lease` is how the store knows that it still is."""

    delivery: WebhookDelivery
    lease: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookBacklog:
    """What is due to be looked at, or sent, and for how long the first of it has been."""

    count: int
    late_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookFilter:
    """Which deliveries of an account; what is left empty leaves nothing out."""

    function_id: str = ""
    states: frozenset[DeliveryState] = frozenset()

    def keeps(self, delivery: WebhookDelivery) -> bool:
        return self.function_id in ("", delivery.function_id) and (not self.states or delivery.state in self.states)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookPage:
    """The latest first. `after` is where the next page begins; 0 when there is none."""

    deliveries: tuple[WebhookDelivery, ...]
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSecret:
    """Signs deliveries until `expires_at`; 0: for good. `sealed` is bound to its account and ID."""

    id: str
    sealed: str
    created_at: float
    expires_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSecrets:
    """All those of one account, the newest last."""

    account: str
    secrets: tuple[WebhookSecret, ...]


# -- secrets -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A named value, sealed by `broker.keyring`; bound to its account, version and name."""

    name: str
    sealed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """All secrets of one version, in the order in which they were first given."""

    version_id: str
    account: str
    secrets: tuple[Secret, ...]
    updated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCredential:
    """How to log in to a registry. `sealed` holds `user:password`, bound to the account, this id and the hostname."""

    id: str
    name: str
    registry: str
    hostname: str
    artifact_types: tuple[str, ...]
    sealed: str
    created_at: float
    updated_at: float
    tags: tuple[str, ...] = ()
    description: str = ""
    provisioned_by: str = "USER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """An opened registry credential, for whoever pulls an image. Never stored, never shown."""

    hostname: str
    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryCredentials:
    """All registry credentials of one account: one row, so that names are unique and limits exact."""

    account: str
    credentials: tuple[RegistryCredential, ...]


# -- assets and accounts -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """What the blob store knows about one object."""

    key: str
    size_bytes: int
    content_type: str
    description: str
    modified_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    id: str
    content_type: str
    description: str
    created_at: float


ALL_RESOURCES = ("account-functions/*", "authorized-functions/*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The limits of one account, in numbers of things that it may have."""

    id: str
    name: str
    max_functions: int
    max_tasks: int
    max_telemetries: int
    max_registry_credentials: int
    created_at: float
    updated_at: float
    client_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A bearer key. `hash` is SHA-256 of the secret, in hex; the secret itself is kept nowhere.
    `expires_at` 0 means that it does not expire. `resources` says which functions it is good for
    (contract/management.md §4.4); `owner` is whom it was made for, `changed_at` when its rights last changed."""

    hash: str
    id: str
    account: str
    hint: str
    description: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float = 0.0
    resources: tuple[str, ...] = ALL_RESOURCES
    suspended: bool = False
    owner: str = ""
    issuer: str = ""
    audiences: tuple[str, ...] = ()
    changed_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is calling. `subject` is stable per credential and reaches the container as NVCF-SUB.
    `super_admin` acts for `account` without being of it. `functions` is set for a delegated token, whose `subject` ends
    with its client: of what `resources` cover, it is good for these only, spelled in the same way."""

    account: str
    subject: str
    scopes: frozenset[str]
    resources: frozenset[str] = frozenset(ALL_RESOURCES)
    super_admin: bool = False
    functions: frozenset[str] | None = None


# -- limits ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One count of who does what: `rate` bounds what `counter` takes. `policy` is the rate's name for the caller."""

    counter: str
    policy: str
    rate: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Where a window stands: `remaining` takes are left, and more come after `reset_s`."""

    policy: str
    rate: Rate
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What became of one take. `quotas` are in the order of the windows; a take that was refused counts nowhere,
    and may succeed after `retry_after_s`."""

    granted: bool
    quotas: tuple[Quota, ...] = ()

    @property
    def retry_after_s(self) -> float:
        return max((quota.reset_s for quota in self.quotas if not quota.remaining), default=0.0)


class Part(StrEnum):
    """Whose output it is, of the two that an instance consists of."""

    CONTAINER = "container"
    SIDECAR = "sidecar"


class LogLine(NamedTuple):
    """`at` in unix seconds: when it was written, or at the latest, where only that is known."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogExcerpt:
    """What was written behind a position, and the one to go on from. Only whoever reads logs can read positions; none
    is ''."""

    lines: tuple[LogLine, ...]
    position: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An instance that is gone, while its last lines can still be read. `at` in unix seconds; `cause` is one line."""

    instance_id: str
    version_id: str
    at: float
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBatch:
    """Lines of one part of an instance, oldest first. `id` orders those of a version; '' before it has one."""

    version_id: str
    instance_id: str
    part: Part
    lines: tuple[LogLine, ...]
    id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Somebody of `account` reads what the instances of a version write, or only `instance_id`."""

    account: str
    version_id: str
    instance_id: str = ""
