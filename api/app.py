"""Every route on one page."""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

from api import headers
from api.dashboard import routes as dashboard
from api.front import Front
from api.middleware import answer_errors, observing, sharing
from api.operations import FORM, JSON, Facts, Operation, Parameter, Reply, checking_itself, known, open_to_all, scoped
from api.routes import (
    accounts,
    assets,
    authorizations,
    clusters,
    dead_letters,
    deployments,
    envelopes,
    events,
    functions,
    health,
    invocations,
    keys,
    limits,
    logs,
    queues,
    reference,
    registries,
    requests,
    rollouts,
    secrets,
    tokens,
    transparent,
    webhooks,
)
from api.routes.blobs import BlobRoutes
from api.tracing import traced
from broker.accounts import ADMIN, INVOKE
from broker.activity import KEPT_MINUTES
from broker.backends.files import ROUTE as BLOBS
from broker.backends.files import FileBlobs
from broker.egress import LONGEST_URL
from broker.model import EVENT_STREAM
from broker.registries import ARTIFACT_TYPES, PROVISIONERS
from broker.webhooks import EVENTS as CALLBACK_EVENTS
from fnqueue import wire

NVCF = "/v2/nvcf"
# aiohttp's default leaves out braces, and then a bad ID would be an unknown path.
FUNCTION = "/functions/{function_id:[^/]+}"
VERSION = FUNCTION + "/versions/{version_id:[^/]+}"
REQUEST = "{request_id:[^/]+}"
DEPLOYMENT = "/deployments/{deployment_id:[^/]+}"
INSTANCE = "/instances/{instance_id:[^/]+}"
SPECIFICATION = "/gpu-specifications/{gpu_specification_id:[^/]+}"
ASSET = "/assets/{asset_id:[^/]+}"
ACCOUNT = "/accounts/{nca_id:[^/]+}"
CLUSTER = "/clusters/{cluster_id:[^/]+}"
KEY = "/v1/keys/{key_id:[^/]+}"
CREDENTIAL = "/registry-credentials/{credential_id:[^/]+}"

# Where NGC's own clients look (the org is the account), and where a super-admin acts for an account.
GATEWAYS = ("/v2/orgs/{org:[^/]+}/nvcf", "/v2/orgs/{org:[^/]+}/teams/{team:[^/]+}/nvcf")
MIRROR = f"{NVCF}/accounts/{{for_account:[^/]+}}"


def make_app(front: Front) -> web.Application:
    # From the outside in.
    inner = [observing(front), transparent.addressed(front), sharing(front), answer_errors]
    app = web.Application(middlewares=[*traced(front), *inner])
    invoking = [*_invocations(front), *_tokens(front)]
    managing = [*_management(front), *_authorizations(front), *_clusters(front)]
    app.add_routes([*(operation.route() for operation in operations(front)), *_blobs(front), *dashboard.routes(front)])
    app.add_routes(elsewhere([*invoking, *managing], *GATEWAYS))
    app.add_routes(elsewhere(managing, MIRROR))
    return app


def operations(front: Front) -> list[Operation]:
    """All that is documented: everything but the signed URLs, the dashboard, and what is served elsewhere once
    more."""
    described = [*_open(front), *_invocations(front), *_tokens(front), *_management(front)]
    described += [*_authorizations(front), *_accounts(front), *_keys(front), *_clusters(front), *_everyones(front)]
    described += _reference(front, described)
    return described


def elsewhere(described: Iterable[Operation], *prefixes: str) -> list[web.RouteDef]:
    """What is under NVCF and names no account, under other prefixes; `api.auth` reads there for whom it acts."""
    routes = [operation.route() for operation in described]
    return [
        web.RouteDef(route.method, prefix + route.path.removeprefix(NVCF), route.handler, route.kwargs)
        for prefix in prefixes
        for route in routes
        if route.path.startswith(f"{NVCF}/") and not route.path.startswith(f"{NVCF}/accounts")
    ]


def _open(front: Front) -> list[Operation]:
    anyone = open_to_all(front)
    return [
        anyone.get("/health", health.health, "Whether an invocation could be accepted", gives=wire.Up, errors=[500]),
        anyone.get("/readyz", health.ready, "Whether to send requests here", gives=wire.Ready, errors=[503]),
        anyone.get("/livez", health.live, "Whether this process runs", gives=wire.Up),
    ]


