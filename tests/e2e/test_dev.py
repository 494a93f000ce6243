"""The embedded default, as a new user meets it: one process, used by HTTP alone."""

from __future__ import annotations

import ast
import asyncio
import json
import signal
import socket
import stat
import subprocess
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

import fnqueue as package
from tests.e2e.dev import Dev, environment, fnqueue, running
from tests.eventually import eventually

ID = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
NVCF = "/v2/nvcf"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    with running(tmp_path_factory.mktemp("dev")) as server:
        yield server


@pytest.fixture
async def client(dev: Dev) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(dev.url, headers=dev.authorization) as session:
        yield session


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def invoke(client: aiohttp.ClientSession, dev: Dev, **sent: Any) -> Answer:
    async with client.post(dev.invoke_url, **sent) as response:
        return Answer(status=response.status, headers=response.headers, body=await response.read())


async def poll(client: aiohttp.ClientSession, request_id: str, **headers: str) -> Answer:
    async with client.get(f"{NVCF}/pexec/status/{request_id}", headers=headers) as response:
        return Answer(status=response.status, headers=response.headers, body=await response.read())


async def begun(client: aiohttp.ClientSession, dev: Dev, delay_s: float = 30) -> str:
    """The ID of a request that runs now."""
    accepted = await invoke(client, dev, json=say(delay_s=delay_s), headers={"Prefer": "respond-async"})

    async def status() -> str:
        found = await poll(client, accepted.headers["NVCF-REQID"], Prefer="wait=0")
        return found.headers["NVCF-STATUS"]

    await eventually(status, lambda seen: seen == "in-progress")
    return accepted.headers["NVCF-REQID"]


async def cancel(client: aiohttp.ClientSession, request_id: str) -> int:
    async with client.delete(f"{NVCF}/requests/{request_id}") as response:
        return response.status


def say(message: str = "hi", *, delay_s: float = 0) -> dict[str, Any]:
    return {"message": message, "repeats": 1, "delay": delay_s}


# -- hello -------------------------------------------------------------------------------------


def test_a_new_user_is_told_all_there_is_to_know(dev: Dev) -> None:
    assert dev.url.startswith("http://127.0.0.1:")
    assert dev.key.startswith("nvapi-")
    assert len(dev.key) == len("nvapi-") + 43
    assert str(uuid.UUID(dev.function_id))
    assert "HTTP 200" in dev.output
    assert f"Dashboard  {dev.url}/dashboard\n" in dev.output
    assert "NVCF-STATUS: fulfilled" in dev.output
    assert '{"echo":"hello hello"}' in dev.output


