"""Every setting, with its unit, default and meaning. The only reader of the environment.

`docs/settings.md` is generated from these classes and compared in a test.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker.errors import ConfigurationError

S = TypeVar("S", bound=BaseSettings)

MIB = 1024 * 1024

_DURATION = TypeAdapter(timedelta)


def _either(name: str, upstream: str) -> AliasChoices:
    return AliasChoices(f"FNQUEUE_{name.upper()}", upstream)


class Settings(BaseSettings):
    """Shared by every process. Environment name: `FNQUEUE_` and the setting's name in upper case."""

    model_config = SettingsConfigDict(
        env_prefix="FNQUEUE_",
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
        populate_by_name=True,
    )

    queue_url: SecretStr = Field(
        SecretStr("memory://"),
        description="Where jobs wait: `memory://`, `amqp://user:password@host:port/vhost`, `amqps://…`; of a cluster, "
        "any of whose nodes will do, `amqp://user:password@host:port,host:port,host:port/vhost`.",
    )
    store_url: SecretStr = Field(
        SecretStr("memory://"),
        description="Where records and results live: `memory://`, `redis://host:port/db`, `rediss://…`; behind "
        "Sentinels `redis+sentinel://user:password@host:port,host:port,host:port/primary/db`, with the name that they "
        "know the primary by, its user, and `?sentinel_user=…&sentinel_password=…` if they have one of their own; "
        "`rediss+sentinel://…` for TLS to all of them.",
    )
    blobs_url: SecretStr = Field(
        SecretStr("file://"),
        description="Where large bytes live: `file://` (under the data folder) or `file:///a/folder`, or "
        "`s3://access:secret@host:port/bucket?tls=false&region=us-east-1&public_endpoint=http://…`.",
    )
    launcher_url: str = Field(
        "process://",
        description="What starts instances: `process://`; a container engine: `docker://` (DOCKER_HOST, or the usual "
        "socket), `docker:///run/podman/podman.sock`, `docker://host:port`; or "
        "`kubernetes://namespace?image=…&load_url=http://…` (docs/kubernetes.md).",
    )
    data_dir: Path = Field(Path(".fnqueue"), description="Folder for files, logs and state of local processes.")
    secret_key: SecretStr = Field(
        SecretStr(""),
        description="At least 32 random characters, the same on every front end. Tags request IDs, so that a guessed "
        "ID never reaches the store. Sidecars need none and are given none.",
    )
    unsigned_messages: Literal["refuse", "accept"] = Field(
        "refuse",
        description="What becomes of a message in the queue that carries no signature, where sidecars have keys: "
        "`refuse` sends it to the dead letters; `accept` is for as long as front ends run that do not sign yet.",
    )
    status_host: str = Field(
        "127.0.0.1",
        description="Address of `status_port`. What is told there is for operators and has no key: give it another one "
        "only where nobody else comes, as inside a container whose ports are not published.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe level logged.")
    log_format: Literal["json", "text"] = Field("json", description="`json`: one object a line; `text`: for people.")

    profile: Literal["A", "B", "C", "D"] = Field(
        "A",
        description="What the servers are to survive (docs/operations.md): `A` nothing for certain, `B` a crash of any "
        "process or of the host, `C` the loss of any one host, `D` as C, with what is large in S3. A process does "
        "not start, or stops, when a server is configured otherwise.",
    )
    profile_asserted: bool = Field(
        False,
        description="Take what a server does not let be read, as a managed one may, for what the profile needs: its "
        "operator's word.",
    )
    request_deadline_s: float = Field(
        86_400,
        ge=1,
        le=30 * 86_400,
        description="Seconds from acceptance after which a request that has not finished expires.",
    )
    result_ttl_s: float = Field(86_400, ge=60, le=30 * 86_400, description="Seconds a finished request stays readable.")
    idempotency_ttl_s: float = Field(
        86_400, ge=60, le=30 * 86_400, description="Seconds an Idempotency-Key is remembered."
    )
    queue_limit: int = Field(
        100_000, ge=1, description="Requests that may wait for one version; one more is answered 429."
    )
    version_requests: int = Field(
        0, ge=0, description="Requests of one version that may be queued and running; one more is 429. 0: any number."
    )
    version_bytes: int = Field(
        1024 * MIB,
        ge=0,
        description="What the bodies of those may take together, in bytes; beyond it 429. 0: any number. The policy in "
        "`infra/rabbitmq/definitions.json` is the backstop, at a quarter more.",
    )
    account_requests: int = Field(
        0, ge=0, description="Requests of one account that may be queued and running; one more is 429. 0: any number."
    )
    account_bytes: int = Field(
        0, ge=0, description="What the bodies of those may take together, in bytes; beyond it 429. 0: any number."
    )
    listed_requests: int = Field(
        100_000,
        ge=1,
        description="Newest requests of an account that `GET /v2/nvcf/requests` finds; all are read by ID.",
    )
    max_attempts: int = Field(
        3, ge=1, le=100, description="Attempts after which a request whose worker or container died is dead."
    )
    max_worker_deaths: int = Field(
        2,
        ge=1,
        le=100,
        description="Workers that may fall silent with a request before it is dead: it may be what kills them. Within "
        "`max_attempts`; a container that was lost beside a living worker is not counted here.",
    )
    quarantine_crashes: int = Field(
        3,
        ge=0,
        le=100,
        description="Different requests that may die in a row with one instance before it takes no more work and is "
        "replaced; an answer of its container ends the row, and 0 means never.",
    )
    dead_letter_ttl_s: float = Field(
        7 * 86_400, ge=60, le=90 * 86_400, description="Seconds for which a dead request is kept with its input."
    )
    dead_letters_kept: int = Field(
        10_000,
        ge=1,
        description="Dead requests that are kept with their inputs for one account; the oldest make way.",
    )
    webhook_ttl_s: float = Field(
        7 * 86_400,
        ge=2 * 86_400,
        le=30 * 86_400,
        description="Seconds for which a webhook's delivery and its log are kept; tries go on for 18 hours of them.",
    )
    webhooks_kept: int = Field(
        10_000,
        ge=1,
        description="Deliveries that are kept of one account, delivered or not; the oldest make way.",
    )
    lease_s: float = Field(
        15, ge=1, le=300, description="Seconds after which a silent worker's attempt may be run again."
    )
    accept_timeout_s: float = Field(
        10, gt=0, le=60, description="Seconds spent trying to get a job confirmed before the answer is 503."
    )
    publish_timeout_s: float = Field(
        5, gt=0, le=60, description="Seconds one publish may take before it is tried on another connection."
    )
    store_timeout_s: float = Field(3, gt=0, le=60, description="Seconds one exchange with the store may take.")
    progress_kept_bytes: int = Field(
        4 * MIB,
        ge=64 * 1024,
        le=64 * MIB,
        description="Progress updates kept of one running request, in bytes; the oldest make way.",
    )
    durable_replicas: int = Field(
        0,
        ge=0,
        le=5,
        description="Redis replicas that must hold a record before it is acknowledged or shown (WAIT); 1 by default in "
        "the profiles C and D.",
    )
    store_replicas: int = Field(
        0,
        ge=0,
        le=5,
        description="Replicas that Redis has, all of which are waited for; 2 by default in the profiles C and D. "
        "`durable_replicas` will do once one was missing for `store_failover_s`.",
    )
    store_failover_s: float = Field(
        10,
        ge=0,
        le=300,
        description="Seconds that Sentinels may take from promoting a replica until the others have left the old "
        "primary. For as long as this after one fell silent, nothing is acknowledged or shown: it may have been "
        "promoted.",
    )
    inline_body_bytes: int = Field(
        256 * 1024,
        ge=0,
        le=16 * MIB,
        description="Request bodies above this travel through the blob store instead of the queue.",
    )
    max_assets_bytes: int = Field(
        20 * 1024 * MIB,
        ge=MIB,
        description="What the assets of one request may come to, in bytes; beyond it 413. A signed upload has no limit "
        "but the blob store's, and each asset is laid on the disk of a worker.",
    )
    stream_bytes: int = Field(
        4 * MIB,
        ge=64 * 1024,
        le=64 * MIB,
        description="Bytes of one streamed answer that are kept for a client that comes back; half of them may be "
        "unread before the container has to wait, and half is the most that one event may have.",
    )
    max_message_bytes: int = Field(
        MIB,
        ge=64 * 1024,
        le=64 * MIB,
        description="Largest message of a WebSocket, in either direction; a larger one closes it with 1009. Each open "
        "one may hold a few of these in memory.",
    )
    rate_limit_unreachable: Literal["open", "closed"] = Field(
        "open",
        description="What becomes of invocations of rate limited functions while the counters cannot be reached: "
        "`open` lets them pass uncounted, `closed` answers 503.",
    )
    blobs_timeout_s: float = Field(30, gt=0, le=600, description="Seconds one answer of the blob store may take.")
    max_functions: int = Field(
        50,
        ge=0,
        le=2**31 - 1,
        description="Function versions an account may have when another function is created, unless its record says "
        "otherwise.",
    )
    max_registry_credentials: int = Field(
        25, ge=0, le=50, description="Registry credentials that an account may have, unless its record says otherwise."
    )
    keys_per_owner: int = Field(
        8, ge=1, le=10_000, description="Valid API keys that one owner in an account may have through `POST /v1/keys`."
    )

    @model_validator(mode="before")
    @classmethod
    def _profiles_with_replicas_wait_for_them(cls, given: dict[str, Any]) -> dict[str, Any]:
        replicated = given.get("profile") in ("C", "D")
        return {"durable_replicas": 1, "store_replicas": 2, **given} if replicated else given

    @model_validator(mode="after")
    def _profiles_with_replicas_wait(self) -> Self:
        if self.profile in ("C", "D") and not self.durable_replicas:
            raise ValueError(f"durable_replicas must be at least 1 in profile {self.profile}")
        return self

    @model_validator(mode="after")
    def _a_key_never_outlives_its_result(self) -> Self:
        if self.idempotency_ttl_s > self.result_ttl_s:
            raise ValueError("idempotency_ttl_s must not exceed result_ttl_s, or a late retry would run twice")
        return self