def _invocations(front: Front) -> list[Operation]:
    """These check the caller themselves, in upstream's order; except the cancel, which upstream has not."""
    calls, invokes = checking_itself(front, INVOKE), scoped(front, INVOKE, delegates=True)
    listens = scoped(front, INVOKE, delegates=True, paced=False)
    return [
        calls.post(f"{NVCF}/pexec{FUNCTION}", invocations.invoke, "Invoke a function", **INVOCATION),
        calls.post(f"{NVCF}/pexec{VERSION}", invocations.invoke, "Invoke a version", **INVOCATION_OF_VERSION),
        calls.get(f"{NVCF}/pexec/status/{REQUEST}", invocations.poll, "Wait for a result", **POLL),
        calls.post(f"{NVCF}/exec{FUNCTION}", envelopes.invoke, "Invoke a function with an envelope", **ENVELOPE),
        calls.post(
            f"{NVCF}/exec{VERSION}", envelopes.invoke, "Invoke a version with an envelope", **ENVELOPE_OF_VERSION
        ),
        calls.get(f"{NVCF}/exec/status/{REQUEST}", envelopes.poll, "Wait for a result in an envelope", **ENVELOPE_POLL),
        invokes.delete(
            f"{NVCF}/requests/{REQUEST}", requests.cancel, "Cancel a request", gives=wire.Cancelled, status=202
        ),
        listens.get(f"{NVCF}/requests/{REQUEST}/events", events.follow, "Listen to a request", **EVENTS),
    ]


def _tokens(front: Front) -> list[Operation]:
    """A super-admin delegates what is his own, so these are not mirrored."""
    delegates, at, one = scoped(front, INVOKE), f"{NVCF}/tokens", wire.InvocationToken
    return [
        delegates.post(
            f"{at}/functions",
            tokens.create_for_functions,
            "Delegate the invocation of several functions",
            takes=wire.CreateTokenForFunctions,
            gives=one,
            errors=[404],
        ),
        delegates.post(
            at + FUNCTION, tokens.create, "Delegate the invocation of a function", takes=wire.CreateToken, gives=one
        ),
        delegates.post(
            at + VERSION,
            tokens.create,
            "Delegate the invocation of a version",
            takes=wire.CreateToken,
            gives=one,
            name="tokens_create_for_version",
        ),
    ]