def test_the_curl_line_works_when_it_is_pasted(dev: Dev) -> None:
    pasted = subprocess.run(dev.curl, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(pasted.stdout) == {"echo": "hello hello"}


def test_welcome_finds_the_sample_function_of_a_running_server(dev: Dev) -> None:
    again = fnqueue("welcome", "--url", dev.url, "--json", env=environment(FNQUEUE_ADMIN_KEY=dev.key))
    facts = json.loads(again.stdout)
    assert (facts["functionId"], facts["status"], facts["key"]) == (dev.function_id, 200, dev.key)
    assert facts["result"] == {"echo": "hello hello"}


def test_welcome_says_in_one_line_why_it_cannot(dev: Dev) -> None:
    refused = fnqueue("welcome", "--url", dev.url, "--key", "wrong")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "401" in refused.stderr


# -- invocation --------------------------------------------------------------------------------


async def test_a_result_comes_with_its_request_id_and_status(client: aiohttp.ClientSession, dev: Dev) -> None:
    answer = await invoke(client, dev, json=say("hi"))
    assert (answer.status, answer.json()) == (200, {"echo": "hi"})
    assert answer.headers["NVCF-STATUS"] == "fulfilled"
    assert answer.headers["Access-Control-Expose-Headers"] == "nvcf-reqid"
    assert answer.headers["Content-Type"] == "application/json"
    assert str(uuid.UUID(answer.headers["NVCF-REQID"]))


async def test_a_result_can_be_read_again_and_again(client: aiohttp.ClientSession, dev: Dev) -> None:
    first = await invoke(client, dev, json=say("again"))
    for _ in range(3):
        later = await poll(client, first.headers["NVCF-REQID"])
        assert (later.status, later.body) == (200, first.body)


async def test_one_version_can_be_named(client: aiohttp.ClientSession, dev: Dev) -> None:
    async with client.get(f"{NVCF}/functions/{dev.function_id}/versions") as listed:
        version = (await listed.json())["functions"][0]
    path = f"{NVCF}/pexec/functions/{dev.function_id.upper()}/versions/{version['versionId'].upper()}"
    async with client.post(path, json=say()) as named:
        assert named.status == 200
    async with client.get(f"{NVCF}/functions/{dev.function_id}/versions/{version['versionId']}") as found:
        instance = (await found.json())["function"]["activeInstances"][0]
    assert (instance["instanceStatus"], instance["gpu"]) == ("RUNNING", "CPU")


async def test_the_functions_own_errors_are_the_callers(client: aiohttp.ClientSession, dev: Dev) -> None:
    answer = await invoke(client, dev, data=b"\x00\xff not json", headers={"Content-Type": "application/x-mine"})
    assert (answer.status, answer.headers["NVCF-STATUS"]) == (400, "errored")
    problem = answer.json()
    assert problem["type"] == "urn:inference-service:problem-details:bad-request"
    assert problem["detail"] == "the body is not JSON"


async def test_respond_async_is_answered_at_once_and_polled_for(client: aiohttp.ClientSession, dev: Dev) -> None:
    accepted = await invoke(client, dev, json=say("later", delay_s=0.3), headers={"Prefer": "respond-async"})
    assert (accepted.status, accepted.body) == (202, b"")
    assert accepted.headers["Preference-Applied"] == "respond-async"
    assert accepted.headers["NVCF-STATUS"] in ("pending-evaluation", "in-progress")
    assert accepted.headers["Retry-After"] == "1"
    async with client.get(accepted.headers["Location"]) as result:
        assert (result.status, await result.json()) == (200, {"echo": "later"})


async def test_a_wait_that_ends_first_is_202_in_progress(client: aiohttp.ClientSession, dev: Dev) -> None:
    pending = await invoke(client, dev, json=say(delay_s=30), headers={"NVCF-POLL-SECONDS": "1"})
    assert (pending.status, pending.headers["NVCF-STATUS"]) == (202, "in-progress")
    assert await cancel(client, pending.headers["NVCF-REQID"]) == 202


async def test_a_key_that_was_used_leads_to_the_same_request(client: aiohttp.ClientSession, dev: Dev) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = await invoke(client, dev, json=say("once"), headers=key)
    second = await invoke(client, dev, json=say("once"), headers=key)
    assert second.headers["NVCF-REQID"] == first.headers["NVCF-REQID"]
    assert (second.status, second.body) == (200, first.body)
    other = await invoke(client, dev, json=say("twice"), headers=key)
    assert other.status == 422
    problem = other.json()
    assert problem["type"] == "urn:fnqueue:problem-details:idempotency-key-reused"


# -- cancel and queues -------------------------------------------------------------------------


async def test_a_running_request_is_cancelled_and_stays_so(client: aiohttp.ClientSession, dev: Dev) -> None:
    request_id = await begun(client, dev)
    async with client.delete(f"{NVCF}/requests/{request_id}") as cancelled:
        assert (cancelled.status, await cancelled.json()) == (202, {"requestId": request_id, "status": "cancelled"})
    assert await cancel(client, request_id) == 202
    gone = await poll(client, request_id)
    assert (gone.status, gone.headers["NVCF-STATUS"]) == (410, "rejected")
    problem = gone.json()
    assert (problem["type"], problem["requestId"]) == ("urn:fnqueue:problem-details:request-cancelled", request_id)


async def test_a_finished_request_cannot_be_cancelled(client: aiohttp.ClientSession, dev: Dev) -> None:
    answer = await invoke(client, dev, json=say())
    assert await cancel(client, answer.headers["NVCF-REQID"]) == 409


async def test_a_waiting_request_knows_its_place(client: aiohttp.ClientSession, dev: Dev) -> None:
    running_now = [await begun(client, dev) for _ in range(4)]  # every slot of the function
    waiting = []
    for _ in range(3):
        accepted = await invoke(client, dev, json=say(), headers={"Prefer": "respond-async"})
        assert accepted.headers["NVCF-STATUS"] == "pending-evaluation"
        waiting.append(accepted.headers["NVCF-REQID"])
    assert await positions(client, [running_now[0], *waiting]) == [0, 1, 2, 3]
    queues = await queue(client, dev)
    assert (queues["queueDepth"], queues["inFlight"], queues["functionStatus"]) == (3, 4, "ACTIVE")
    assert await cancel(client, waiting[0]) == 202
    assert await positions(client, waiting[1:]) == [1, 2]
    for request_id in running_now:
        assert await cancel(client, request_id) == 202
    for request_id in waiting[1:]:
        assert (await poll(client, request_id)).status == 200
    assert (await queue(client, dev))["queueDepth"] == 0


async def positions(client: aiohttp.ClientSession, request_ids: list[str]) -> list[int]:
    found = []
    for request_id in request_ids:
        async with client.get(f"{NVCF}/queues/{request_id}/position") as response:
            body = await response.json()
        found.append(body["positionInQueue"])
    return found


async def queue(client: aiohttp.ClientSession, dev: Dev) -> dict[str, Any]:
    async with client.get(f"{NVCF}/queues/functions/{dev.function_id}") as response:
        body = await response.json()
    assert body["functionId"] == dev.function_id
    (found,) = body["queues"]
    return dict(found)


# -- assets ------------------------------------------------------------------------------------


async def test_an_asset_is_uploaded_named_in_an_invocation_and_deleted(client: aiohttp.ClientSession, dev: Dev) -> None:
    async with client.post(f"{NVCF}/assets", json={"contentType": "image/png", "description": "a cat"}) as created:
        asset = await created.json()
    path = f"{NVCF}/assets/{asset['assetId']}"
    reference = {"NVCF-INPUT-ASSET-REFERENCES": asset["assetId"]}
    assert (await invoke(client, dev, json=say(), headers=reference)).status == 404
    signed = {"Content-Type": "image/png", "x-amz-meta-nvcf-asset-description": "a cat"}
    async with aiohttp.ClientSession() as stranger:
        async with stranger.put(asset["uploadUrl"], data=b"cat", headers=signed | {"Content-Type": "a/b"}) as refused:
            assert refused.status == 403
        async with stranger.put(asset["uploadUrl"], data=b"cat", headers=signed) as uploaded:
            assert uploaded.status == 200
    async with client.get(path) as got:
        found = (await got.json())["asset"]
    assert (found["contentType"], found["description"]) == ("image/png", "a cat")
    async with client.get(f"{NVCF}/assets") as listed:
        assert asset["assetId"] in [one["assetId"] for one in (await listed.json())["assets"]]
    assert (await invoke(client, dev, json=say(), headers=reference)).status == 200
    async with client.delete(path) as deleted:
        assert deleted.status == 204
    async with client.delete(path) as again:
        assert again.status == 404


async def test_a_large_result_is_behind_a_link_that_needs_no_key(client: aiohttp.ClientSession, dev: Dev) -> None:
    large = {"message": "m" * 1_000_000, "repeats": 6, "delay": 0}
    moved = await invoke(client, dev, json=large, allow_redirects=False)
    assert (moved.status, moved.headers["NVCF-STATUS"], moved.body) == (302, "fulfilled", b"")
    async with aiohttp.ClientSession() as stranger, stranger.get(moved.headers["Location"]) as archive:
        assert (archive.status, (await archive.read())[:2]) == (200, b"PK")
        assert archive.headers["Content-Type"] == "application/zip"
        assert archive.headers["Content-Disposition"].startswith("attachment")


# -- functions ---------------------------------------------------------------------------------


async def test_a_function_is_made_deployed_invoked_undeployed_and_deleted(client: aiohttp.ClientSession) -> None:
    asked = {"name": "mine", "inferenceUrl": "/echo", "containerImage": "fnqueue/echo:latest", "healthUri": "/health"}
    async with client.post(f"{NVCF}/functions", json=asked) as created:
        function = (await created.json())["function"]
    assert function["status"] == "INACTIVE"
    path = f"functions/{function['id']}/versions/{function['versionId']}"
    async with client.post(f"{NVCF}/pexec/functions/{function['id']}", json=say()) as early:
        assert early.status == 404
    specification = {"gpu": "cpu", "minInstances": 1, "maxInstances": 1}
    async with client.post(
        f"{NVCF}/deployments/{path}", json={"deploymentSpecifications": [specification]}
    ) as deployed:
        assert (await deployed.json())["deployment"]["functionStatus"] == "DEPLOYING"

    async def status() -> str:
        async with client.get(f"{NVCF}/{path}") as found:
            return str((await found.json())["function"]["status"])

    await eventually(status, lambda seen: seen == "ACTIVE")
    async with client.post(f"{NVCF}/pexec/functions/{function['id']}", json=say()) as answer:
        assert answer.status == 200
    async with client.delete(f"{NVCF}/deployments/{path}", params={"graceful": "yes"}) as undeployed:
        assert (await undeployed.json())["function"]["status"] == "INACTIVE"
    async with client.post(f"{NVCF}/pexec/functions/{function['id']}", json=say()) as late:
        assert late.status == 404
    async with client.delete(f"{NVCF}/{path}") as deleted:
        assert deleted.status == 204
    async with client.get(f"{NVCF}/{path}") as gone:
        assert gone.status == 404


# -- bad input ---------------------------------------------------------------------------------

PEXEC = f"{NVCF}/pexec/functions"
BAD: list[tuple[int, str, str, dict[str, str], bytes | None]] = [
    (400, "POST", f"{PEXEC}/x", {}, b"{}"),
    (400, "POST", f"{PEXEC}/{{{ID}}}", {}, b"{}"),
    (400, "POST", f"{PEXEC}/urn:uuid:{ID}", {}, b"{}"),
    (400, "POST", f"{PEXEC}/%ff%00", {}, b"{}"),
    (404, "POST", f"{PEXEC}/{ID}", {}, b"{}"),
    (400, "POST", f"{PEXEC}/{ID}/versions/x", {}, b"{}"),
    (404, "POST", f"{PEXEC}/{ID}/versions/{ID}", {}, b"{}"),
    (400, "POST", "ECHO", {"NVCF-POLL-SECONDS": "-1"}, b"{}"),
    (400, "POST", "ECHO", {"NVCF-POLL-SECONDS": "3601"}, b"{}"),
    (400, "POST", "ECHO", {"NVCF-INPUT-ASSET-REFERENCES": "../../etc"}, b"{}"),
    (404, "POST", "ECHO", {"NVCF-INPUT-ASSET-REFERENCES": ID}, b"{}"),
    (400, "POST", "ECHO", {"Idempotency-Key": "x" * 256}, b"{}"),
    (400, "POST", "ECHO", {f"X-{n}": "v" for n in range(70)}, b"{}"),
    (400, "POST", "ECHO", {}, b""),
    (413, "POST", "ECHO", {}, b"x" * (5 * 1024 * 1024 + 1)),
    (405, "GET", "ECHO", {}, None),
    (400, "GET", f"{NVCF}/pexec/status/x", {}, None),
    (404, "GET", f"{NVCF}/pexec/status/{ID}", {}, None),
    (400, "GET", f"{NVCF}/pexec/status/{ID}", {"NVCF-POLL-SECONDS": "soon"}, None),
    (400, "DELETE", f"{NVCF}/requests/x", {}, None),
    (404, "DELETE", f"{NVCF}/requests/{ID}", {}, None),
    (400, "GET", f"{NVCF}/queues/x/position", {}, None),
    (404, "GET", f"{NVCF}/queues/{ID}/position", {}, None),
    (400, "GET", f"{NVCF}/queues/functions/x", {}, None),
    (404, "GET", f"{NVCF}/queues/functions/{ID}", {}, None),
    (404, "GET", f"{NVCF}/queues/functions/{ID}/versions/{ID}", {}, None),
    (400, "POST", f"{NVCF}/functions", {}, b""),
    (400, "POST", f"{NVCF}/functions", {}, b"null"),
    (400, "POST", f"{NVCF}/functions", {}, b"[1]"),
    (400, "POST", f"{NVCF}/functions", {}, b'{"name": '),
    (400, "POST", f"{NVCF}/functions", {}, b"\xff\xfe"),
    (400, "POST", f"{NVCF}/functions", {}, b'{"name": "\\ud800"}'),
    (400, "POST", f"{NVCF}/functions", {}, b"[" * 100_000),
    (400, "POST", f"{NVCF}/functions", {}, b'{"name": 1, "inferenceUrl": 2}'),
    (400, "GET", f"{NVCF}/functions?visibility=secret", {}, None),
    (400, "GET", f"{NVCF}/functions?visibility=%ff", {}, None),
    (400, "GET", f"{NVCF}/functions/x/versions", {}, None),
    (404, "GET", f"{NVCF}/functions/{ID}/versions", {}, None),
    (404, "POST", f"{NVCF}/functions/{ID}/versions", {}, b'{"name":"a","inferenceUrl":"/","containerImage":"i"}'),
    (404, "DELETE", f"{NVCF}/functions/{ID}/versions/{ID}", {}, None),
    (400, "POST", f"{NVCF}/deployments/functions/x/versions/{ID}", {}, b"{}"),
    (400, "POST", f"{NVCF}/deployments/functions/{ID}/versions/{ID}", {}, b"{}"),
    (404, "GET", f"{NVCF}/deployments/functions/{ID}/versions/{ID}", {}, None),
    (400, "DELETE", f"{NVCF}/deployments/functions/{ID}/versions/{ID}?graceful=perhaps", {}, None),
    (400, "POST", f"{NVCF}/assets", {}, b"{}"),
    (400, "POST", f"{NVCF}/assets", {}, b'{"contentType": "image/png", "description": null}'),
    (400, "POST", f"{NVCF}/assets", {}, b'{"contentType": "nonsense", "description": "d"}'),
    (400, "GET", f"{NVCF}/assets/x", {}, None),
    (404, "GET", f"{NVCF}/assets/{ID}", {}, None),
    (403, "GET", f"{NVCF}/blobs/assets/default/{ID}", {}, None),
    (403, "GET", f"{NVCF}/blobs/..%2f..%2fetc/passwd", {}, None),
    (403, "PUT", f"{NVCF}/blobs/x?expires=1&type=&description=&signature=%ff", {}, b"x"),
    (404, "GET", "/nowhere", {}, None),
    (405, "PUT", "/health", {}, None),
]


@pytest.mark.parametrize(("status", "method", "path", "headers", "body"), BAD)
async def test_bad_input_is_a_problem_and_never_our_fault(
    client: aiohttp.ClientSession,
    dev: Dev,
    status: int,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes | None,
) -> None:
    url = dev.invoke_url if path == "ECHO" else path
    async with client.request(method, url, headers=headers, data=body) as response:
        problem = await response.json(content_type="application/problem+json")
    assert (response.status, problem["status"]) == (status, status)
    assert problem["type"].startswith(("urn:", "about:blank"))


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", "Basic YTpi", "Bearer \xff"])
@pytest.mark.parametrize("path", ["ECHO", f"{NVCF}/assets", f"{NVCF}/functions", "/nowhere"])
async def test_whoever_brings_no_good_key_is_told_how_to(dev: Dev, authorization: str | None, path: str) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    url = dev.invoke_url if path == "ECHO" else dev.url + path
    async with aiohttp.ClientSession() as stranger, stranger.post(url, headers=headers, json={}) as response:
        await response.read()
    if path == "/nowhere" and authorization == "Bearer wrong":
        assert response.status == 404
    else:
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v2/nvcf/functions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v2/nvcf/functions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 20_000 + b"\r\n\r\n",
    ],
)
def test_broken_http_is_refused_at_once(dev: Dev, sent: bytes) -> None:
    host, port = dev.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        status = connection.recv(4096).split(b" ")[1:2]
    assert status[0][:1] == b"4"