class SecretSettings(Settings):
    """Of front ends and controllers. A sidecar runs beside its user's code and is given neither keys nor the way to
    administer RabbitMQ."""

    encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys for secrets and registry credentials at rest: `id:hex,id:hex`, 64 hex digits each. The first "
        "seals, all open; the same on every front end and controller. Empty: secrets are refused.",
    )
    signing_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys that sign messages in the queue, spelled the same: the first signs, all are good, and so is "
        "one made of `secret_key`, which is the only one where this is empty. The same on every front end and "
        "controller; a controller with neither starts sidecars that check nothing.",
    )

    public_url: str = Field(
        "",
        description="How clients reach the front ends, for URLs that are handed out; empty: from the request, and in "
        "webhooks only the path.",
    )
    webhook_networks: str = Field(
        "",
        description="Networks that webhooks may reach though they are not public, such as `10.1.0.0/16,fd00:1::/64`. "
        "Addresses that are private, loopback, link-local, of a cloud's metadata or otherwise special are refused, "
        "whatever name leads to them.",
    )
    webhook_ports: str = Field(
        "443,8443",
        description="Ports that webhooks may use: `443,8443,9000-9099`.",
    )
    webhook_http: bool = Field(
        False, description="Whether webhooks may go to `http://` too: then anybody on the way can read them."
    )

    queue_management_url: SecretStr = Field(
        SecretStr(""),
        description="RabbitMQ's management API, `http://user:password@host:15672`, of a user with the tag "
        "`monitoring`: for what AMQP does not tell when a profile is checked, and for `fnqueue doctor`. A controller "
        "with `version_users` needs the tag `administrator`.",
    )