def _management(front: Front) -> list[Operation]:
    registers = scoped(front, "register_function")
    lists = scoped(front, "list_functions", "list_functions_details")
    deletes, deploys = scoped(front, "delete_function"), scoped(front, "deploy_function")
    updates, looks = scoped(front, "update_function"), scoped(front, "queue_details")
    hides, logs_in = scoped(front, "update_secrets"), scoped(front, "manage_registry_credentials")
    # What is asked once an invocation, or oftener, keeps no pace.
    invokes, polls = scoped(front, INVOKE, paced=False), scoped(front, "queue_details", paced=False)
    one, many, credential = wire.FunctionAnswer, wire.FunctionList, wire.RegistryCredentialAnswer
    return [
        registers.post(
            f"{NVCF}/functions", functions.create, "Create a function", takes=wire.CreateFunction, gives=one
        ),
        lists.get(f"{NVCF}/functions", functions.list_functions, "List functions", gives=many, parameters=[VISIBILITY]),
        lists.get(
            f"{NVCF}/functions/ids", functions.list_ids, "List IDs", gives=wire.FunctionIds, parameters=[VISIBILITY]
        ),
        registers.post(
            f"{NVCF}{FUNCTION}/versions", functions.add_version, "Add a version", takes=wire.CreateFunction, gives=one
        ),
        lists.get(f"{NVCF}{FUNCTION}/versions", functions.list_versions, "List versions", gives=many),
        lists.get(f"{NVCF}{VERSION}", functions.get, "Get a version", gives=one, parameters=[INCLUDE_SECRETS]),
        updates.put(f"{NVCF}{VERSION}", functions.update, "Change a version", takes=wire.UpdateFunction, gives=one),
        updates.put(
            f"{NVCF}/metadata{VERSION}",
            functions.update_metadata,
            "Change the tags of a version",
            takes=wire.UpdateMetadata,
            gives=one,
        ),
        deletes.delete(f"{NVCF}{VERSION}", functions.delete_version, "Delete a version"),
        lists.get(f"{NVCF}{FUNCTION}/weights", rollouts.get, "How calls are shared by versions", gives=wire.Weights),
        updates.put(
            f"{NVCF}{FUNCTION}/weights",
            rollouts.put,
            "Share calls by versions",
            takes=wire.SetWeights,
            gives=wire.Weights,
        ),
        updates.put(f"{NVCF}/ratelimit{VERSION}", limits.replace, "Set a rate limit", takes=wire.SetRateLimit),
        updates.delete(f"{NVCF}/ratelimit{VERSION}", limits.clear, "Lift a rate limit"),
        deploys.post(
            f"{NVCF}/deployments{VERSION}",
            deployments.create,
            "Deploy a version",
            takes=wire.CreateDeployment,
            gives=wire.DeploymentAnswer,
        ),
        deploys.get(f"{NVCF}/deployments{VERSION}", deployments.get, "Get a deployment", gives=wire.DeploymentAnswer),
        deploys.put(
            f"{NVCF}/deployments{VERSION}",
            deployments.update,
            "Change all GPU specifications of a deployment",
            takes=wire.UpdateDeployment,
            gives=wire.DeploymentAnswer,
        ),
        deploys.get(f"{NVCF}{DEPLOYMENT}", deployments.find, "Find a deployment", gives=wire.DeploymentAnswer),
        deploys.patch(
            f"{NVCF}{DEPLOYMENT}{SPECIFICATION}",
            deployments.patch,
            "Change a GPU specification",
            takes=wire.UpdateGpuSpecification,
            gives=wire.GpuSpecificationAnswer,
        ),
        deploys.delete(
            f"{NVCF}/deployments{VERSION}", deployments.delete, "Undeploy a version", gives=one, parameters=[GRACEFUL]
        ),
        *_logs(front),
        hides.put(f"{NVCF}/secrets{VERSION}", secrets.put, "Set secrets of a version", takes=wire.PutSecrets),
        logs_in.post(
            f"{NVCF}/registry-credentials",
            registries.create,
            "Add a registry credential",
            takes=wire.CreateRegistryCredential,
            gives=credential,
        ),
        logs_in.get(
            f"{NVCF}/registry-credentials",
            registries.list_credentials,
            "List registry credentials",
            gives=wire.RegistryCredentialList,
            parameters=[ARTIFACT_TYPE, PROVISIONED_BY],
        ),
        logs_in.get(f"{NVCF}{CREDENTIAL}", registries.get, "Get a registry credential", gives=credential),
        logs_in.patch(
            f"{NVCF}{CREDENTIAL}",
            registries.update,
            "Change a registry credential",
            takes=wire.UpdateRegistryCredential,
            gives=credential,
        ),
        logs_in.delete(f"{NVCF}{CREDENTIAL}", registries.delete, "Delete a registry credential"),
        logs_in.get(
            f"{NVCF}/recognized-registries",
            registries.list_recognized,
            "Registries that credentials may be for",
            gives=wire.RecognizedRegistries,
        ),
        invokes.post(
            f"{NVCF}/assets",
            assets.create,
            "Create an asset",
            takes=wire.CreateAsset,
            gives=wire.AssetUpload,
            parameters=[_ASSET_KEY],
        ),
        invokes.get(f"{NVCF}/assets", assets.list_assets, "List assets", gives=wire.AssetList),
        invokes.get(f"{NVCF}{ASSET}", assets.get, "Get an asset", gives=wire.AssetAnswer),
        invokes.delete(f"{NVCF}{ASSET}", assets.delete, "Delete an asset"),
        looks.get(f"{NVCF}/queues{FUNCTION}", queues.of_function, "Queues of a function", gives=wire.Queues),
        looks.get(f"{NVCF}/queues{VERSION}", queues.of_version, "Queue of a version", gives=wire.Queues),
        looks.get(
            f"{NVCF}{VERSION}/activity",
            queues.activity,
            "What a version did lately",
            gives=wire.Activity,
            parameters=[MINUTES],
        ),
        polls.get(f"{NVCF}/queues/{REQUEST}/position", queues.position, "Place of a request", gives=wire.Position),
        *_requests(front),
        *_dead_letters(front),
        *_webhooks(front),
    ]


def _logs(front: Front) -> list[Operation]:
    reads, at = scoped(front, logs.SCOPE), f"{NVCF}/logs{VERSION}"
    return [
        reads.get(at, logs.get, "What instances wrote", gives=wire.InstanceLogs, parameters=[*WHICH_LINES, _PREVIOUS]),
        reads.get(f"{at}/events", logs.follow, "Listen to what instances write", **LOG_EVENTS),
    ]