async def test_a_stranger_can_look_at_the_health_only(dev: Dev) -> None:
    async with aiohttp.ClientSession(dev.url) as stranger:
        for path in ("/health", "/livez", "/readyz"):
            async with stranger.get(path) as response:
                assert (response.status, await response.json()) == (200, {"status": "OK"})


# -- the command -------------------------------------------------------------------------------


def test_a_taken_port_is_one_line(dev: Dev, tmp_path: Path) -> None:
    port = dev.url.rpartition(":")[2]
    refused = fnqueue("dev", "--port", port, "--data-dir", str(tmp_path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"fnqueue: port {port} is taken on 127.0.0.1; choose another with --port or FNQUEUE_PORT\n"


def test_a_data_folder_in_use_is_one_line(dev: Dev, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = psutil.Process(dev.process.pid).cmdline()[-1]
    refused = fnqueue("dev", "--port", "0", "--data-dir", folder)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "FNQUEUE_DATA_DIR" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "named"),
    [
        (["dev", "--prot", "1"], {}, "--prot"),
        (["dev", "--port", "x"], {}, "--port"),
        (["dev", "--port", "70000"], {}, "--port"),
        (["dev", "--host", "not.a.host.invalid"], {}, "not.a.host.invalid"),
        (["dev", "--key", "two words"], {}, "key"),
        (["dev"], {"FNQUEUE_PORT": "many"}, "FNQUEUE_PORT"),
        (["dev"], {"FNQUEUE_MAX_BODY_BYTES": "1"}, "FNQUEUE_MAX_BODY_BYTES"),
        (["dev"], {"FNQUEUE_ENCRYPTION_KEYS": "k1:short"}, "FNQUEUE_ENCRYPTION_KEYS"),
        (["dev"], {"FNQUEUE_RECOGNIZED_REGISTRIES": "nameless"}, "FNQUEUE_RECOGNIZED_REGISTRIES"),
        (["api"], {}, "FNQUEUE_QUEUE_URL"),
        (["api"], {"FNQUEUE_QUEUE_URL": "carrier-pigeon://x", "FNQUEUE_STORE_URL": "redis://x"}, "SECRET_KEY"),
        (["keys", "list"], {}, "FNQUEUE_STORE_URL"),
        (["keys", "create", "--scope", "rule_the_world"], {}, "rule_the_world"),
        (["nonsense"], {}, "known are api, assets, cancel, completion, controller, dead-letters, deploy, dev"),
        (["welcome"], {}, "--key"),
    ],
)
def test_what_is_typed_or_set_wrong_is_one_line(
    arguments: list[str], env: dict[str, str], named: str, tmp_path: Path
) -> None:
    refused = fnqueue(*arguments, env=environment(FNQUEUE_DATA_DIR=str(tmp_path), **env))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("fnqueue: ")
    assert refused.stderr.count("\n") == 1
    assert named in refused.stderr


def test_an_old_python_can_read_what_tells_it_so() -> None:
    for source in ("__init__.py", "__main__.py"):
        text = (Path(package.__file__).parent / source).read_text()
        assert ast.parse(text, feature_version=(3, 7)).body


def test_help_and_version_are_there() -> None:
    assert fnqueue("--version").stdout.startswith("fnqueue ")
    told = fnqueue("dev", "--help").stdout
    for name in ("FNQUEUE_HOST", "FNQUEUE_PORT", "FNQUEUE_ADMIN_KEY", "FNQUEUE_DATA_DIR"):
        assert name in told


def test_the_keys_stay_the_same_and_belong_to_their_owner(tmp_path: Path) -> None:
    kept, encryption = tmp_path / "data" / "dev-key", tmp_path / "data" / "dev-encryption-keys"
    with running(tmp_path) as first:
        sealed_with = encryption.read_text()
        assert first.stop() == 0
    with running(tmp_path) as second:
        assert second.key == first.key
        assert kept.read_text().strip() == second.key
        assert encryption.read_text() == sealed_with
        assert [stat.S_IMODE(file.stat().st_mode) for file in (kept, encryption)] == [0o600, 0o600]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "--key", "mine-1234") as server:
        assert server.key == "mine-1234"
        started = server.descendants()
        assert started
        assert server.stop(number) == 0
        assert not [process for process in started if process.is_running()]
        assert (tmp_path / "errors.txt").read_text().count("Traceback") == 0


