"""Every endpoint for its owner, for whom the function is shared with, for a stranger, and for an ID that never was."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker import authorizations, deployments
from broker.accounts import ACCOUNT_SCOPES, SCOPES, create_key
from broker.model import ALL_RESOURCES, EVERYONE, Gpu, GpuSpecification, Principal
from tests.unit.test_server import FUNCTION, NOBODYS, NOW, NVCF, VERSION, House, opened

OWNER = Principal(account="default", subject="owner", scopes=frozenset())
ASSET = "1f0e9a6e-7a34-4a49-93ef-e01a53e4c4dd"
DEFINITION = {"name": "echo", "inferenceUrl": "/", "containerImage": "i"}
SPECIFICATIONS = {"deploymentSpecifications": [{"gpu": "CPU", "minInstances": 0, "maxInstances": 1}]}
RIGHTS = {"authorizations": {"policies": [{"scopes": ["invoke_function"]}]}}
PARTNER = {"authorizedParty": {"ncaId": "partner"}}
RATE_LIMIT = {"rateLimit": "100-S"}
PARTIES = {"authorizedParties": [{"ncaId": "partner"}]}

UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
IDS = {"f": FUNCTION, "v": VERSION, "a": ASSET}
VERSION_AT = "functions/{f}/versions/{v}"


@dataclass(frozen=True, slots=True)
class Case:
    """An endpoint, and what it answers to its owner and to whom the function is shared with."""

    method: str
    path: str
    own: int
    shared: int
    body: Any = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


CASES = [
    Case("GET", f"{NVCF}/functions/{{f}}/versions", 200, 200),
    Case("GET", f"{NVCF}/{VERSION_AT}", 200, 200),
    Case("POST", f"{NVCF}/functions/{{f}}/versions", 200, 404, DEFINITION),
    Case("DELETE", f"{NVCF}/{VERSION_AT}", 204, 404),
    Case("PUT", f"{NVCF}/ratelimit/{VERSION_AT}", 204, 404, RATE_LIMIT),
    Case("DELETE", f"{NVCF}/ratelimit/{VERSION_AT}", 204, 404),
    Case("POST", f"{NVCF}/deployments/{VERSION_AT}", 400, 404, SPECIFICATIONS),
    Case("GET", f"{NVCF}/deployments/{VERSION_AT}", 200, 404),
    Case("DELETE", f"{NVCF}/deployments/{VERSION_AT}", 200, 404),
    Case("GET", f"{NVCF}/queues/functions/{{f}}", 200, 200),
    Case("GET", f"{NVCF}/queues/{VERSION_AT}", 200, 200),
    Case("GET", f"{NVCF}/{VERSION_AT}/activity", 200, 200),
    Case("POST", f"{NVCF}/pexec/functions/{{f}}", 202, 202, {}),
    Case("POST", f"{NVCF}/pexec/{VERSION_AT}", 202, 202, {}),
    Case("POST", f"{NVCF}/tokens/functions/{{f}}", 200, 200, {"clientId": "c"}),
    Case("POST", f"{NVCF}/tokens/{VERSION_AT}", 200, 200, {"clientId": "c"}),
    Case("GET", f"{NVCF}/authorizations/functions/{{f}}", 200, 404),
    Case("GET", f"{NVCF}/authorizations/{VERSION_AT}", 200, 404),
    Case("POST", f"{NVCF}/authorizations/functions/{{f}}", 200, 404, PARTIES),
    Case("POST", f"{NVCF}/authorizations/{VERSION_AT}", 200, 404, PARTIES),
    Case("DELETE", f"{NVCF}/authorizations/functions/{{f}}", 200, 404),
    Case("DELETE", f"{NVCF}/authorizations/{VERSION_AT}", 200, 404),
    Case("PATCH", f"{NVCF}/authorizations/functions/{{f}}/add", 409, 404, PARTNER),
    Case("PATCH", f"{NVCF}/authorizations/{VERSION_AT}/add", 404, 404, PARTNER),
    Case("PATCH", f"{NVCF}/authorizations/functions/{{f}}/remove", 200, 404, PARTNER),
    Case("PATCH", f"{NVCF}/authorizations/{VERSION_AT}/remove", 404, 404, PARTNER),
    Case("GET", f"{NVCF}/pexec/status/{{r}}", 202, 404),
    Case("GET", f"{NVCF}/requests/{{r}}", 200, 404),
    Case("DELETE", f"{NVCF}/requests/{{r}}", 202, 404),
    Case("GET", f"{NVCF}/queues/{{r}}/position", 200, 404),
    Case("GET", f"{NVCF}/assets/{{a}}", 200, 404),
    Case("DELETE", f"{NVCF}/assets/{{a}}", 204, 404),
    Case("GET", "/v1/keys/{k}", 200, 404),
    Case("PUT", "/v1/keys/{k}/authorizations", 200, 404, RIGHTS),
    Case("PUT", "/v1/keys/{k}/status", 200, 404, {"status": "SUSPENDED"}),
    Case("DELETE", "/v1/keys/{k}", 204, 404),
]
# Where the path names the account itself, there is nothing to hide but what is in it.
NAMED_ACCOUNT = [
    ("GET", f"{NVCF}/accounts/{{account}}", None),
    ("PATCH", f"{NVCF}/accounts/{{account}}", {"maxFunctionsAllowed": 1}),
    ("DELETE", f"{NVCF}/accounts/{{account}}", None),
    ("POST", f"{NVCF}/accounts/{{account}}", {"name": "some-account"}),
    ("GET", f"{NVCF}/accounts/{{account}}/functions", None),
    ("GET", f"{NVCF}/accounts/{{account}}/requests", None),
    ("GET", f"{NVCF}/accounts/{{account}}/requests/{{r}}", None),
    ("GET", f"{NVCF}/accounts/{{account}}/usage/gpus", None),
    ("GET", f"/v2/orgs/{{account}}/nvcf/{VERSION_AT}", None),
    ("POST", "/v2/orgs/{account}/teams/t/nvcf/pexec/functions/{f}", {}),
]


@dataclass(slots=True, kw_only=True)
class Tenants:
    house: House
    own: aiohttp.ClientSession
    shared: aiohttp.ClientSession
    foreign: aiohttp.ClientSession
    ids: Mapping[str, str]


@asynccontextmanager
async def session(
    house: House, account: str, *scopes: str, resources: tuple[str, ...] = ALL_RESOURCES
) -> AsyncIterator[aiohttp.ClientSession]:
    token, _ = await create_key(house.broker, account=account, scopes=scopes or ACCOUNT_SCOPES, resources=resources)
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"} | NOW) as client:
        yield client


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    scopes = (*ACCOUNT_SCOPES, "manage_keys", "account_setup")
    async with (
        opened(tmp_path) as house,
        session(house, "default", *scopes) as own,
        session(house, "partner", *scopes) as shared,
        session(house, "stranger", *scopes) as foreign,
    ):
        broker = house.broker
        _, key = await create_key(broker, account="default", scopes=["invoke_function"])
        await broker.catalog.offer([Gpu(name="CPU", instance_type="CPU", backend="b", capacity=1)], ttl_s=60)
        wanted = GpuSpecification(id="", gpu="CPU", instance_type="", min_instances=0, max_instances=1)
        await deployments.deploy(broker, OWNER, FUNCTION, VERSION, [wanted])
        await broker.blobs.put(f"assets/default/{ASSET}", b"x", content_type="text/plain")
        await authorizations.replace_all(broker, OWNER, FUNCTION, "", ["partner"])
        ids = {**IDS, "r": await house.submit(), "k": key.id}
        yield Tenants(house=house, own=own, shared=shared, foreign=foreign, ids=ids)


async def ask(
    client: aiohttp.ClientSession, method: str, path: str, body: Any = None
) -> tuple[int, dict[str, str], bytes]:
    async with client.request(method, path, json=body) as response:
        told = {name: value for name, value in response.headers.items() if name != "Date"}
        return response.status, told, await response.read()


async def look(client: aiohttp.ClientSession, path: str) -> Any:
    status, _, body = await ask(client, "GET", path)
    assert status == 200, body
    return json.loads(body)


# -- the matrix --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_foreign_and_random_are_told_apart_nowhere_and_own_and_shared_get_theirs(
    tenants: Tenants, case: Case
) -> None:
    path = case.path.format(**tenants.ids)
    random = case.path.format(**dict.fromkeys(tenants.ids, NOBODYS))
    foreign = await ask(tenants.foreign, case.method, path, case.body)
    nobodys = await ask(tenants.foreign, case.method, random, case.body)
    assert foreign[0] == 404
    assert _without_ids(foreign, path) == _without_ids(nobodys, random)
    assert (await ask(tenants.shared, case.method, path, case.body))[0] == case.shared
    if case.shared == 404:
        hidden = await ask(tenants.shared, case.method, path, case.body)
        assert _without_ids(hidden, path) == _without_ids(nobodys, random)
    assert (await ask(tenants.own, case.method, path, case.body))[0] == case.own


def _without_ids(answer: tuple[int, dict[str, str], bytes], path: str) -> tuple[int, bytes]:
    """Management problems repeat the path, or an ID of it, that they were asked with; all else must be equal."""
    status, _, body = answer
    asked = set(UUID.findall(path.encode()))
    return status, UUID.sub(lambda found: b"ID" if found[0] in asked else found[0], body)


@pytest.mark.parametrize(("method", "path", "body"), NAMED_ACCOUNT)
@pytest.mark.parametrize("account", ["default", "nobodys"])
async def test_a_path_that_names_another_account_is_403(
    tenants: Tenants, method: str, path: str, body: Any, account: str
) -> None:
    for client in (tenants.shared, tenants.foreign):
        assert (await ask(client, method, path.format(account=account, **tenants.ids), body))[0] == 403


async def test_lists_hold_what_each_may_see(tenants: Tenants) -> None:
    for client, seen in ((tenants.own, [VERSION]), (tenants.shared, [VERSION]), (tenants.foreign, [])):
        listed = (await look(client, f"{NVCF}/functions"))["functions"]
        assert [entry["versionId"] for entry in listed] == seen
        assert (await look(client, f"{NVCF}/functions/ids"))["functionIds"] == ([FUNCTION] if seen else [])
    assert (await look(tenants.shared, f"{NVCF}/assets"))["assets"] == []
    assert all(key["nca_id"] == "partner" for key in (await look(tenants.shared, "/v1/keys"))["keys"])


@pytest.mark.parametrize(
    ("who", "private", "authorized", "public"), [("own", 1, 0, 0), ("shared", 0, 1, 0), ("foreign", 0, 0, 0)]
)
async def test_visibility_tells_why_a_function_is_seen(
    tenants: Tenants, who: str, private: int, authorized: int, public: int
) -> None:
    client: aiohttp.ClientSession = getattr(tenants, who)
    for word, count in (("private", private), ("Authorized", authorized), ("public", public)):
        assert len((await look(client, f"{NVCF}/functions?visibility={word}"))["functions"]) == count


# -- sharing -----------------------------------------------------------------------------------


async def test_who_it_is_shared_with_does_not_see_how_it_is_made(tenants: Tenants) -> None:
    await ask(tenants.own, "PUT", f"{NVCF}/ratelimit/{VERSION_AT.format(**IDS)}", RATE_LIMIT)
    mine = (await look(tenants.own, f"{NVCF}/{VERSION_AT.format(**IDS)}"))["function"]
    theirs = (await look(tenants.shared, f"{NVCF}/{VERSION_AT.format(**IDS)}"))["function"]
    assert mine["ownedByDifferentAccount"] is False
    assert theirs["ownedByDifferentAccount"] is True
    hidden = {"inferenceUrl", "inferencePort", "containerImage", "activeInstances", "rateLimit"}
    assert hidden <= mine.keys()
    assert not hidden & theirs.keys()
    assert (theirs["name"], theirs["status"], theirs["ncaId"]) == ("f", "ACTIVE", "default")


async def test_a_shared_functions_requests_are_their_callers_own(tenants: Tenants) -> None:
    _, told, _ = await ask(tenants.shared, "POST", f"{NVCF}/pexec/functions/{FUNCTION}", {})
    position = f"{NVCF}/queues/{told['NVCF-REQID']}/position"
    assert (await look(tenants.shared, position))["positionInQueue"] == 2
    assert (await ask(tenants.own, "GET", position))[0] == 404


async def test_an_end_of_sharing_is_felt_at_once_here_and_within_a_second_elsewhere(tenants: Tenants) -> None:
    invoke = f"{NVCF}/pexec/functions/{FUNCTION}"
    assert (await ask(tenants.shared, "POST", invoke, {}))[0] == 202
    await ask(tenants.own, "DELETE", f"{NVCF}/authorizations/functions/{FUNCTION}")
    assert (await ask(tenants.shared, "POST", invoke, {}))[0] == 404
    assert (await ask(tenants.shared, "GET", f"{NVCF}/queues/functions/{FUNCTION}"))[0] == 404


async def test_a_version_alone_can_be_shared_and_later_ones_are_not(tenants: Tenants) -> None:
    await ask(tenants.own, "DELETE", f"{NVCF}/authorizations/functions/{FUNCTION}")
    await ask(tenants.own, "POST", f"{NVCF}/authorizations/{VERSION_AT.format(**IDS)}", PARTIES)
    assert (await ask(tenants.own, "POST", f"{NVCF}/functions/{FUNCTION}/versions", DEFINITION))[0] == 200
    listed = (await look(tenants.shared, f"{NVCF}/functions/{FUNCTION}/versions"))["functions"]
    assert [entry["versionId"] for entry in listed] == [VERSION]
    both = (await look(tenants.own, f"{NVCF}/authorizations/functions/{FUNCTION}"))["functions"]
    assert [len(entry["authorizedParties"]) for entry in both] == [1, 0]


async def test_a_new_version_is_shared_as_its_function_is(tenants: Tenants) -> None:
    await ask(tenants.own, "POST", f"{NVCF}/functions/{FUNCTION}/versions", DEFINITION)
    assert len((await look(tenants.shared, f"{NVCF}/functions/{FUNCTION}/versions"))["functions"]) == 2


async def test_levels_add_up(tenants: Tenants) -> None:
    at = f"{NVCF}/authorizations/{VERSION_AT.format(**IDS)}"
    await ask(tenants.own, "POST", at, {"authorizedParties": [{"ncaId": "stranger"}]})
    function = (await look(tenants.own, at))["function"]
    assert (function["id"], function["versionId"], function["ncaId"]) == (FUNCTION, VERSION, "default")
    assert function["authorizedParties"] == [{"ncaId": "partner"}, {"ncaId": "stranger"}]
    _, _, body = await ask(tenants.own, "DELETE", at)
    assert json.loads(body)["function"]["authorizedParties"] == []
    assert (await look(tenants.own, at))["function"]["authorizedParties"] == [{"ncaId": "partner"}]


@pytest.mark.parametrize(
    "parties",
    [
        [],
        [{"ncaId": "partner"}, {"ncaId": "partner"}],
        [{"ncaId": "default"}],
        [{"ncaId": "who-is-that"}],
        [{"ncaId": EVERYONE}],
        [{"ncaId": "partner", "clientId": "c"}],
        [{}],
    ],
)
async def test_bad_parties_are_400_and_change_nothing(tenants: Tenants, parties: list[Any]) -> None:
    at = f"{NVCF}/authorizations/functions/{FUNCTION}"
    assert (await ask(tenants.own, "POST", at, {"authorizedParties": parties}))[0] == 400
    assert (await look(tenants.shared, f"{NVCF}/functions/ids"))["functionIds"] == [FUNCTION]


async def test_parties_are_added_and_removed_one_by_one(tenants: Tenants) -> None:
    at = f"{NVCF}/authorizations/functions/{FUNCTION}"
    stranger = {"authorizedParty": {"ncaId": "stranger"}}
    _, _, added = await ask(tenants.own, "PATCH", f"{at}/add", stranger)
    assert json.loads(added)["function"]["authorizedParties"] == [{"ncaId": "partner"}, {"ncaId": "stranger"}]
    assert (await look(tenants.foreign, f"{NVCF}/functions/ids"))["functionIds"] == [FUNCTION]
    assert (await ask(tenants.own, "PATCH", f"{at}/remove", stranger))[0] == 200
    assert (await ask(tenants.own, "PATCH", f"{at}/remove", stranger))[0] == 404
    assert (await look(tenants.foreign, f"{NVCF}/functions/ids"))["functionIds"] == []
    for verb in ("add", "remove"):
        assert (await ask(tenants.own, "PATCH", f"{at}/{verb}", {"authorizedParty": {"ncaId": EVERYONE}}))[0] == 400


async def test_a_public_function_is_everybodys_to_call_and_a_super_admins_to_change(tenants: Tenants) -> None:
    at = f"{NVCF}/authorizations/functions/{FUNCTION}"
    everyone = {"authorizedParties": [{"ncaId": EVERYONE}]}
    mirrored = f"{NVCF}/accounts/default/authorizations/functions/{FUNCTION}"
    async with session(tenants.house, "operators", "admin:authorize_clients") as operator:
        assert (await ask(operator, "POST", mirrored, everyone))[0] == 200
    assert (await ask(tenants.foreign, "POST", f"{NVCF}/pexec/functions/{FUNCTION}", {}))[0] == 202
    for client in (tenants.own, tenants.foreign):
        [function] = (await look(client, f"{NVCF}/functions?visibility=public"))["functions"]
        assert function["ownedByDifferentAccount"] is (client is tenants.foreign)
        assert len((await look(client, f"{NVCF}/functions"))["functions"]) == 1
        assert (await ask(client, "GET", f"{NVCF}/queues/functions/{FUNCTION}"))[0] == 400
    for method, path, body in (
        ("POST", f"{NVCF}/functions/{FUNCTION}/versions", DEFINITION),
        ("POST", f"{NVCF}/deployments/{VERSION_AT.format(**IDS)}", SPECIFICATIONS),
        ("DELETE", f"{NVCF}/deployments/{VERSION_AT.format(**IDS)}", None),
        ("DELETE", f"{NVCF}/{VERSION_AT.format(**IDS)}", None),
        ("POST", at, PARTIES),
        ("DELETE", at, None),
    ):
        assert (await ask(tenants.own, method, path, body))[0] == 400, (method, path)
        assert (await ask(tenants.foreign, method, path, body))[0] == 404, (method, path)


async def test_sharing_goes_with_what_was_shared(tenants: Tenants) -> None:
    await ask(tenants.own, "DELETE", f"{NVCF}/{VERSION_AT.format(**IDS)}")
    assert await tenants.house.broker.catalog.sharing.get(FUNCTION) is None


# -- a key's resources -------------------------------------------------------------------------

WHOLE, ONE, OTHER = f"function/{FUNCTION}/*", f"function/{FUNCTION}/{VERSION}", f"function/{NOBODYS}/*"


@pytest.mark.parametrize(
    ("account", "resources", "covered"),
    [
        ("default", ("account-functions/*",), True),
        ("default", (WHOLE,), True),
        ("default", (ONE,), True),
        ("default", ("authorized-functions/*", OTHER), False),
        ("default", (), False),
        ("partner", ("authorized-functions/*",), True),
        ("partner", (ONE,), True),
        ("partner", ("account-functions/*", OTHER), False),
        ("partner", (), False),
    ],
)
async def test_a_key_is_good_for_its_resources_only(
    tenants: Tenants, account: str, resources: tuple[str, ...], covered: bool
) -> None:
    async with session(tenants.house, account, resources=resources) as client:
        for method, path, body in (
            ("GET", f"{NVCF}/functions/{FUNCTION}/versions", None),
            ("GET", f"{NVCF}/{VERSION_AT.format(**IDS)}", None),
            ("GET", f"{NVCF}/queues/functions/{FUNCTION}", None),
            ("GET", f"{NVCF}/queues/{VERSION_AT.format(**IDS)}", None),
            ("POST", f"{NVCF}/pexec/functions/{FUNCTION}", {}),
            ("POST", f"{NVCF}/pexec/{VERSION_AT.format(**IDS)}", {}),
        ):
            assert (await ask(client, method, path, body))[0] == (403 if not covered else 202 if body == {} else 200)
        assert (await look(client, f"{NVCF}/functions/ids"))["functionIds"] == ([FUNCTION] if covered else [])
        assert (await ask(client, "GET", f"{NVCF}/functions/{NOBODYS}/versions"))[0] == 404


@pytest.mark.parametrize(
    ("resources", "covered"), [((OTHER,), False), ((ONE,), True), (("account-functions/*",), True)]
)
async def test_a_key_reads_and_cancels_requests_of_its_resources_only(
    tenants: Tenants, resources: tuple[str, ...], covered: bool
) -> None:
    async with session(tenants.house, "default", resources=resources) as client:
        for method, path, found in (
            ("GET", f"{NVCF}/queues/{{r}}/position", 200),
            ("GET", f"{NVCF}/pexec/status/{{r}}", 202),
            ("DELETE", f"{NVCF}/requests/{{r}}", 202),
        ):
            assert (await ask(client, method, path.format(**tenants.ids)))[0] == (found if covered else 403)


@pytest.mark.parametrize(
    ("resources", "function", "version"),
    [
        (("account-functions/*",), 200, 200),
        ((WHOLE,), 403, 200),
        ((ONE,), 403, 403),
        (("authorized-functions/*",), 403, 403),
    ],
)
async def test_what_is_new_needs_resources_that_will_hold_it(
    tenants: Tenants, resources: tuple[str, ...], function: int, version: int
) -> None:
    async with session(tenants.house, "default", resources=resources) as client:
        assert (await ask(client, "POST", f"{NVCF}/functions", DEFINITION))[0] == function
        assert (await ask(client, "POST", f"{NVCF}/functions/{FUNCTION}/versions", DEFINITION))[0] == version


async def test_only_a_key_for_the_whole_function_shares_it(tenants: Tenants) -> None:
    for resource, whole in ((ONE, 403), (WHOLE, 200)):
        async with session(tenants.house, "default", resources=(resource,)) as client:
            assert (await ask(client, "POST", f"{NVCF}/authorizations/functions/{FUNCTION}", PARTIES))[0] == whole
            assert (await ask(client, "POST", f"{NVCF}/authorizations/{VERSION_AT.format(**IDS)}", PARTIES))[0] == 200


# -- other prefixes ----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/v2/orgs/default/nvcf", "/v2/orgs/default/teams/red/nvcf"])
async def test_the_gateways_paths_are_the_same_api(tenants: Tenants, prefix: str) -> None:
    assert (await look(tenants.own, f"{prefix}/functions/ids"))["functionIds"] == [FUNCTION]
    assert (await look(tenants.own, f"{prefix}/{VERSION_AT.format(**IDS)}"))["function"]["id"] == FUNCTION
    status, told, _ = await ask(tenants.own, "POST", f"{prefix}/pexec/functions/{FUNCTION}", {})
    assert status == 202
    assert (await ask(tenants.own, "GET", f"{prefix}/pexec/status/{told['NVCF-REQID']}"))[0] == 202
    _, _, hidden = await ask(tenants.own, "GET", f"{prefix}/pexec/status/{NOBODYS}")
    assert "instance" not in json.loads(hidden)
    assert (await ask(tenants.own, "PUT", f"{prefix}/functions/ids"))[0] == 405


async def test_a_super_admin_acts_for_any_account(tenants: Tenants) -> None:
    at = f"{NVCF}/accounts/default"
    async with session(tenants.house, "operators", *(s for s in SCOPES if s.startswith("admin:"))) as operator:
        assert (await look(operator, f"{at}/functions/ids"))["functionIds"] == [FUNCTION]
        shown = (await look(operator, f"{at}/{VERSION_AT.format(**IDS)}"))["function"]
        assert (shown["ownedByDifferentAccount"], "inferenceUrl" in shown) == (False, True)
        assert (await look(operator, f"{at}/assets"))["assets"][0]["assetId"] == ASSET
        assert (await look(operator, f"{at}/queues/functions/{FUNCTION}"))["functionId"] == FUNCTION
        _, _, made = await ask(operator, "POST", f"{at}/functions", DEFINITION)
        assert json.loads(made)["function"]["ncaId"] == "default"
        assert [used["currentMaxUsage"] for used in (await look(operator, f"{at}/usage/gpus"))["gpus"]] == [1]
        assert (await look(operator, f"{at}/clusterGroups"))["clusterGroups"][0]["name"] == "b"
        assert (await ask(operator, "PUT", f"{at}/ratelimit/{VERSION_AT.format(**IDS)}", RATE_LIMIT))[0] == 204
        assert (await ask(operator, "DELETE", f"{at}/deployments/{VERSION_AT.format(**IDS)}"))[0] == 200
        assert (await ask(operator, "GET", f"{NVCF}/functions"))[0] == 403
        assert (await ask(operator, "GET", f"{NVCF}/accounts/a%20b/functions"))[0] == 400


async def test_an_accounts_own_scopes_do_not_open_the_mirror(tenants: Tenants) -> None:
    assert (await ask(tenants.own, "GET", f"{NVCF}/accounts/default/functions"))[0] == 403