def _requests(front: Front) -> list[Operation]:
    lists, asks = scoped(front, "invoke_function"), scoped(front, "invoke_function", paced=False)
    return [
        lists.get(
            f"{NVCF}/requests",
            requests.list_requests,
            "List requests",
            gives=wire.RequestList,
            parameters=WHICH_REQUESTS,
        ),
        asks.get(f"{NVCF}/requests/{REQUEST}", requests.get, "Get a request's receipt", gives=wire.RequestReceipt),
    ]


def _dead_letters(front: Front) -> list[Operation]:
    owns, at = scoped(front, INVOKE), f"{NVCF}/dead-letters"
    return [
        owns.get(
            at,
            dead_letters.list_letters,
            "List dead letters",
            gives=wire.DeadLetterList,
            parameters=[*WHICH_DEAD_LETTERS, *PAGE],
        ),
        owns.get(
            f"{at}/causes",
            dead_letters.causes,
            "Count dead letters by what they died of",
            gives=wire.DeadLetterCauses,
            parameters=WHICH_DEAD_LETTERS,
        ),
        owns.post(
            f"{at}/redrive",
            dead_letters.redrive_many,
            "Start dead requests again",
            takes=wire.RedriveDeadLetters,
            gives=wire.DeadLettersRedriven,
        ),
        owns.post(
            f"{at}/purge",
            dead_letters.purge_many,
            "Throw dead letters away",
            takes=wire.PurgeDeadLetters,
            gives=wire.DeadLettersPurged,
        ),
        owns.get(f"{at}/{REQUEST}", dead_letters.get, "Get a dead letter with its input", gives=wire.DeadLetterDetail),
        owns.delete(f"{at}/{REQUEST}", dead_letters.purge, "Throw a dead letter away"),
        owns.post(
            f"{at}/{REQUEST}/redrive",
            dead_letters.redrive,
            "Start a dead request again",
            takes=wire.RedriveDeadLetter,
            gives=wire.DeadLetterRedriven,
            status=202,
        ),
    ]


def _webhooks(front: Front) -> list[Operation]:
    looks, hides = scoped(front, INVOKE), scoped(front, "update_secrets")
    lists, updates = scoped(front, "list_functions", "list_functions_details"), scoped(front, "update_function")
    at, of_function, default = f"{NVCF}/webhooks", f"{NVCF}{FUNCTION}/webhook", wire.FunctionWebhook
    return [
        hides.get(f"{at}/secrets", webhooks.list_secrets, "List webhook secrets", gives=wire.WebhookSecretList),
        hides.post(
            f"{at}/secrets",
            webhooks.create_secret,
            "Make a webhook secret",
            takes=wire.CreateWebhookSecret,
            gives=wire.WebhookSecretCreated,
        ),
        hides.delete(f"{at}/secrets/{{secret_id:[^/]+}}", webhooks.delete_secret, "Delete a webhook secret"),
        lists.get(of_function, webhooks.get_default, "Where the ends of a function's requests are told", gives=default),
        updates.put(
            of_function,
            webhooks.set_default,
            "Tell the ends of a function's requests",
            takes=wire.SetFunctionWebhook,
            gives=default,
        ),
        updates.delete(of_function, webhooks.clear_default, "Tell the ends of a function's requests no more"),
        looks.get(
            f"{at}/deliveries",
            webhooks.list_deliveries,
            "List webhook deliveries",
            gives=wire.WebhookDeliveryList,
            parameters=[WHICH_REQUESTS[0], _DELIVERY_STATE, *PAGE],
        ),
        looks.get(
            f"{at}/deliveries/{REQUEST}",
            webhooks.get_delivery,
            "Get a webhook delivery with its log",
            gives=wire.WebhookDeliveryDetail,
        ),
        looks.post(
            f"{at}/deliveries/{REQUEST}/redeliver",
            webhooks.redeliver,
            "Send a webhook again",
            gives=wire.WebhookDelivery,
            status=202,
        ),
    ]


def _authorizations(front: Front) -> list[Operation]:
    authorizes = scoped(front, "authorize_clients")
    at, one = f"{NVCF}/authorizations", wire.AuthorizationAnswer
    shares = [
        authorizes.get(
            f"{at}{FUNCTION}",
            authorizations.of_function,
            "Who may use a function's versions",
            gives=wire.AuthorizationList,
        ),
        authorizes.get(f"{at}{VERSION}", authorizations.of_version, "Who may use a version", gives=one),
    ]
    for level, suffix, what in ((FUNCTION, "", "a function"), (VERSION, "_of_version", "a version")):
        shares += [
            authorizes.post(
                at + level,
                authorizations.replace_all,
                f"Share {what} with these accounts only",
                takes=wire.AuthorizeParties,
                gives=one,
                name="authorizations_replace_all" + suffix,
            ),
            authorizes.delete(
                at + level,
                authorizations.clear,
                f"Share {what} with nobody",
                gives=one,
                name="authorizations_clear" + suffix,
            ),
            authorizes.patch(
                f"{at}{level}/add",
                authorizations.add,
                f"Share {what} with one more account",
                takes=wire.AuthorizeParty,
                gives=one,
                name="authorizations_add" + suffix,
            ),
            authorizes.patch(
                f"{at}{level}/remove",
                authorizations.remove,
                f"Share {what} with one account less",
                takes=wire.AuthorizeParty,
                gives=one,
                name="authorizations_remove" + suffix,
            ),
        ]
    return shares