async def test_who_waits_is_answered_when_the_server_stops(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with aiohttp.ClientSession(server.url, headers=server.authorization) as client:
            request_id = await begun(client, server)
            waiting = [asyncio.create_task(poll(client, request_id)) for _ in range(5)]
            waiting.append(asyncio.create_task(invoke(client, server, json=say(delay_s=30))))
            await eventually(lambda: queue(client, server), lambda seen: seen["inFlight"] == 2)
            server.process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*waiting)
        assert [answer.status for answer in answers] == [202] * 6
        assert server.process.wait(20) == 0


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path, env=environment(FNQUEUE_DRAIN_S="60")) as server:
        subprocess.Popen(server.curl.replace('"delay": 0', '"delay": 30'), shell=True, stdout=subprocess.DEVNULL)
        started = server.descendants()
        server.process.send_signal(signal.SIGINT)
        _await_stopping(server.url)  # two that wait to be taken are one for the system
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) in (0, 130)
        psutil.wait_procs(started, timeout=5)
        assert not [process for process in started if process.is_running()]


def _await_stopping(url: str) -> None:
    deadline = time.monotonic() + 30
    with suppress(OSError):  # answered 503, or no longer
        while time.monotonic() < deadline:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            time.sleep(0.02)
        pytest.fail("the interrupt was not heeded")
