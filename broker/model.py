"""The nouns of the house and their states: frozen values, no behaviour that needs a server.

Times that end in `_at` are unix seconds by the store's clock; durations end in `_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

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
class RateLimit:
    """How often a version may be invoked (contract/management.md §1.4).

    A rate is text as `100-S, 500-H`: at most one positive number for each of S, M, H and D. `rate` counts all calls
    of an account, `per_account` replaces it for those named, `per_user` counts each end user's; '' is no limit.
    """

    rate: str = ""
    exempted: tuple[str, ...] = ()
    per_account: tuple[tuple[str, str], ...] = ()
    per_user: str = ""
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
    """One immutable definition of a function. After creation only `status`, `tags`, `rate_limit`, `priority` and the
    token limits and routing of `models` change. It holds the names of its secrets and never a value."""

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
    secret_names: tuple[str, ...] = ()


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

    `clusters`, `regions`, `attributes` and `availability_zones` are where it may be placed. `facts` is what the
    caller said of the machine (`cpuArch`, `os`, …), shown again and read by nothing.
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
    `removing`, that the controller deletes the queue now, and nobody may deploy in its place."""

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


class InstanceStatus(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    ERRORED = "ERRORED"
    TERMINATED = "TERMINATED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One replica: an inference container and its sidecar. Written by the sidecar, kept alive by its beat."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU type that a launcher can place instances on; `capacity` counts instances of its default type."""

    name: str
    instance_type: str
    backend: str
    capacity: int


# -- requests ----------------------------------------------------------------------------------


class RequestState(StrEnum):
    """`queued -> running -> one terminal state`; the first terminal state never changes (PROTOCOL §2.4)."""

    QUEUED = "queued"
    RUNNING = "running"
    FULFILLED = "fulfilled"
    ERRORED = "errored"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DEAD = "dead"
    ABANDONED = "abandoned"

    @property
    def terminal(self) -> bool:
        return self not in (RequestState.QUEUED, RequestState.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What travels through the queue: enough to run the request and to rebuild its record.

    `body` is the request body unless it was too large for a message; then `body_key` names the blob.
    `headers` are the client's, already filtered; `poll_s` is how long the accepting call may wait.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the container answered, or what we answer in its place.

    `blob_key` names a zip in the blob store when the answer was too large to keep inline; `body` is then empty.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    blob_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Where one request stands. `outcome` is set when the container or the sidecar produced an answer;
    `reason` says in one sentence why a request ended without one."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request that is about to be accepted. `deadline_s` counts from acceptance, by the store's clock."""

    id: str
    account: str
    function_id: str
    version_id: str
    digest: str
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One life of a store's data. `number` (0 to 255) goes into every request ID minted meanwhile, so that an
    ID which the store does not know can be told to be from before it was wiped. `now` is when this was read."""

    number: int
    born_at: float
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to run one attempt. `token` is a secret: settling needs it, so a worker that lost its
    lease cannot overwrite its successor's work."""

    request_id: str
    version_id: str
    attempt: int
    token: str


class Verdict(StrEnum):
    """Answer to a claim."""

    GRANTED = "granted"
    HELD = "held"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """GRANTED carries `lease`, and what is left until the deadline by the store's clock; HELD carries `wait_s`, when
    the other worker's lease ends unless renewed; SETTLED carries the terminal `state`: acknowledge and forget."""

    verdict: Verdict
    state: RequestState
    lease: Lease | None = None
    remaining_s: float = 0.0
    wait_s: float = 0.0


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A bearer key. `hash` is SHA-256 of the secret, in hex; the secret itself is kept nowhere.
    `expires_at` 0 means that it does not expire."""

    hash: str
    id: str
    account: str
    hint: str
    description: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is calling. `subject` is stable per credential and reaches the container as NVCF-SUB."""

    account: str
    subject: str
    scopes: frozenset[str]