def _accounts(front: Front) -> list[Operation]:
    """These ask for their scopes themselves, which depend on the account that the path names."""
    reads, writes = (known(front, *accounts.anyones(scopes)) for scopes in (accounts.READS, accounts.WRITES))
    at, one = f"{NVCF}{ACCOUNT}", wire.AccountAnswer
    return [
        reads.get(f"{NVCF}/accounts", accounts.list_accounts, "List accounts", gives=wire.AccountList),
        writes.post(at, accounts.create, "Create an account", takes=wire.CreateAccount, gives=one),
        reads.get(at, accounts.get, "Get an account", gives=one),
        writes.patch(at, accounts.update, "Update an account", takes=wire.UpdateAccount, gives=one),
        writes.delete(at, accounts.delete, "Delete an account and its keys"),
    ]


def _keys(front: Front) -> list[Operation]:
    manages, anyone = scoped(front, *keys.SCOPES), open_to_all(front)
    one = wire.ApiKey
    return [
        manages.post(
            "/v1/keys", keys.create, "Create a key", takes=wire.CreateKey, gives=one, parameters=[OWNER, ISSUER]
        ),
        manages.get("/v1/keys", keys.list_keys, "List keys", gives=wire.ApiKeyList, parameters=[OF_ACCOUNT, OWNER]),
        manages.get(KEY, keys.get, "Get a key", gives=one),
        manages.delete(KEY, keys.delete, "Delete a key"),
        manages.put(
            f"{KEY}/authorizations",
            keys.authorize,
            "Give a key other rights",
            takes=wire.UpdateKeyAuthorizations,
            gives=one,
        ),
        manages.put(
            f"{KEY}/status", keys.set_status, "Suspend or activate a key", takes=wire.UpdateKeyStatus, gives=one
        ),
        manages.post(
            "/v1/introspect",
            keys.introspect,
            "Tell what a key may do",
            takes=wire.Introspect,
            gives=wire.Introspected,
            errors=[404],
        ),
        anyone.post(
            "/v3/keys/get-caller-info",
            keys.caller_info,
            "Tell whose key it is",
            takes=wire.Credentials,
            media=FORM,
            gives=wire.CallerInfo,
            errors=[401, 403],
        ),
    ]


def _everyones(front: Front) -> list[Operation]:
    """About whichever account, and so not mirrored: for super-admins."""
    looks, ends = scoped(front, f"{ADMIN}deploy_function"), scoped(front, f"{ADMIN}delete_function")
    return [
        looks.get(
            f"{NVCF}{ACCOUNT}/deployments",
            deployments.of_account,
            "What an account has deployed",
            gives=wire.DeploymentList,
        ),
        ends.delete(f"{NVCF}{INSTANCE}", deployments.evict, "Stop an instance"),
    ]


def _clusters(front: Front) -> list[Operation]:
    registers, lists = scoped(front, "register_function"), scoped(front, "list_cluster_groups")
    operates = scoped(front, "cluster-management")
    counts = known(front, *accounts.anyones([clusters.USAGE]))
    one = wire.ClusterAnswer
    return [
        registers.get(f"{NVCF}/supportedGpus", clusters.supported_gpus, "GPUs on offer", gives=wire.SupportedGpus),
        lists.get(f"{NVCF}/clusterGroups", clusters.list_groups, "Instance types on offer", gives=wire.ClusterGroups),
        counts.get(f"{NVCF}{ACCOUNT}/usage/gpus", clusters.usage, "What deployments take", gives=wire.GpuUsages),
        operates.post(
            f"/v1{ACCOUNT}/clusters",
            clusters.register,
            "Register a cluster",
            takes=wire.RegisterCluster,
            gives=wire.ClusterRegistered,
        ),
        operates.get(f"/v1{ACCOUNT}/clusters", clusters.list_clusters, "List clusters", gives=wire.ClusterList),
        operates.get(f"/v1{ACCOUNT}{CLUSTER}", clusters.get, "Get a cluster", gives=one),
        operates.put(
            f"/v1{ACCOUNT}{CLUSTER}", clusters.update, "Update a cluster", takes=wire.RegisterCluster, gives=one
        ),
        operates.delete(f"/v1{ACCOUNT}{CLUSTER}", clusters.delete, "Remove a cluster"),
        operates.put(
            f"/v1/nvca{CLUSTER}/register",
            clusters.connect,
            "Say that an agent starts",
            takes=wire.ConnectCluster,
            gives=wire.ClusterConnected,
        ),
        operates.post(
            f"/v1/nvca{CLUSTER}/heartbeat",
            clusters.heartbeat,
            "Say that an agent lives",
            takes=wire.Heartbeat,
            gives=wire.HeartbeatAnswer,
        ),
    ]


