"""Functions, versions and deployments on both families (contract/management.md §1, §2)."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.e2e import dev
from tests.e2e.conftest import (
    MIRROR,
    MISFITS,
    NVCF,
    UNKNOWN_ID,
    Mirror,
    Site,
    invoke_path,
    ordered,
    production_only,
    slug,
)
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, Reply

FUNCTIONS = f"{NVCF}/functions"
SPECIFICATION = {"gpu": "CPU", "instanceType": "CPU", "minInstances": 1, "maxInstances": 1}
DEFINITION = {
    "name": "mine",
    "inferenceUrl": "/echo",
    "containerImage": "fnqueue/echo:latest",
    "healthUri": "/health",
}
HEALTH = {"protocol": "gRPC", "uri": "/up", "port": 9000, "timeout": "PT5S", "expectedStatusCode": 204}


async def create(caller: Caller, **changed: Any) -> Function:
    reply = await caller.call("POST", FUNCTIONS, data={**DEFINITION, **changed})
    assert reply.status == 200, reply
    return Function(caller, reply.json["function"]["id"], reply.json["function"]["versionId"])


async def add_version(function: Function, **changed: Any) -> Function:
    reply = await function.caller.call("POST", f"{FUNCTIONS}/{function.id}/versions", data={**DEFINITION, **changed})
    assert (reply.status, reply.json["function"]["id"]) == (200, function.id)
    return Function(function.caller, function.id, reply.json["function"]["versionId"])


def path_of(function: Function) -> str:
    return f"{FUNCTIONS}/{function.id}/versions/{function.version_id}"


async def deploy(function: Function, **changed: Any) -> Reply:
    data = {"deploymentSpecifications": [{**SPECIFICATION, **changed}]}
    # Until the controller has made its first offer, there is nothing to place it on.
    return await eventually(
        lambda: function.caller.call("POST", function.deployment_path, data=data), lambda reply: reply.status != 503
    )


async def becomes(function: Function, status: str) -> None:
    await eventually(function.state, lambda seen: seen == status, within_s=30)


async def invoke(function: Function) -> Reply:
    return await function.caller.invoke(function.id, {"message": "hi", "repeats": 1, "delay": 0})


# -- one function's life -----------------------------------------------------------------------


async def test_a_version_is_deployed_invoked_undeployed_deployed_again_and_deleted(caller: Caller) -> None:
    function = await create(caller)
    assert await function.state() == "INACTIVE"
    assert (await invoke(function)).status == 404
    for _ in range(2):
        assert (await caller.call("GET", function.deployment_path)).status == 404
        begun = await deploy(function)
        assert (begun.status, begun.json["deployment"]["functionStatus"]) == (200, "DEPLOYING")
        assert (await caller.call("GET", function.deployment_path)).json["deployment"] | {"functionStatus": ""} == (
            begun.json["deployment"] | {"functionStatus": ""}
        )
        await becomes(function, "ACTIVE")
        assert (await invoke(function)).json == {"echo": "hi"}
        again = await deploy(function)
        assert (again.status, slug(again)) == (400, "bad-request")
        ended = await caller.call("DELETE", function.deployment_path)
        assert (ended.status, ended.json["function"]["status"]) == (200, "INACTIVE")
        assert (await invoke(function)).status == 404
        assert await function.state() == "INACTIVE"
        assert (await caller.call("DELETE", function.deployment_path)).status == 404
    deleted = await caller.call("DELETE", path_of(function))
    assert (deleted.status, deleted.body) == (204, b"")
    for method, path in (("GET", path_of(function)), ("DELETE", path_of(function)), ("GET", function.deployment_path)):
        assert (await caller.call(method, path)).status == 404
    assert (await invoke(function)).status == 404


async def test_a_version_can_be_deleted_while_it_serves(caller: Caller) -> None:
    function = await caller.deploy("fnqueue/echo:latest", inference_url="/echo")
    queued = await caller.submit(function.id, {"message": "hi", "repeats": 1, "delay": 30})
    assert (await caller.call("DELETE", path_of(function))).status == 204
    assert (await invoke(function)).status == 404
    ended = await caller.result(queued, within_s=30)
    assert ended.status != 200
    assert ended.headers["NVCF-STATUS"] in ("rejected", "errored")


async def test_what_waits_is_cancelled_by_undeploying_and_finished_when_graceful(site: Site, caller: Caller) -> None:
    for graceful, expected in (("", 410), ("?graceful=true", 200)):
        function = await caller.deploy(RECORDER)
        ids = [await caller.submit(function.id, {"delay_s": 0.3}) for _ in range(3)]
        gone = await caller.call("DELETE", function.deployment_path + graceful)
        assert (gone.status, gone.json["function"]["status"]) == (200, "INACTIVE")
        assert (await invoke(function)).status == 404
        last = await caller.result(ids[-1])
        assert last.status == expected
        if graceful:
            done = site.record.counts("done")
            assert [done[request_id] for request_id in ids] == [1, 1, 1]


async def test_a_version_without_a_minimum_is_active_at_once(caller: Caller) -> None:
    function = await create(caller)
    begun = await deploy(function, minInstances=0)
    assert (begun.status, begun.json["deployment"]["functionStatus"]) == (200, "ACTIVE")
    assert await function.state() == "ACTIVE"
    await function.undeploy()


async def test_an_image_that_is_not_known_ends_in_error_and_says_why(caller: Caller) -> None:
    function = await create(caller, containerImage="nobody/knows:this")
    assert (await deploy(function)).status == 200
    await becomes(function, "ERROR")
    deployment = (await caller.call("GET", function.deployment_path)).json["deployment"]
    assert deployment["functionStatus"] == "ERROR"
    [info] = deployment["healthInfo"]
    assert (info["gpu"], info["instanceType"]) == ("CPU", "CPU")
    assert "nobody/knows:this" in info["error"]
    assert (await invoke(function)).status == 404
    again = await deploy(function)
    assert again.status == 400
    assert "undeploy it first" in again.json["detail"]
    await function.undeploy()
    assert await function.state() == "INACTIVE"


async def test_a_container_that_dies_at_once_ends_in_error_with_its_last_words(caller: Caller) -> None:
    function = await create(caller, containerImage=MIRROR, containerArgs="--x", containerEnvironment=[
        {"key": "PYTHONPATH", "value": ""}, {"key": "PYTHONHOME", "value": "/nowhere"},
    ])  # fmt: skip
    assert (await deploy(function)).status == 200
    await becomes(function, "ERROR")
    [info] = (await caller.call("GET", function.deployment_path)).json["deployment"]["healthInfo"]
    assert "encodings" in info["error"]
    await function.undeploy()


# -- several versions --------------------------------------------------------------------------


async def test_a_function_is_invoked_at_one_of_its_versions_at_random_or_at_the_one_named(caller: Caller) -> None:
    first = await caller.deploy(MIRROR, concurrency=4)
    second = await add_version(first, containerImage=MIRROR)
    assert {await served_by(first) for _ in range(5)} == {first.version_id}  # the other is not deployed
    await second.deploy(instances=1, concurrency=4)
    seen = Counter([await served_by(first) for _ in range(60)])
    assert set(seen) == {first.version_id, second.version_id}
    assert min(seen.values()) >= 10  # fewer happens once in thirty million runs
    for version in (first, second):
        assert await served_by(version, f"/versions/{version.version_id}") == version.version_id
    queues = (await caller.depth(first.id)).json["queues"]
    assert {queue["functionVersionId"] for queue in queues} == {first.version_id, second.version_id}
    await second.undeploy()
    assert {await served_by(first) for _ in range(5)} == {first.version_id}
    await first.undeploy()


async def served_by(function: Function, version: str = "") -> str:
    reply = await function.caller.call(
        "POST", invoke_path(function) + version, body=b"{}", headers=ordered({"tell": True})
    )
    assert reply.status == 200
    return str(dict(reply.json["headers"])["NVCF-FUNCTION-VERSION-ID"])


async def test_the_last_version_takes_the_function_along(caller: Caller) -> None:
    first = await create(caller)
    second = await add_version(first, name="renamed")
    listed = await caller.call("GET", f"{FUNCTIONS}/{first.id}/versions")
    assert [version["versionId"] for version in listed.json["functions"]] == [first.version_id, second.version_id]
    assert (await caller.call("DELETE", path_of(first))).status == 204
    assert (await caller.call("GET", f"{FUNCTIONS}/{first.id}/versions")).status == 200
    assert (await caller.call("DELETE", path_of(second))).status == 204
    assert (await caller.call("GET", f"{FUNCTIONS}/{first.id}/versions")).status == 404
    assert (await caller.call("POST", f"{FUNCTIONS}/{first.id}/versions", data=DEFINITION)).status == 404


# -- what is stored and shown ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (
            DEFINITION,
            {
                **DEFINITION,
                "description": "mine",
                "inferencePort": 8000,
                "apiBodyFormat": "CUSTOM",
                "functionType": "DEFAULT",
                "health": {
                    "protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200,
                },
            },
        ),
        (
            {
                "name": "a" * 128,
                "inferenceUrl": "http://elsewhere.example/path",
                "inferencePort": 9000,
                "containerImage": "registry.example/team/image@sha256:" + "ab" * 32,
                "containerArgs": "--a 'b c'",
                "containerEnvironment": [{"key": "K", "value": "ü\n"}],
                "health": HEALTH | {"protocol": "grpc"},
                "apiBodyFormat": "predict_v2",
                "functionType": "streaming",
                "tags": ["a:b=c", "z"],
                "description": "d",
                "unknownField": {"ignored": True},
                "models": None,
            },
            {
                "name": "a" * 128,
                "inferenceUrl": "http://elsewhere.example/path",
                "inferencePort": 9000,
                "containerImage": "registry.example/team/image@sha256:" + "ab" * 32,
                "containerArgs": "--a 'b c'",
                "containerEnvironment": [{"key": "K", "value": "ü\n"}],
                "health": HEALTH,
                "healthUri": "/up",
                "apiBodyFormat": "PREDICT_V2",
                "functionType": "STREAMING",
                "tags": ["a:b=c", "z"],
                "description": "d",
            },
        ),
    ],
)  # fmt: skip
async def test_a_definition_is_shown_as_it_was_given_with_its_defaults(
    caller: Caller, asked: Mapping[str, Any], shown: Mapping[str, Any]
) -> None:
    made = await caller.call("POST", FUNCTIONS, data=asked)
    told = made.json["function"]
    function = Function(caller, told["id"], told["versionId"])
    assert abs(datetime.now(UTC) - datetime.fromisoformat(told["createdAt"])) < timedelta(minutes=5)
    assert told == {
        **shown,
        "id": function.id,
        "versionId": function.version_id,
        "ncaId": "default",
        "status": "INACTIVE",
        "createdAt": told["createdAt"],
        "ownedByDifferentAccount": False,
    }
    got = await caller.call("GET", path_of(function))
    assert got.json["function"] == told | {"activeInstances": []}
    await caller.call("DELETE", path_of(function))


async def test_functions_are_listed_by_visibility_in_every_spelling(caller: Caller) -> None:
    function = await create(caller)
    for query, mine in (
        ("", True),
        ("?visibility=", True),
        ("?visibility=private", True),
        ("?visibility=PRIVATE,public", True),
        ("?visibility=public&visibility=private", True),
        ("?visibility=public", False),
        ("?visibility=authorized", False),
    ):
        listed = await caller.call("GET", FUNCTIONS + query)
        ids = await caller.call("GET", f"{FUNCTIONS}/ids{query}")
        assert (listed.status, ids.status) == (200, 200)
        assert (function.version_id in [each["versionId"] for each in listed.json["functions"]]) is mine
        assert (function.id in ids.json["functionIds"]) is mine
    unknown = await caller.call("GET", f"{FUNCTIONS}?visibility=private,secret")
    assert (unknown.status, "visibility" in unknown.json["detail"]) == (400, True)
    await caller.call("DELETE", path_of(function))


async def test_an_instance_that_runs_is_shown_with_its_version(mirror: Mirror) -> None:
    reply = await mirror.caller.call("GET", path_of(mirror.function))
    [instance] = reply.json["function"]["activeInstances"]
    assert (instance["instanceStatus"], instance["gpu"], instance["backend"]) == ("RUNNING", "CPU", "local")
    assert instance["functionVersionId"] == mirror.function.version_id


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"name": None}, ["name"]),
        ({"name": None, "inferenceUrl": None}, ["name", "inferenceUrl"]),
        ({"name": "has blanks"}, ["name"]),
        ({"name": "-first"}, ["name"]),
        ({"name": "a" * 129}, ["name"]),
        ({"name": 7}, ["name"]),
        ({"inferenceUrl": "//host/path"}, ["inferenceUrl"]),
        ({"inferenceUrl": "/a b"}, ["inferenceUrl"]),
        ({"inferencePort": 70_000}, ["inferencePort"]),
        ({"inferencePort": "many"}, ["inferencePort"]),
        ({"containerImage": None}, ["containerImage"]),
        ({"containerImage": None, "models": [{"name": "m"}]}, ["models"]),
        ({"helmChart": "https://charts.example/x.tgz"}, ["helmChart"]),
        ({"health": {"protocol": "HTTP", "uri": "/up", "port": 1}}, ["health.timeout", "health.expectedStatusCode"]),
        ({"health": HEALTH | {"timeout": "soon"}}, ["health.timeout"]),
        ({"health": HEALTH | {"protocol": "SMTP"}}, ["health.protocol"]),
        ({"healthUri": ""}, ["healthUri"]),
        ({"containerEnvironment": [{"key": "K"}]}, ["containerEnvironment.0.value"]),
        ({"containerEnvironment": {"K": "V"}}, ["containerEnvironment"]),
        ({"tags": ["no blanks"]}, ["tags"]),
        ({"tags": [str(n) for n in range(65)]}, ["tags"]),
        ({"description": "d" * 257}, ["description"]),
        ({"functionType": "LLM"}, ["models"]),
        ({"functionType": "other"}, ["functionType"]),
        ({"apiBodyFormat": 1}, ["apiBodyFormat"]),
    ],
)  # fmt: skip
async def test_a_bad_definition_is_400_that_names_each_field(
    caller: Caller, mirror: Mirror, changed: Mapping[str, Any], named: list[str]
) -> None:
    for path in (FUNCTIONS, f"{FUNCTIONS}/{mirror.function.id}/versions"):
        reply = await caller.call("POST", path, data={**DEFINITION, **changed})
        assert (reply.status, slug(reply) in MISFITS) == (400, True)
        assert all(field in reply.json["detail"] for field in named), reply.json
        assert reply.json["instance"] == path


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gpu": None}, ["gpu"]),
        ({"gpu": ""}, ["gpu"]),
        ({"gpu": "H9000"}, ["gpu", "on offer: CPU"]),
        ({"instanceType": "huge"}, ["instanceType"]),
        ({"backend": "elsewhere"}, ["backend"]),
        ({"backend": "local", "clusters": ["c"]}, ["clusters"]),
        ({"clusters": ["c"]}, ["clusters", "on offer: local"]),
        ({"regions": ["us-east-1"]}, ["regions", "on offer: here"]),
        ({"regions": ["here"], "attributes": ["HIPAA"]}, ["attributes", "on offer: none"]),
        ({"minInstances": None}, ["minInstances"]),
        ({"minInstances": -1}, ["minInstances"]),
        ({"minInstances": 2}, ["maxInstances"]),
        ({"minInstances": 0, "maxInstances": 0}, ["maxInstances"]),
        ({"maxInstances": "many"}, ["maxInstances"]),
        ({"maxRequestConcurrency": 0}, ["maxRequestConcurrency"]),
        ({"maxRequestConcurrency": 16_385}, ["maxRequestConcurrency"]),
        ({"configuration": {"replicas": 1}}, ["configuration"]),
    ],
)
async def test_a_bad_deployment_is_400_that_names_each_field_and_changes_nothing(
    caller: Caller, changed: Mapping[str, Any], named: list[str]
) -> None:
    function = await create(caller)
    reply = await deploy(function, **changed)
    assert (reply.status, slug(reply) in MISFITS) == (400, True)
    assert all(field in reply.json["detail"] for field in named), reply.json
    assert (await caller.call("GET", function.deployment_path)).status == 404
    assert await function.state() == "INACTIVE"
    await caller.call("DELETE", path_of(function))


@pytest.mark.parametrize("body", [{}, {"deploymentSpecifications": []}, {"deploymentSpecifications": None}, [], None])
async def test_a_deployment_needs_a_specification(mirror: Mirror, body: Any) -> None:
    reply = await mirror.caller.call("POST", mirror.function.deployment_path, body=json.dumps(body).encode())
    assert (reply.status, slug(reply) in MISFITS) == (400, True)


async def test_names_of_what_is_on_offer_are_in_any_case_and_the_type_has_a_default(caller: Caller) -> None:
    function = await create(caller)
    reply = await deploy(function, gpu="cpu", instanceType=None, backend="LOCAL", minInstances=0)
    [specification] = reply.json["deployment"]["deploymentSpecifications"]
    assert str(uuid.UUID(specification.pop("gpuSpecificationId")))
    facts = {specification.pop(fact) for fact in ("cpuArch", "os", "systemMemory")}
    assert all(facts)
    assert specification == {
        "gpu": "CPU",
        "instanceType": "CPU",
        "backend": "local",
        "minInstances": 0,
        "maxInstances": 1,
        "maxRequestConcurrency": 1,
        "preferredOrder": 1,
    }
    await function.undeploy()


# -- who may -----------------------------------------------------------------------------------


@production_only
async def test_a_foreign_function_reads_like_one_that_never_was(mirror: Mirror, stranger: Caller) -> None:
    function = mirror.function
    nobodys = Function(stranger, UNKNOWN_ID, UNKNOWN_ID)
    deployment = {"deploymentSpecifications": [SPECIFICATION]}
    for method, foreign, unknown, data in (
        ("GET", f"{FUNCTIONS}/{function.id}/versions", f"{FUNCTIONS}/{UNKNOWN_ID}/versions", None),
        ("POST", f"{FUNCTIONS}/{function.id}/versions", f"{FUNCTIONS}/{UNKNOWN_ID}/versions", DEFINITION),
        ("GET", path_of(function), path_of(nobodys), None),
        ("DELETE", path_of(function), path_of(nobodys), None),
        ("GET", function.deployment_path, nobodys.deployment_path, None),
        ("POST", function.deployment_path, nobodys.deployment_path, deployment),
        ("DELETE", function.deployment_path, nobodys.deployment_path, None),
    ):
        replies = [await stranger.call(method, path, data=data) for path in (foreign, unknown)]
        assert [reply.status for reply in replies] == [404, 404]
        first, second = [{**reply.json, "instance": ""} for reply in replies]
        assert first == second
    listed = (await stranger.call("GET", FUNCTIONS)).json["functions"]
    assert function.id not in [each["id"] for each in listed]
    assert await function.state() == "ACTIVE"


@production_only
async def test_each_route_asks_for_its_scope(site: Site, mirror: Mirror) -> None:
    async with site.caller(await site.new_key("default", "list_functions", "invoke_function")) as reader:
        shown = await reader.call("GET", path_of(mirror.function))
        assert (shown.status, "activeInstances" in shown.json["function"]) == (200, False)
        for method, path, scope in (
            ("POST", FUNCTIONS, "register_function"),
            ("POST", f"{FUNCTIONS}/{mirror.function.id}/versions", "register_function"),
            ("DELETE", path_of(mirror.function), "delete_function"),
            ("POST", mirror.function.deployment_path, "deploy_function"),
            ("GET", mirror.function.deployment_path, "deploy_function"),
            ("DELETE", mirror.function.deployment_path, "deploy_function"),
        ):
            refused = await reader.call(method, path, data={})
            assert (refused.status, slug(refused)) == (403, "forbidden")
            assert scope in refused.json["detail"]


@production_only
async def test_a_key_that_was_deleted_is_refused_within_two_seconds(site: Site) -> None:
    env = dev.environment(**site.settings)
    made = await asyncio.to_thread(dev.fnqueue, "keys", "create", "--account", "short-lived", env=env)
    key_id = made.stderr.split()[1].rstrip(",")
    async with site.caller(made.stdout.strip()) as guest:
        assert (await guest.call("GET", FUNCTIONS)).status == 200
        listed = await asyncio.to_thread(dev.fnqueue, "keys", "list", "--account", "short-lived", env=env)
        assert key_id in listed.stdout
        assert made.stdout.strip() not in listed.stdout
        await asyncio.to_thread(dev.fnqueue, "keys", "delete", key_id, env=env)
        await eventually(lambda: guest.call("GET", FUNCTIONS), lambda reply: reply.status == 401)
