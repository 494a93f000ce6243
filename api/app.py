"""Every route on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from api.auth import Guarded, guarded
from api.front import Front
from api.middleware import answer_errors, observing, sharing
from api.routes import (
    accounts,
    assets,
    authorizations,
    deployments,
    functions,
    health,
    invocations,
    keys,
    queues,
    requests,
)
from api.routes.blobs import BlobRoutes
from broker.backends.files import ROUTE as BLOBS
from broker.backends.files import FileBlobs

NVCF = "/v2/nvcf"
# aiohttp's default leaves out braces, and then a bad ID would be an unknown path.
FUNCTION = "/functions/{function_id:[^/]+}"
VERSION = FUNCTION + "/versions/{version_id:[^/]+}"
REQUEST = "{request_id:[^/]+}"
ASSET = "/assets/{asset_id:[^/]+}"
ACCOUNT = "/accounts/{account:[^/]+}"
KEY = "/v1/keys/{key_id:[^/]+}"

# Where NGC's own clients look (the org is the account), and where a super-admin acts for an account.
GATEWAYS = ("/v2/orgs/{org:[^/]+}/nvcf", "/v2/orgs/{org:[^/]+}/teams/{team:[^/]+}/nvcf")
MIRROR = f"{NVCF}/accounts/{{for_account:[^/]+}}"


def make_app(front: Front) -> web.Application:
    # From the outside in.
    app = web.Application(middlewares=[observing(front), sharing(front), answer_errors])
    invoking, managing = _invocations(front), _management(front)
    app.add_routes([*_open(front), *invoking, *managing, *_accounts(front), *_keys(front), *_blobs(front)])
    app.add_routes(elsewhere([*invoking, *managing], *GATEWAYS))
    app.add_routes(elsewhere(managing, MIRROR))
    return app


def elsewhere(routes: Iterable[web.RouteDef], *prefixes: str) -> list[web.RouteDef]:
    """The same handlers under other prefixes; `api.auth` reads there for whom they act."""
    return [
        web.RouteDef(route.method, prefix + route.path.removeprefix(NVCF), route.handler, route.kwargs)
        for prefix in prefixes
        for route in routes
        if not route.path.startswith(f"{NVCF}/accounts")
    ]


def _open(front: Front) -> list[web.RouteDef]:
    return [
        web.get("/health", partial(health.health, front)),
        web.get("/readyz", partial(health.ready, front)),
        web.get("/livez", partial(health.live, front)),
    ]


def _invocations(front: Front) -> list[web.RouteDef]:
    """These check the caller themselves, in upstream's order; except the cancel, which upstream has not."""
    invoke, poll = partial(invocations.invoke, front), partial(invocations.poll, front)
    cancel = guarded(front, requests.cancel, "invoke_function")
    return [
        web.post(f"{NVCF}/pexec{FUNCTION}", invoke),
        web.post(f"{NVCF}/pexec{VERSION}", invoke),
        web.get(f"{NVCF}/pexec/status/{REQUEST}", poll),
        web.delete(f"{NVCF}/requests/{REQUEST}", cancel),
    ]


def _management(front: Front) -> list[web.RouteDef]:
    def scoped(*scopes: str) -> Callable[[Guarded], Handler]:
        return lambda handler: guarded(front, handler, *scopes)

    registers, lists = scoped("register_function"), scoped("list_functions", "list_functions_details")
    deletes, deploys = scoped("delete_function"), scoped("deploy_function")
    invokes, looks = scoped("invoke_function"), scoped("queue_details")
    return [
        web.post(f"{NVCF}/functions", registers(functions.create)),
        web.get(f"{NVCF}/functions", lists(functions.list_functions)),
        web.get(f"{NVCF}/functions/ids", lists(functions.list_ids)),
        web.post(f"{NVCF}{FUNCTION}/versions", registers(functions.add_version)),
        web.get(f"{NVCF}{FUNCTION}/versions", lists(functions.list_versions)),
        web.get(f"{NVCF}{VERSION}", lists(functions.get)),
        web.delete(f"{NVCF}{VERSION}", deletes(functions.delete_version)),
        web.post(f"{NVCF}/deployments{VERSION}", deploys(deployments.create)),
        web.get(f"{NVCF}/deployments{VERSION}", deploys(deployments.get)),
        web.delete(f"{NVCF}/deployments{VERSION}", deploys(deployments.delete)),
        web.post(f"{NVCF}/assets", invokes(assets.create)),
        web.get(f"{NVCF}/assets", invokes(assets.list_assets)),
        web.get(f"{NVCF}{ASSET}", invokes(assets.get)),
        web.delete(f"{NVCF}{ASSET}", invokes(assets.delete)),
        web.get(f"{NVCF}/queues{FUNCTION}", looks(queues.of_function)),
        web.get(f"{NVCF}/queues{VERSION}", looks(queues.of_version)),
        web.get(f"{NVCF}/queues/{REQUEST}/position", looks(queues.position)),
        *_authorizations(scoped("authorize_clients")),
    ]


def _authorizations(authorizes: Callable[[Guarded], Handler]) -> list[web.RouteDef]:
    at = f"{NVCF}/authorizations"
    return [
        web.get(f"{at}{FUNCTION}", authorizes(authorizations.of_function)),
        web.get(f"{at}{VERSION}", authorizes(authorizations.of_version)),
        *(web.post(at + level, authorizes(authorizations.replace_all)) for level in (FUNCTION, VERSION)),
        *(web.delete(at + level, authorizes(authorizations.clear)) for level in (FUNCTION, VERSION)),
        *(web.patch(f"{at}{level}/add", authorizes(authorizations.add)) for level in (FUNCTION, VERSION)),
        *(web.patch(f"{at}{level}/remove", authorizes(authorizations.remove)) for level in (FUNCTION, VERSION)),
    ]


def _accounts(front: Front) -> list[web.RouteDef]:
    """These ask for their scopes themselves, which depend on the account that the path names."""

    def known(handler: Guarded) -> Handler:
        return guarded(front, handler)

    return [
        web.get(f"{NVCF}/accounts", known(accounts.list_accounts)),
        web.post(f"{NVCF}{ACCOUNT}", known(accounts.create)),
        web.get(f"{NVCF}{ACCOUNT}", known(accounts.get)),
        web.patch(f"{NVCF}{ACCOUNT}", known(accounts.update)),
        web.delete(f"{NVCF}{ACCOUNT}", known(accounts.delete)),
    ]


def _keys(front: Front) -> list[web.RouteDef]:
    def managing(handler: Guarded) -> Handler:
        return guarded(front, handler, *keys.SCOPES)

    return [
        web.post("/v1/keys", managing(keys.create)),
        web.get("/v1/keys", managing(keys.list_keys)),
        web.get(KEY, managing(keys.get)),
        web.delete(KEY, managing(keys.delete)),
        web.put(f"{KEY}/authorizations", managing(keys.authorize)),
        web.put(f"{KEY}/status", managing(keys.set_status)),
        web.post("/v1/introspect", managing(keys.introspect)),
        web.post("/v3/keys/get-caller-info", partial(keys.caller_info, front)),
    ]


def _blobs(front: Front) -> list[web.RouteDef]:
    """Only where no storage server is there to serve its own URLs; the URL itself is the credential."""
    if not isinstance(front.broker.blobs, FileBlobs):
        return []
    blobs = BlobRoutes(front, front.broker.blobs)
    return [web.put(BLOBS + "{key:.+}", blobs.put), web.get(BLOBS + "{key:.+}", blobs.get)]
