"""Secrets planted in every input are found where they belong, and nowhere else at all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
import redis

from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, House, Reply, running

NVCF = "/v2/nvcf"
UNKNOWN = "00000000-0000-4000-8000-000000000000"
DEFINITION = {
    "name": "under-test",
    "inferenceUrl": "/",
    "containerImage": RECORDER,
    "health": {"protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200},
}


@dataclass(slots=True, kw_only=True)
class Planter:
    """Sends canaries, and keeps every answer."""

    caller: Caller
    canaries: list[str] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def canary(self, *, password: bool = False) -> str:
        made = f"canary{secrets.token_hex(12)}"
        self.canaries.append(made)
        if not password:
            return made
        encoded = base64.b64encode(f"user:{made}".encode()).decode()
        self.canaries.append(encoded)
        return encoded

    def secret(self, name: str = "A") -> dict[str, Any]:
        return {"name": name, "value": self.canary()}

    async def send(self, status: int, method: str, path: str, *, key: str = "", **sent: Any) -> Reply:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        reply = await self.caller.call(method, NVCF + path, headers=headers, **sent)
        self.replies.append(reply)
        assert reply.status == status, (method, path, reply)
        return reply

    async def create(self, *given: dict[str, Any]) -> Function:
        made = await self.send(200, "POST", "/functions", data={**DEFINITION, "secrets": list(given)})
        function = made.json["function"]
        return Function(self.caller, function["id"], function["versionId"])

    async def seen(self, function: Function, name: str) -> tuple[str, int]:
        """Digest of the secret that the container reads, and the container's process."""
        reply = await self.caller.invoke(function.id, {"secret": name})
        self.replies.append(reply)
        assert reply.status == 200, reply
        return reply.json["secret"], reply.json["pid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounds:
    """A running product. `passwords` open its servers, by whose they are."""

    house: House
    rabbitmq: RabbitMQ
    redis: Redis
    redis_url: str
    keys: str
    passwords: dict[str, str]


@pytest.fixture(scope="module")
def grounds(
    programs: None, product_rabbitmq: RabbitMQ, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Grounds]:
    store, folder = Redis(tmp_path_factory.mktemp("own-redis")), tmp_path_factory.mktemp("grounds")
    password, keys = f"canary{secrets.token_hex(12)}", secrets.token_hex(32)
    store.start()
    try:
        with redis.Redis.from_url(store.url) as client:
            client.config_set("requirepass", password)
        url = store.url.replace("redis://", f"redis://:{password}@")
        servers = {"FNQUEUE_QUEUE_URL": product_rabbitmq.url, "FNQUEUE_STORE_URL": url, "FNQUEUE_BLOBS_URL": s3.url}
        house = House(folder, servers, FNQUEUE_LOG_LEVEL="DEBUG", FNQUEUE_ENCRYPTION_KEYS=f"k1:{keys}")
        with running(house):
            yield Grounds(
                house=house,
                rabbitmq=product_rabbitmq,
                redis=store,
                redis_url=url,
                keys=keys,
                passwords={
                    "rabbitmq": urlsplit(product_rabbitmq.url).password or "",
                    "redis": password,
                    "s3": s3.secret_key,
                },
            )
    finally:
        store.kill()


@pytest.fixture
async def planter(grounds: Grounds) -> AsyncIterator[Planter]:
    async with grounds.house.caller() as caller:
        yield Planter(caller=caller)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def files(folder: Path) -> list[Path]:
    """Servers work in these folders meanwhile: what is removed during the look is passed over."""
    walked = os.walk(folder)
    paths = [Path(parent, name) for parent, _, names in walked for name in names]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in files(folder):
        with suppress(FileNotFoundError):
            yield path, path.read_bytes()


def stored(url: str) -> Iterator[bytes]:
    """Everything that a Redis holds, keys and values, as it is kept."""
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter():
            yield key
            read: dict[bytes, Any] = {
                b"string": lambda key: [client.get(key)],
                b"hash": lambda key: [part for pair in client.hgetall(key).items() for part in pair],
                b"zset": lambda key: client.zrange(key, 0, -1),
                b"set": client.smembers,
                b"list": lambda key: client.lrange(key, 0, -1),
                b"stream": lambda key: [str(client.xrange(key)).encode()],
            }
            yield from read[client.type(key)](key)


def environments() -> dict[str, bytes]:
    """What the processes of the house were started with, sidecars and containers included."""
    told = {}
    for process in psutil.Process().children(recursive=True):
        folder = Path("/proc", str(process.pid))
        words = folder.joinpath("cmdline").read_bytes()
        told[f"{process.pid} {words[:200]!r}"] = words + folder.joinpath("environ").read_bytes()
    return told


def found(needles: list[str], haystack: bytes) -> list[str]:
    return [needle for needle in needles if needle.encode() in haystack]


async def plant(planter: Planter) -> tuple[Function, dict[str, Any]]:
    """A deployed function, and what its containers should read. All other inputs are refused, or of its siblings."""
    p = planter
    first, deep = p.secret("A"), {"name": "B", "value": {p.canary(): [{"deep": p.canary()}]}}
    function = await p.create(first, deep)
    at = f"/functions/{function.id}/versions"
    await p.send(200, "POST", at, data={**DEFINITION, "secrets": [p.secret()]})
    await function.deploy(instances=1, concurrency=1)
    late = p.secret("C")
    await p.send(204, "PUT", f"/secrets{at}/{function.version_id}", data={"secrets": [late]})
    for bad in (
        [],
        [p.secret(), p.secret()],
        [{"name": "no good", "value": p.canary()}],
        [{"name": p.canary() * 9, "value": p.canary()}],
        [{"name": "A", "value": p.canary() * 2000}],
        [{"name": "A", "value": [p.canary()]}],
        [{"name": "A", "value": {p.canary(): float("nan")}}],
        [{"name": "A", "value": {"k": p.canary() * 2000}}],
        [{"name": "A"}, {"value": p.canary()}],
        [p.canary()],
        {"A": p.canary()},
    ):
        await p.send(400, "PUT", f"/secrets{at}/{function.version_id}", data={"secrets": bad})
        if bad:
            await p.send(400, "POST", "/functions", data={**DEFINITION, "secrets": bad})
    cut = f'{{"secrets": [{{"name": "A", "value": "{p.canary()}'.encode()
    await p.send(400, "PUT", f"/secrets{at}/{function.version_id}", body=cut)
    await p.send(404, "PUT", f"/secrets{at}/{UNKNOWN}", data={"secrets": [p.secret()]})
    await p.send(401, "PUT", f"/secrets{at}/{UNKNOWN}", key="nvapi-wrong", data={"secrets": [p.secret()]})
    return function, {"A": first["value"], "B": deep["value"], "C": late["value"]}


async def plant_credentials(planter: Planter) -> None:
    p, path = planter, "/registry-credentials"

    def credential(secret: str, **given: Any) -> dict[str, Any]:
        pull = {"registryHostname": "ghcr.io", "artifactTypes": ["CONTAINER"], "secret": {"name": "n", "value": secret}}
        return pull | given

    made = await p.send(200, "POST", path, data=credential(p.canary(password=True)))
    one = f"{path}/{made.json['registryCredential']['registryCredentialId']}"
    await p.send(200, "PATCH", one, data={"secret": {"name": "n", "value": p.canary(password=True)}})
    await p.send(409, "POST", path, data=credential(p.canary(password=True)))
    await p.send(400, "POST", path, data=credential(p.canary(password=True), registryHostname="evil.example"))
    await p.send(400, "POST", path, data=credential(p.canary()))
    await p.send(400, "PATCH", one, data={"secret": {"name": "n", "value": p.canary() + "%"}})
    await p.send(400, "PATCH", one, data={"secret": {"name": "n", "value": {"user": p.canary()}}})
    await p.send(404, "PATCH", f"{path}/{UNKNOWN}", data={"secret": {"name": "n", "value": p.canary(password=True)}})
    await p.send(200, "GET", path)
    await p.send(200, "GET", one)


@pytest.mark.timeout(240)
async def test_secrets_are_where_they_belong_and_nowhere_else(grounds: Grounds, planter: Planter) -> None:
    house = grounds.house
    function, expected = await plant(planter)
    await plant_credentials(planter)

    async def look() -> tuple[str, int]:
        return await planter.seen(function, "C")

    _, pid = await planter.seen(function, "B")
    seen = await eventually(look, lambda told: told[0] == digest(expected["C"]))
    assert seen[1] == pid, "the container was started again"
    submitted = [await planter.caller.submit(function.id, {"delay_s": 0.2}) for _ in range(5)]

    shown = await planter.send(200, "GET", f"/functions/{function.id}/versions/{function.version_id}")
    assert shown.json["function"]["secrets"] == ["A", "B", "C"]
    hidden = await planter.send(
        200, "GET", f"/functions/{function.id}/versions/{function.version_id}?includeSecrets=false"
    )
    assert "secrets" not in hidden.json["function"]
    await planter.send(200, "GET", "/functions")

    (file,) = await _where(house)
    assert json.loads(file.read_text()) == expected
    needles = [*planter.canaries, grounds.keys]
    folders = (house.folder, grounds.rabbitmq.folder, grounds.redis.folder)
    written = [pair for folder in folders for pair in contents(folder)]
    leaks = {path: found(needles, content) for path, content in written if path != file}
    assert [(path, leaked) for path, leaked in leaks.items() if leaked] == []
    assert [leaked for value in stored(grounds.redis_url) for leaked in found(needles, value)] == []
    answers = (str(dict(reply.headers)).encode() + reply.body for reply in planter.replies)
    assert [leaked for answer in answers for leaked in found(needles, answer)] == []
    started_with = environments()
    assert [told for told, words in started_with.items() if found(planter.canaries, words)] == []
    holders = [told for told, words in started_with.items() if found([grounds.keys], words)]
    assert len(holders) == 2, "the api and the controller, and no sidecar and no container"

    for request_id in submitted:
        planter.replies.append(await planter.caller.result(request_id))
    for process in (*house.containers(), *house.sidecars())[:1]:
        process.kill()
    await eventually(lambda: _where(house), lambda there: there not in ([], [file]), within_s=30)
    house.controller.kill()
    house.controller.start()
    await function.undeploy()
    await eventually(lambda: _where(house), lambda there: there == [], within_s=60)


async def _where(house: House) -> list[Path]:
    return sorted(path for path in files(house.folder) if path.name == "secrets.json")


@pytest.mark.timeout(240)
async def test_what_is_sent_and_what_opens_servers_is_in_no_log_and_no_container(
    grounds: Grounds, planter: Planter
) -> None:
    """The last test of this product: it takes its Redis away."""
    house, admin = grounds.house, planter.caller
    key, sent, signatures = await send(planter)
    ours = [house.key, grounds.keys, *grounds.passwords.values()]

    told = [str(dict(reply.headers)).encode() + reply.body for reply in planter.replies]
    assert any(found(sent, answer) for answer in told), "the function was given them"
    assert [found(ours, answer) for answer in told if found(ours, answer)] == []
    kept = list(stored(grounds.redis_url))
    assert [found([*ours, key, *signatures], value) for value in kept if found([*ours, key, *signatures], value)] == []
    opening = [house.key, key, *signatures]
    queued = {path: found(opening, content) for path, content in contents(grounds.rabbitmq.folder)}
    assert [leak for leak in queued.items() if leak[1]] == []
    containers = {process.pid for process in house.containers()}
    assert containers
    for words, environment in environments().items():
        assert found([key, *sent, *signatures], environment) == [], words
        if int(words.split()[0]) in containers:
            assert found(ours, environment) == [], words

    grounds.redis.kill()
    gone = await admin.call("POST", f"{NVCF}/functions", data={**DEFINITION, "name": sent[0]})
    assert gone.status == 503
    assert found([*ours, key], gone.body) == []
    written = [pair for pair in contents(house.folder) if pair[0].name not in ("images.toml", "record")]
    assert any(b'"event":"answered"' in content for _, content in written)
    needles = [*ours, key, *sent, *signatures]
    leaks = {path: found(needles, content) for path, content in written}
    assert [(path, leaked) for path, leaked in leaks.items() if leaked] == []


async def send(planter: Planter) -> tuple[str, list[str], list[str]]:
    """Requests of an account of its own, good and bad, with a canary in every part of them: its key, the canaries, and
    what the signatures of its URLs and the secret of its webhooks were."""
    p, admin = planter, planter.caller
    rights = {"policies": [{"scopes": ["invoke_function"], "resources": [{"id": "*", "type": "account-functions"}]}]}
    made = await admin.call("POST", "/v1/keys", data={"description": "d", "authorizations": rights})
    assert made.status == 200, made
    key = str(made.json["value"])
    function = await p.create()
    await function.deploy(instances=1, concurrency=1)
    first = len(p.canaries)
    invoke = f"/pexec/functions/{function.id}"
    worn = {"X-Canary": p.canary(), "Cookie": p.canary(), "Idempotency-Key": p.canary(), "NVCF-SUB": p.canary()}
    hook = await admin.call("POST", f"{NVCF}/webhooks/secrets", data={})
    assert hook.status == 200, hook
    refused = f"https://user:{p.canary()}@hooks.invalid/{p.canary()}"
    await p.send(400, "PUT", f"/functions/{function.id}/webhook", data={"url": refused})
    worn["NVCF-CALLBACK-URL"] = f"https://hooks.invalid/{p.canary()}?token={p.canary()}"
    for order in ({"note": p.canary()}, {"note": p.canary(), "die": True}):
        reply = await admin.call(
            "POST", f"{NVCF}{invoke}?q={p.canary()}", data=order, headers={**worn, "Authorization": f"Bearer {key}"}
        )
        assert reply.status == (500 if "die" in order else 200), reply
        p.replies.append(reply)
        worn |= {"Idempotency-Key": p.canary()}
    await p.send(401, "GET", f"/functions?q={p.canary()}", key=f"nvapi-{p.canary()}")
    await p.send(400, "POST", "/functions", body=f'{{"name": "{p.canary()}'.encode())
    await p.send(400, "POST", "/functions", data={**DEFINITION, "inferenceUrl": f"\\{p.canary()}"})
    await p.send(404, "POST", invoke.replace(function.id, UNKNOWN), data={"note": p.canary()})
    signatures = [str(hook.json["secret"]).removeprefix("whsec_")]
    described = await p.send(200, "POST", "/assets", data={"contentType": "text/plain", "description": p.canary()})
    upload = parse_qs(urlsplit(described.json["uploadUrl"]).query)
    signatures += upload["X-Amz-Signature"] + upload["X-Amz-Credential"]
    sent = p.canaries[first:]
    return key, sent, signatures