class DoctorSettings(SecretSettings):
    """`fnqueue doctor`."""

    run_timeout_s: float = Field(3600, ge=1, le=7 * 86_400, description="That of the sidecars.")


class ApiSettings(SecretSettings):
    """`fnqueue api` and `fnqueue dev`."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65_535, description="Port to listen on; 0 takes a free one.")
    processes: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes of one `fnqueue api` that share the port, for as many cores. Each is a front end: what "
        "is limited for one, is for each of them.",
    )
    admin_key: SecretStr = Field(
        SecretStr(""),
        description="A bearer key with every scope on `admin_account`, kept nowhere else; empty for none.",
    )
    admin_account: str = Field(
        "default", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="The account of `admin_key`."
    )
    region: str = Field(
        "",
        validation_alias=_either("region", "NVCF_REGION"),
        description="Where this server accepts requests; containers are told as `NVCF-INVOCATION-REGION`.",
    )
    max_body_bytes: int = Field(
        5 * MIB, ge=1024, le=128 * MIB, description="Largest request body; larger ones are answered 413."
    )
    body_timeout_s: float = Field(30, gt=0, le=3600, description="Seconds a client may take to send its body.")
    max_connections: int = Field(
        16_000,
        ge=1,
        description="Connections of clients at once, or fewer where the system allows fewer open files; one more is "
        "answered 503. Those that ask for nothing make room first.",
    )
    max_address_connections: int = Field(
        0,
        ge=0,
        description="Those of one address; one more is answered 429. 0: any number, as behind a proxy all come from a "
        "few.",
    )
    account_calls: int = Field(
        0,
        ge=0,
        description="Calls of one account that may wait for results at once in one front end; one more is answered "
        "429. 0: any number.",
    )
    head_timeout_s: float = Field(
        9, gt=0, le=600, description="Seconds within which a new connection has to send a request's head."
    )
    send_timeout_s: float = Field(
        30,
        gt=0,
        le=3600,
        description="Seconds that a client may take for an answer, and one more for every 16 KiB of it; then its "
        "connection is cut, and the result can be read again.",
    )
    inflight_bodies: int = Field(
        2000,
        ge=1,
        description="Requests that are being accepted at once, from their head until they are in the queue; beyond it "
        "503. Those that wait for results are not among them.",
    )
    inflight_body_bytes: int = Field(
        256 * MIB, ge=5 * MIB, description="Request bodies held in memory at once; beyond it the answer is 503."
    )
    max_streamed_body_bytes: int = Field(
        1024 * MIB,
        ge=1024,
        description="Largest request body of a transparent invocation; larger ones are answered 413. What does not fit "
        "into a message goes through a file to the blob store, or over a channel.",
    )
    spool_dir: str = Field(
        "",
        description="Folder for those files while they arrive; empty: the system's temporary folder. Older files named "
        "`fnqueue-body-*` are those of a killed front end and may be deleted.",
    )
    spool_bytes: int = Field(
        8 * 1024 * MIB, ge=MIB, description="What they may take there at once; beyond it the answer is 503."
    )
    gateway_timeout: bool = Field(
        False,
        description="Answer 504 and remove a request still queued when the caller's wait ends, as upstream does.",
    )
    one_shot_results: bool = Field(False, description="Forget a result once it was delivered, as upstream does.")
    on_disconnect: Literal["continue", "cancel"] = Field(
        "continue", description="What happens to a request whose client leaves before it was answered."
    )
    cors_origins: str = Field(
        "*",
        description="Origins whose pages may call this server, separated by commas; `*` for any. Never with cookies.",
    )
    stream_keepalive_s: float = Field(
        15, ge=1, le=600, description="Seconds of silence after which a comment is sent on a stream of events."
    )
    stream_write_timeout_s: float = Field(
        30, ge=1, le=3600, description="Seconds that the client of a stream may take no bytes before it is left."
    )
    max_event_streams: int = Field(
        10_000,
        ge=0,
        description="Callers that may listen to the events of their requests at once; one more is answered 503.",
    )
    max_poll_pause_s: float = Field(
        30,
        ge=1,
        le=3600,
        description="The most seconds that `Retry-After` of a 202 asks for. It is the time by which one request in ten "
        "would have its result; 1 where that is not known.",
    )
    asset_url_ttl_s: float = Field(3600, ge=60, le=7 * 86_400, description="Seconds an asset's upload URL works.")
    result_url_ttl_s: float = Field(
        86_400, ge=60, le=7 * 86_400, description="Seconds a large result's download URL works."
    )
    invocation_token_ttl_s: float = Field(
        3600,
        ge=1,
        le=7 * 86_400,
        description="Seconds a delegated invocation token works, or less: never longer than the key that asked for it.",
    )
    dashboard: bool = Field(True, description="Serve the page for operators at `/dashboard`.")
    dashboard_viewers: int = Field(
        50,
        ge=1,
        le=1000,
        description="Pages of it that one front end keeps up to date at once; one more is answered 503.",
    )
    dashboard_refresh_s: float = Field(
        2, ge=0.1, le=60, description="Seconds between two looks at the stores for all of them, while one is open."
    )
    dashboard_idle_s: float = Field(
        3600,
        ge=60,
        le=86_400,
        description="Seconds after which a login to it ends whose pages are all closed. None lasts longer than twelve "
        "hours, or than its key.",
    )
    account_calls_per_s: int = Field(
        200,
        ge=0,
        description="Management calls that one front end takes from one account in a second, beyond which it answers "
        "429; 0 for any number.",
    )
    function_calls_per_s: int = Field(
        200, ge=0, description="The same for the calls of one account about one function or version."
    )
    recognized_registries: str = Field(
        "NGC=nvcr.io/CONTAINER, NGC Helm=helm.ngc.nvidia.com/HELM, NGC Models=api.ngc.nvidia.com/MODEL+RESOURCE, "
        "Docker Hub=docker.io/CONTAINER+HELM, GitHub=ghcr.io/CONTAINER+HELM, Quay=quay.io/CONTAINER+HELM, "
        "GitLab=registry.gitlab.com/CONTAINER+HELM, Amazon ECR=*.dkr.ecr.*.amazonaws.com/CONTAINER+HELM, "
        "Azure=*.azurecr.io/CONTAINER+HELM, Google=*.pkg.dev/CONTAINER+HELM, "
        "Hugging Face=huggingface.co/MODEL+RESOURCE",
        description="Registries that credentials may be for: `name=hostname/TYPE+TYPE`, separated by commas. Types are "
        "`CONTAINER`, `HELM`, `MODEL`, `RESOURCE`, all when left out; `*` stands for any part of a hostname.",
    )
    custom_registries: str = Field(
        "", description="Further hostnames that credentials may be for, separated by commas; `*` for any."
    )
    paces: str = Field(
        "",
        description="Other management calls per second, for single IDs of accounts, functions or versions: "
        "`ID=NUMBER`, separated by commas; 0 for any number.",
    )
    redrives_per_s: int = Field(
        20,
        ge=1,
        le=1000,
        description="Dead requests of one account that are started again in a second when many are asked for at once, "
        "on all front ends together.",
    )
    shutdown_grace_s: float = Field(10, ge=0, le=3600, description="Seconds for answering who waits when told to stop.")
    attach_host: str = Field(
        "",
        description="Address to listen on for sidecars, which attach here to run WebSockets and bidirectional streams; "
        "empty: that of `host`.",
    )
    attach_port: int = Field(
        0,
        ge=0,
        le=65_535,
        description="Port for the same; 0 takes a free one. Processes that share a `port` need one each.",
    )
    attach_address: str = Field(
        "",
        description="Name or address by which sidecars reach exactly this process (on Kubernetes, the pod's IP); "
        "empty: the address that it listens on, or this machine's own where that is every address.",
    )
    status_port: int = Field(
        8090,
        ge=0,
        le=65_535,
        description="Port of `/metrics`, `/v1/health/live` and `/v1/health/ready`; 0 serves none, and so does the "
        "default where it is taken. Processes that share a `port` need one each.",
    )
    max_channels: int = Field(
        1000, ge=0, description="WebSockets and bidirectional streams at once, queued ones included; beyond it 503."
    )
    channel_idle_s: float = Field(
        600, gt=0, le=86_400, description="Seconds without a byte in either direction after which a channel is closed."
    )
    channel_drain_s: float = Field(
        10,
        ge=0,
        le=7200,
        description="Seconds that open channels may go on when this process is told to stop, before they are closed.",
    )


class ControllerSettings(SecretSettings):
    """`fnqueue controller`, and the controller inside `fnqueue dev`."""

    sidecar_queue_url: SecretStr = Field(
        SecretStr(""),
        description="What sidecars are given as `queue_url`: the same server, with a user who may do less "
        "(docs/operations.md); empty: the controller's own.",
    )
    sidecar_store_url: SecretStr = Field(
        SecretStr(""),
        description="The same for `store_url`. As its user may not look at the server's configuration, such a sidecar "
        "takes the controller's word for the profile.",
    )
    sidecar_blobs_url: SecretStr = Field(SecretStr(""), description="The same for `blobs_url`.")
    version_users: bool = Field(
        False,
        description="Make a RabbitMQ user for each deployed version, who may consume that version's queue alone, and "
        "give it to its sidecars. Takes an administrator in `queue_management_url`, and `secret_key` or "
        "`signing_keys`, the same on every controller.",
    )
    images_file: Path | None = Field(
        None,
        description="TOML file that maps image references to commands for `process://`; added to the samples.",
    )
    docker_project: str = Field(
        "fnqueue",
        pattern=r"^[a-z0-9][a-z0-9-]{0,30}$",
        description="With `docker://`, begins the name of everything that is created, and stands on its label "
        "`fnqueue.project`: what carries it belongs to this controller. One for each installation on an engine.",
    )
    docker_sidecar_image: str = Field(
        "fnqueue/fnqueue:local",
        description="Image of the sidecars: infra/docker/Dockerfile. Pulled without credentials.",
    )
    docker_network: str = Field(
        "host",
        description="Network on which sidecars reach the queue, the store, the blobs and the front ends, by the URLs "
        "that the controller has: a network of the engine, or `host` for that of its machine.",
    )
    docker_egress: bool = Field(
        True, description="Whether containers of functions reach anything but their sidecar, such as the internet."
    )
    docker_pull: Literal["missing", "always", "never"] = Field(
        "missing",
        description="When images are pulled. `missing` also gives an account an image that another one's credentials "
        "have pulled.",
    )
    docker_pull_timeout_s: float = Field(
        1800, ge=1, le=86_400, description="Seconds that the pull of one image may take."
    )
    docker_runtime: str = Field(
        "", description="OCI runtime of all containers, such as `runc`; empty: the engine's own."
    )
    docker_ulimits: str = Field(
        "", description="Limits of all containers: `name=soft:hard`, separated by commas; empty: the engine's own."
    )
    docker_keep_instances: bool = Field(
        True,
        description="Whether instances go on when their controller ends, for the next one to find. Otherwise the last "
        "thing that it does is to drain and stop all that carry its project's label, whoever started them.",
    )
    docker_restarts: int = Field(
        0,
        ge=0,
        le=100,
        description="Times that the engine starts a function's container again that ended with an error, before its "
        "instance is replaced. Not with `docker_network=host`: a container's address may change.",
    )
    docker_cpus: float = Field(
        0, ge=0, description="CPUs of one function's container; 0: its cards' share of the machine, or no limit."
    )
    docker_memory_bytes: int = Field(
        0, ge=0, description="Memory of one function's container; 0: its cards' share of the machine, or no limit."
    )
    docker_shm_bytes: int = Field(
        1024 * MIB,
        ge=0,
        description="Size of `/dev/shm` in it, which frameworks use between processes; 0: the engine's.",
    )
    docker_log_bytes: int = Field(
        50 * MIB, ge=1024, description="Log that the engine keeps of one container while it runs."
    )
    docker_gpus: Literal["nvidia", "cdi"] = Field(
        "nvidia",
        description="How cards are asked for: `nvidia`, of NVIDIA's container toolkit, or `cdi`, as "
        "`nvidia.com/gpu=<UUID>`.",
    )
    docker_artifacts_dir: str = Field(
        "",
        description="Folder on the engine's machine with `models/<name>/<version>` and `resources/<name>/<version>`, "
        "which containers see, read-only, as `/config/models/<name>` and `/config/resources/<name>`.",
    )
    cluster: str = Field(
        "local",
        max_length=256,
        description="The cluster that this controller's instances run in, as deployments have it in `clusters`.",
    )
    region: str = Field(
        "local",
        max_length=256,
        description="Their region, as deployments have it in `regions` and containers in `NVCF_REGION`.",
    )
    attributes: str = Field(
        "",
        description="What else deployments may ask for in `attributes`, separated by commas. One that asks for another "
        "cluster, region or attribute is not placed here.",
    )
    reconcile_s: float = Field(1, gt=0, le=60, description="Seconds between two looks at desired and actual instances.")
    sweep_s: float = Field(10, gt=0, le=600, description="Seconds between two sweeps for overdue requests.")
    audit_s: float = Field(
        60,
        gt=0,
        le=86_400,
        description="Seconds between two passes of the auditor through all records, and through the queues of all "
        "versions. A pass looks at 2,000 keys a second at most.",
    )
    audit_objects_s: float = Field(
        3600,
        gt=0,
        le=30 * 86_400,
        description="Seconds between its passes through the bodies and results in the blob store.",
    )
    deploy_timeout_s: float = Field(
        1800, ge=1, description="Seconds a deployment may take to become ACTIVE before it is ERROR."
    )
    drain_s: float = Field(
        120, ge=0, le=7200, description="Seconds an instance may take to finish its work when it is stopped."
    )
    idle_s: float = Field(
        1800,
        gt=0,
        le=30 * 86_400,
        description="Seconds without a request after which a version is left with its minimum of instances.",
    )
    webhook_timeout_s: float = Field(
        15, ge=1, le=30, description="Seconds that a webhook's receiver may take to answer, with its name looked up."
    )
    webhook_calls: int = Field(
        64,
        ge=32,
        le=1024,
        description="Webhooks that are sent at once, a quarter of them of one account and four of them to one host.",
    )
    error_ttl_s: float = Field(
        7 * 86_400, ge=60, description="Seconds after which a deployment in ERROR that nobody changed is undeployed."
    )
    status_port: int = Field(
        8091,
        ge=0,
        le=65_535,
        description="Port of `/metrics`, `/v1/health/live`, `/v1/health/ready`, `/v1/versions/{id}/load` (for "
        "autoscalers), `/v1/targets` (sidecars, for Prometheus) and `/v1/conservation` (what the auditor counted and "
        "mended, as JSON); 0 serves none, and so does the default where it is taken.",
    )


def _as_spelt(protocol: Any) -> Any:
    return {"HTTP": "HTTP", "GRPC": "gRPC"}.get(str(protocol).upper(), protocol)


def _as_word(keep: Any) -> Any:
    """As it was before there was a middle way."""
    return {"true": "always", "1": "always", "false": "never", "0": "never"}.get(str(keep).lower(), keep)


def _in_seconds(duration: Any) -> Any:
    iso = isinstance(duration, str) and duration.startswith("P")
    return _DURATION.validate_python(duration).total_seconds() if iso else duration


def _at_least_one(concurrency: Any) -> Any:
    return "1" if str(concurrency).strip().lstrip("-+").isdigit() and int(concurrency) < 1 else concurrency


class SidecarSettings(Settings):
    """`fnqueue sidecar`. The names that NVCF's own sidecar reads are understood too."""

    function_id: str = Field(validation_alias=_either("function_id", "FUNCTION_ID"), description="The function's ID.")
    function_version_id: str = Field(
        validation_alias=_either("function_version_id", "FUNCTION_VERSION_ID"),
        description="The version's ID: whose queue to serve.",
    )
    function_name: str = Field(
        "", validation_alias=_either("function_name", "FUNCTION_NAME"), description="The function's name."
    )
    account: str = Field(
        "default", validation_alias=_either("account", "NCA_ID"), description="The account that owns the function."
    )
    message_keys: SecretStr = Field(
        SecretStr(""),
        description="The version's keys by which its messages are checked, as `fnqueue keys messages` prints them; "
        "controllers give them to the sidecars that they start. Empty: every message is taken for ours.",
    )
    instance_id: str = Field("", description="Name of this instance in reports; empty: a random one.")
    specification_id: str = Field("", description="The deployment's GPU specification that this instance belongs to.")
    gpu: str = Field("CPU", description="GPU type reported.")
    instance_type: str = Field(
        "CPU", validation_alias=_either("instance_type", "NVCF_INSTANCETYPE"), description="Instance type reported."
    )
    backend: str = Field("", validation_alias=_either("backend", "NVCF_BACKEND"), description="Cluster group reported.")
    region: str = Field("", validation_alias=_either("region", "NVCF_REGION"), description="Region reported.")
    gpu_count: int = Field(0, ge=0, description="Cards of this instance, for its metering.")
    nspect_id: str = Field(
        "",
        validation_alias=_either("nspect_id", "NVCF_NSPECT_ID"),
        description="Program ID given to the container as `NVCF-NSPECTID`, and put on metering lines.",
    )
    environment: str = Field(
        "", validation_alias=_either("environment", "NVCF_ENV"), description="Environment name given to the container."
    )

    inference_host: str = Field("127.0.0.1", description="Host of the inference container.")
    inference_port: int = Field(
        8000,
        ge=1,
        le=65_535,
        validation_alias=_either("inference_port", "INFERENCE_PORT"),
        description="Port of the inference container.",
    )
    inference_url: str = Field(
        "/", validation_alias=_either("inference_url", "INFERENCE_URL"), description="Path that jobs are POSTed to."
    )
    health_protocol: Annotated[Literal["HTTP", "gRPC"], BeforeValidator(_as_spelt)] = Field(
        "HTTP",
        validation_alias=_either("health_protocol", "INFERENCE_HEALTH_PROTOCOL"),
        description="`HTTP`, or `gRPC`: the standard service grpc.health.v1, which needs `fnqueue[grpc]`.",
    )
    health_uri: str = Field(
        "/v2/health/ready",
        validation_alias=_either("health_uri", "INFERENCE_HEALTH_ENDPOINT"),
        description="Path of the container's health check.",
    )
    health_port: int = Field(
        0,
        ge=0,
        le=65_535,
        validation_alias=_either("health_port", "INFERENCE_HEALTH_PORT"),
        description="Port of the health check; 0: the inference port.",
    )
    health_timeout_s: Annotated[float, BeforeValidator(_in_seconds)] = Field(
        10,
        gt=0,
        le=600,
        validation_alias=_either("health_timeout_s", "INFERENCE_HEALTH_TIMEOUT"),
        description="Seconds one health check may take; an ISO-8601 duration will do. Within them a 404 is asked again "
        "after 2 s, then 4 s, and so on: the path may only not be served yet.",
    )
    health_expected_status: int = Field(
        200,
        validation_alias=_either("health_expected_status", "INFERENCE_HEALTH_EXPECTED_RESPONSE_CODE"),
        description="The only HTTP status that means healthy.",
    )
    health_start_interval_s: float = Field(
        0.5, gt=0, le=60, description="Seconds between checks until the first healthy answer."
    )
    health_interval_s: float = Field(10, gt=0, le=600, description="Seconds between checks of a healthy container.")
    ready_timeout_s: float = Field(
        1800, gt=0, description="Seconds a container may take to become healthy before the sidecar gives up."
    )
    max_request_concurrency: Annotated[int, BeforeValidator(_at_least_one)] = Field(
        1,
        le=16_384,
        validation_alias=_either("max_request_concurrency", "MAX_REQUEST_CONCURRENCY"),
        description="Jobs sent to the container at once, from 1 to 16384; less than 1 is 1, as upstream has it. Each "
        "takes an open file, and another one while it sends or gets something large.",
    )
    keep_connections: Annotated[Literal["auto", "always", "never"], BeforeValidator(_as_word)] = Field(
        "auto",
        description="Whether a connection to the container is kept for the next job, which costs less CPU than opening "
        "one: `always` for up to a second; `auto` for up to 0.2 s behind an answer that took no longer, in a container "
        "that was seen to leave an idle one open; `never`. When the container closes one just as a job is sent, that "
        "costs an attempt (never the last one). `never` is for a container of several processes that should share "
        "even short jobs evenly.",
    )
    run_timeout_s: float = Field(3600, ge=1, le=7 * 86_400, description="Seconds one attempt may run in the container.")
    renew_s: float = Field(
        0,
        ge=0,
        le=100,
        description="Seconds between two renewals of a lease, at most a third of `lease_s`; 0: a quarter of it.",
    )
    stream_grace_s: float = Field(
        30,
        ge=1,
        le=3600,
        description="Seconds for which a streamed answer is kept coming though its client has left; then the request "
        "is cancelled. As long may a container wait for somebody to read at all.",
    )
    drain_s: float = Field(
        120, ge=0, le=7200, description="Seconds to finish running jobs after SIGTERM before they are handed back."
    )
    crash_backoff_s: float = Field(
        1,
        ge=0,
        le=60,
        description="Seconds before a job whose container was lost is handed back, doubling per attempt.",
    )
    max_retry_after_s: float = Field(
        300,
        ge=0,
        le=86_400,
        description="Longest time for which a job is held back when its container answers 429 or 503 with "
        "`Retry-After`; 0: such an answer is a result, as it is without.",
    )
    asset_dir: Path = Field(Path("/var/inf/inputAssets"), description="Folder under which a request's assets are laid.")
    response_dir: Path = Field(
        Path("/var/inf/response"), description="Folder under which a container may write a request's files."
    )
    scratch_dir: str = Field(
        "",
        description="Folder for large bodies and answers under way, closed to the container; empty: the system's "
        "temporary folder.",
    )
    max_response_bytes: int = Field(
        5 * MIB,
        ge=1024,
        le=64 * MIB,
        description="Largest answer kept inline; a larger one becomes a zip behind a 302.",
    )
    max_progress_bytes: int = Field(
        250_000, ge=1024, le=4 * MIB, description="Largest progress file; a larger one is not read."
    )
    max_artifact_bytes: int = Field(
        5 * 1024 * MIB,
        ge=MIB,
        le=190 * 1024 * MIB,  # S3 takes 10,000 parts, and ours have 20 MiB
        description="Largest answer with its files, in bytes.",
    )
    beat_s: float = Field(2, gt=0, le=60, description="Seconds between two reports of this instance.")
    status_port: Annotated[int, Field(ge=0, le=65_535)] | Literal["any"] = Field(
        0,
        description="Port of `/metrics`, `/v1/health/live` and `/v1/health/ready`; 0 serves none, and `any` takes a "
        "free one, which `/v1/targets` of the controllers tells. Upstream uses 8080, and 8010 for metrics. Launchers "
        "give the sidecars that they start one each.",
    )

    @model_validator(mode="after")
    def _a_lease_survives_two_missed_renewals(self) -> Self:
        if self.renew_s * 3 > self.lease_s:
            raise ValueError("renew_s must be at most a third of lease_s")
        return self

    @property
    def renew_every_s(self) -> float:
        return self.renew_s or self.lease_s / 4


