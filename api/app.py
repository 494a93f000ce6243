"""Every route on one page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from api.auth import Guarded, guarded
from api.front import Front
from api.middleware import answer_errors, observing, sharing
from api.routes import assets, deployments, functions, health, invocations, queues, requests
from api.routes.blobs import BlobRoutes
from broker.backends.files import ROUTE as BLOBS
from broker.backends.files import FileBlobs

NVCF = "/v2/nvcf"
# aiohttp's default leaves out braces, and then a bad ID would be an unknown path.
FUNCTION = "/functions/{function_id:[^/]+}"
VERSION = FUNCTION + "/versions/{version_id:[^/]+}"
REQUEST = "{request_id:[^/]+}"
DEPLOYMENT = "/deployments/{deployment_id:[^/]+}"
ASSET = "/assets/{asset_id:[^/]+}"


def make_app(front: Front) -> web.Application:
    # From the outside in.
    app = web.Application(middlewares=[observing(front), sharing(front), answer_errors])
    app.add_routes([*_open(front), *_invocations(front), *_management(front), *_blobs(front)])
    return app


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
    updates = scoped("update_function")
    deletes, deploys = scoped("delete_function"), scoped("deploy_function")
    invokes, looks = scoped("invoke_function"), scoped("queue_details")
    return [
        web.post(f"{NVCF}/functions", registers(functions.create)),
        web.get(f"{NVCF}/functions", lists(functions.list_functions)),
        web.get(f"{NVCF}/functions/ids", lists(functions.list_ids)),
        web.post(f"{NVCF}{FUNCTION}/versions", registers(functions.add_version)),
        web.get(f"{NVCF}{FUNCTION}/versions", lists(functions.list_versions)),
        web.get(f"{NVCF}{VERSION}", lists(functions.get)),
        web.put(f"{NVCF}{VERSION}", updates(functions.update)),
        web.put(f"{NVCF}/metadata{VERSION}", updates(functions.update_metadata)),
        web.put(f"{NVCF}/ratelimit{VERSION}", updates(functions.set_rate_limit)),
        web.delete(f"{NVCF}/ratelimit{VERSION}", updates(functions.lift_rate_limit)),
        web.delete(f"{NVCF}{VERSION}", deletes(functions.delete_version)),
        web.post(f"{NVCF}/deployments{VERSION}", deploys(deployments.create)),
        web.get(f"{NVCF}/deployments{VERSION}", deploys(deployments.get)),
        web.put(f"{NVCF}/deployments{VERSION}", deploys(deployments.update)),
        web.get(f"{NVCF}{DEPLOYMENT}", deploys(deployments.find)),
        web.patch(f"{NVCF}{DEPLOYMENT}/gpu-specifications/{{specification_id:[^/]+}}", deploys(deployments.patch)),
        web.delete(f"{NVCF}/deployments{VERSION}", deploys(deployments.delete)),
        web.post(f"{NVCF}/assets", invokes(assets.create)),
        web.get(f"{NVCF}/assets", invokes(assets.list_assets)),
        web.get(f"{NVCF}{ASSET}", invokes(assets.get)),
        web.delete(f"{NVCF}{ASSET}", invokes(assets.delete)),
        web.get(f"{NVCF}/queues{FUNCTION}", looks(queues.of_function)),
        web.get(f"{NVCF}/queues{VERSION}", looks(queues.of_version)),
        web.get(f"{NVCF}/queues/{REQUEST}/position", looks(queues.position)),
    ]


def _blobs(front: Front) -> list[web.RouteDef]:
    """Only where no storage server is there to serve its own URLs; the URL itself is the credential."""
    if not isinstance(front.broker.blobs, FileBlobs):
        return []
    blobs = BlobRoutes(front, front.broker.blobs)
    return [web.put(BLOBS + "{key:.+}", blobs.put), web.get(BLOBS + "{key:.+}", blobs.get)]