def _reference(front: Front, described: list[Operation]) -> list[Operation]:
    anyone = open_to_all(front)

    def shown(media: str) -> list[Reply]:
        return [Reply(status=200, description="As it is.", media=media)]

    document = reference.Reference(described)
    return [
        anyone.get(f"{NVCF}/openapi.json", document.openapi, "Describe this API", replies=shown(JSON)),
        anyone.get(f"{NVCF}/docs", reference.page, "Show this API", replies=shown("text/html")),
        anyone.get(f"{NVCF}/docs/page.css", reference.style, "How the page looks", replies=shown("text/css")),
        anyone.get(f"{NVCF}/docs/page.js", reference.script, "How the page works", replies=shown("text/javascript")),
    ]


def _blobs(front: Front) -> list[web.RouteDef]:
    """Only where no storage server is there to serve its own URLs; the URL itself is the credential."""
    if not isinstance(front.broker.blobs, FileBlobs):
        return []
    blobs = BlobRoutes(front, front.broker.blobs)
    return [web.put(BLOBS + "{key:.+}", blobs.put), web.get(BLOBS + "{key:.+}", blobs.get)]


# -- what several operations share ---------------------------------------------------------------

VISIBILITY = Parameter(
    name="visibility",
    where="query",
    description="Which functions: the account's own, those shared with it, those shared with all. Absent: all three.",
    schema={"type": "array", "items": {"type": "string", "enum": ["private", "authorized", "public"]}},
)
GRACEFUL = Parameter(
    name="graceful",
    where="query",
    description="Keep the instances until nothing is queued or running.",
    schema={"type": "boolean", "default": False},
)
MINUTES = Parameter(
    name="minutes",
    where="query",
    description="How far back, up to the present minute.",
    schema={"type": "integer", "minimum": 1, "maximum": KEPT_MINUTES, "default": queues.MINUTES_DEFAULT},
)
INCLUDE_SECRETS = Parameter(
    name="includeSecrets",
    where="query",
    description="Whether to name the version's secrets, to those of its account who may see details.",
    schema={"type": "boolean", "default": True},
)
ARTIFACT_TYPE = Parameter(
    name="artifactType",
    where="query",
    description="Those for any of these. Absent: all.",
    schema={"type": "array", "items": {"type": "string", "enum": list(ARTIFACT_TYPES)}},
)
PROVISIONED_BY = Parameter(
    name="provisionedBy",
    where="query",
    description="Those added by any of these. Absent: all.",
    schema={"type": "array", "items": {"type": "string", "enum": list(PROVISIONERS)}},
)
WHICH_LINES = [
    Parameter(
        name="tail",
        where="query",
        description="How many of the last lines, of all instances together.",
        schema={"type": "integer", "minimum": 0, "maximum": logs.MOST_TAIL, "default": logs.TAIL_DEFAULT},
    ),
    Parameter(
        name="since",
        where="query",
        description="No line that was written before.",
        schema={"type": "string", "format": "date-time"},
    ),
    Parameter(
        name="instanceId",
        where="query",
        description="Those of this instance.",
        schema={"type": "string", "format": "uuid"},
    ),
]
_PREVIOUS = Parameter(
    name="previous",
    where="query",
    description="Only those of instances that were stopped or died in the last hour.",
    schema={"type": "boolean", "default": False},
)
WHICH_REQUESTS = [
    Parameter(name="functionId", where="query", description="Those of this function.", schema={"type": "string"}),
    Parameter(name="functionVersionId", where="query", description="Those of this version.", schema={"type": "string"}),
    Parameter(
        name="status",
        where="query",
        description="Those in any of these. Absent: all.",
        schema={"type": "array", "items": {"type": "string", "enum": list(requests.STATUSES)}},
    ),
    Parameter(
        name="createdAfter",
        where="query",
        description="Those accepted at this time or later.",
        schema={"type": "string", "format": "date-time"},
    ),
    Parameter(
        name="createdBefore",
        where="query",
        description="Those accepted before this time.",
        schema={"type": "string", "format": "date-time"},
    ),
    Parameter(
        name="limit",
        where="query",
        description="The most that a page holds.",
        schema={"type": "integer", "minimum": 1, "maximum": requests.PAGE_MAX, "default": requests.PAGE_DEFAULT},
    ),
    Parameter(
        name="cursor", where="query", description="From the page before. Absent: the newest.", schema={"type": "string"}
    ),
]
PAGE = WHICH_REQUESTS[-2:]
WHICH_DEAD_LETTERS = [
    *WHICH_REQUESTS[:2],
    Parameter(
        name="cause",
        where="query",
        description="Those that died of any of these. Absent: all.",
        schema={"type": "array", "items": {"type": "string", "enum": list(dead_letters.CAUSES)}},
    ),
    Parameter(
        name="diedAfter",
        where="query",
        description="Those that died at this time or later.",
        schema={"type": "string", "format": "date-time"},
    ),
    Parameter(
        name="diedBefore",
        where="query",
        description="Those that died before this time.",
        schema={"type": "string", "format": "date-time"},
    ),
    Parameter(
        name="redriven",
        where="query",
        description="Those that were started again, or those that were not. Absent: both.",
        schema={"type": "boolean"},
    ),
]
_DELIVERY_STATE = Parameter(
    name="state",
    where="query",
    description="Those in any of these. Absent: all.",
    schema={"type": "array", "items": {"type": "string", "enum": list(webhooks.STATES)}},
)
OF_ACCOUNT = Parameter(
    name="nca_id", where="query", description="Whose keys. Absent: the caller's account's.", schema={"type": "string"}
)
OWNER = Parameter(
    name=keys.OWNER,
    where="header",
    description="Whom the key is for; of a list: whose keys to show.",
    schema={"type": "string", "maxLength": keys.LONGEST_ID},
)
ISSUER = Parameter(
    name=keys.ISSUER,
    where="header",
    description="The service that made the key.",
    schema={"type": "string", "maxLength": keys.LONGEST_ID},
)
_WAIT = [
    Parameter(
        name=headers.POLL_SECONDS,
        where="header",
        description="Seconds to hold the call until there is a result.",
        schema={"type": "integer", "minimum": 0, "maximum": headers.POLL_MAX_S, "default": headers.POLL_DEFAULT_S},
    ),
    Parameter(
        name=headers.PREFER,
        where="header",
        description="`respond-async` answers 202 at once; `wait=N` holds the call for N seconds.",
        schema={"type": "string", "examples": ["respond-async", "wait=10"]},
    ),
]
_ASSET_KEY = Parameter(
    name=headers.IDEMPOTENCY_KEY,
    where="header",
    description="A name for this asset: created again with the same key, it is the same asset, to be uploaded again.",
    schema={"type": "string", "minLength": 1, "maxLength": headers.IDEMPOTENCY_KEY_MAX},
)
_SUBMIT = [
    Parameter(
        name=headers.INPUT_ASSETS,
        where="header",
        description="IDs of assets that the function is given, separated by commas.",
        schema={"type": "string"},
    ),
    Parameter(
        name=headers.IDEMPOTENCY_KEY,
        where="header",
        description="A name for this request: sent again with the same key and body, it is the same request.",
        schema={"type": "string", "minLength": 1, "maxLength": headers.IDEMPOTENCY_KEY_MAX},
    ),
    Parameter(
        name=headers.QUEUE_TIMEOUT,
        where="header",
        description="Seconds within which a worker must have begun it; else it ends, `expired`, and never runs. "
        "Absent: the function's `queueTimeout`.",
        schema={"type": "integer", "minimum": 1},
    ),
    Parameter(
        name=headers.RUN_TIMEOUT,
        where="header",
        description="Seconds after which a running attempt is cut off, and the request ends, `timed-out`. "
        "Absent: the function's `runTimeout`.",
        schema={"type": "integer", "minimum": 1},
    ),
    Parameter(
        name=headers.CALLBACK_URL,
        where="header",
        description="Where the end of the request is told, signed by the account's webhook secrets; `none`: nowhere. "
        "Absent: where the function says.",
        schema={"type": "string", "maxLength": LONGEST_URL, "examples": ["https://example.com/hooks/fnqueue"]},
    ),
    Parameter(
        name=headers.CALLBACK_EVENTS,
        where="header",
        description=f"Which ends, separated by commas, of {', '.join(CALLBACK_EVENTS)}. Absent: all.",
        schema={"type": "string", "examples": ["errored, timed-out, dead"]},
    ),
    Parameter(
        name=headers.ENABLE_GATEWAY_TIMEOUT,
        where="header",
        description="`true`: 504 in place of 202 for a request that is still queued; it is removed then.",
        schema={"type": "string", "enum": ["true", "false"]},
    ),
    Parameter(
        name=headers.DISABLE_COMPATIBILITY,
        where="header",
        description="`true`: the function's answer as it is.",
        schema={"type": "string", "enum": ["true", "false"]},
    ),
]
_LAST_EVENT_ID = Parameter(
    name=headers.LAST_EVENT_ID,
    where="header",
    description="With `Accept: text/event-stream`: the ID of the event after which to go on; absent: all of them.",
    schema={"type": "string"},
)
_MARKS = {
    headers.REQUEST_ID: "The request's ID, to poll, find or cancel it by.",
    headers.STATUS: "`fulfilled`, `errored`, `rejected`, `in-progress` or `pending-evaluation`.",
    headers.PERCENT_COMPLETE: "Progress, where the function tells it.",
}
_TIMED = _MARKS | {headers.SERVER_TIMING: "Where the time of a finished request went, in milliseconds."}
_AGAIN = {
    "Location": "Where to ask again.",
    "Retry-After": "Seconds to wait before.",
    headers.ETA: "How many seconds there are until the result, where that is known: `p50=4.2, p90=9.8`.",
}
_REPLIES = [
    Reply(status=200, description="The function's answer.", media="*/*", headers=_TIMED),
    Reply(
        status=202,
        description="Accepted, and not done yet.",
        headers=_MARKS | _AGAIN,
    ),
    Reply(
        status=302,
        description="The answer is large: a zip file.",
        headers=_TIMED | {"Location": "Where it is; needs no key."},
    ),
    Reply(status="default", description="The function's own answer, with its status.", media="*/*", headers=_TIMED),
]
EVENTS = Facts(
    parameters=[
        Parameter(
            name=headers.LAST_EVENT_ID,
            where="header",
            description="The ID of the last event that came: what came after it is sent.",
            schema={"type": "string"},
        )
    ],
    replies=[
        Reply(
            status=200,
            description="Events as they happen, up to `done`.",
            media=EVENT_STREAM,
            model=wire.RequestEvent,
            headers={headers.REQUEST_ID: _MARKS[headers.REQUEST_ID]},
        ),
        Reply(status=204, description="The last event was `done`: there will be no more."),
    ],
)
LOG_EVENTS = Facts(
    parameters=[*WHICH_LINES, *EVENTS["parameters"]],
    replies=[
        Reply(
            status=200,
            description="Events named `lines`, data as LogLines; at the end `done`, without lines.",
            media=EVENT_STREAM,
        ),
    ],
)
_TOLD = Reply(status=204, description="Everything of the stream was said before.", headers=_MARKS)
_ENDS = [410, 500, 502, 504]
POLL = Facts(parameters=[*_WAIT, _LAST_EVENT_ID], replies=[*_REPLIES, _TOLD], errors=_ENDS)
INVOCATION = Facts(takes=object, parameters=[*_WAIT, *_SUBMIT], replies=_REPLIES, errors=[*_ENDS, 422])
INVOCATION_OF_VERSION = INVOCATION | {"name": "invocations_invoke_version"}
_ENCLOSED = [
    Reply(status=200, description="Done.", media=JSON, model=wire.EnvelopeAnswer, headers=_MARKS),
    Reply(status=202, description="Not done yet.", media=JSON, model=wire.EnvelopeAnswer, headers=_MARKS | _AGAIN),
    Reply(status="default", description="A failure of the function, with its status.", media="*/*", headers=_MARKS),
]
ENVELOPE_POLL = Facts(parameters=_WAIT, replies=_ENCLOSED, errors=[410, 500, 504])
ENVELOPE = Facts(takes=wire.Envelope, parameters=[*_WAIT, *_SUBMIT], replies=_ENCLOSED, errors=[410, 422, 500, 504])
ENVELOPE_OF_VERSION = ENVELOPE | {"name": "envelopes_invoke_version"}