class TracingSettings(BaseSettings):
    """OpenTelemetry's own variables, as far as it is here that they are read; its SDK reads the others. An endpoint is
    what turns tracing on."""

    model_config = SettingsConfigDict(env_prefix="OTEL_", env_ignore_empty=True, frozen=True, extra="ignore")

    sdk_disabled: str = ""
    traces_exporter: str = "otlp"
    exporter_otlp_endpoint: str = ""
    exporter_otlp_traces_endpoint: str = ""
    exporter_otlp_protocol: str = "http/protobuf"
    exporter_otlp_traces_protocol: str = ""
    bsp_max_queue_size: str = "2048"
    service_name: str = ""

    @property
    def wanted(self) -> bool:
        return (
            bool(self.exporter_otlp_traces_endpoint or self.exporter_otlp_endpoint)
            and self.sdk_disabled.strip().lower() != "true"
            and self.traces_exporter.strip().lower() == "otlp"
        )

    @property
    def protocol(self) -> str:
        return self.exporter_otlp_traces_protocol or self.exporter_otlp_protocol


def refuse_memory(settings: Settings, *names: str) -> None:
    """For a command that is one of several processes. `names` are the settings that must name a server.

    Raises:
        ConfigurationError: one of them is `memory://`.
    """
    for name in names:
        if getattr(settings, name).get_secret_value().startswith("memory:"):
            raise ConfigurationError(
                f"FNQUEUE_{name.upper()} is memory://, which no other process could see; name a server, or use: "
                "fnqueue dev"
            )


def load(kind: type[S], **given: Any) -> S:
    """Settings from the environment, with `given` (options typed by a person; None means not given) on top.

    Raises:
        ConfigurationError: one line that names each bad setting; never echoes a value, which may be a secret.
    """
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as exc:
        faults = "; ".join(
            ": ".join([*(_variable(part) for part in fault["loc"]), fault["msg"]]) for fault in exc.errors()
        )
        raise ConfigurationError(f"bad settings: {faults}") from exc


def _variable(part: str | int) -> str:
    """Of a setting with an alias pydantic says the alias, which has the prefix already."""
    return f"FNQUEUE_{str(part).upper().removeprefix('FNQUEUE_')}"
