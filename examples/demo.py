"""The whole of fnqueue in one run: `python examples/demo.py`, or `make demo`.

Starts a server of its own, then does over HTTP what any client would: registers the text recognition sample
as a function, deploys it, uploads a picture of a receipt, invokes the function on it and prints what it read.
"""

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

PICTURE = Path(__file__).parent / "ocr" / "receipt.png"
START_TIMEOUT_S = 60.0
DEPLOY_TIMEOUT_S = 120.0
RESULT_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
# Longer than the server holds a poll open.
HTTP_TIMEOUT_S = 60.0
POLL_S = 30

FUNCTION = {
    "name": "ocr",
    "inferenceUrl": "/ocr",
    "containerImage": "fnqueue/ocr:latest",
    "health": {"protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200},
}
DEPLOYMENT = {
    "deploymentSpecifications": [
        {"gpu": "CPU", "instanceType": "CPU", "minInstances": 1, "maxInstances": 1, "maxRequestConcurrency": 1}
    ]
}
ASSET = {"contentType": "image/png", "description": "a receipt"}


class DemoFailed(Exception):
    """A step did not go as it should; the text says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        parsed = json.loads(self.body)
        if not isinstance(parsed, dict):
            raise DemoFailed(f"expected a JSON object, got {self.body[:200]!r}")
        return parsed


class Client:
    """HTTP with a bearer key, by the standard library alone."""

    def __init__(self, base_url: str, key: str) -> None:
        self._base_url = base_url
        self._key = key
        # Without the environment's proxies, which could not reach this machine's loopback.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        return self._call("GET", path, None, headers)

    def post(self, path: str, body: dict[str, Any], headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
        return self._call("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def upload(self, url: str, body: bytes, headers: dict[str, str]) -> None:
        """To a signed URL, which wants the signed headers and no key."""
        self._send("PUT", url, body, headers)

    def _call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        return self._send(method, self._base_url + path, body, {"Authorization": f"Bearer {self._key}", **headers})

    def _send(self, method: str, url: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        request = urllib.request.Request(url, body, headers, method=method)  # noqa: S310 - our own server's URLs
        try:
            with self._opener.open(request, timeout=HTTP_TIMEOUT_S) as response:
                return Answer(status=response.status, headers=response.headers, body=response.read())
        except urllib.error.HTTPError as error:
            with error:
                reason = " ".join(error.read(2000).decode(errors="replace").split())
            # Without its query, which holds the signature of a signed URL.
            raise DemoFailed(f"{method} {url.partition('?')[0]} was answered {error.code}: {reason}") from error


def main() -> int:
    signal.signal(signal.SIGTERM, stop_as_interrupted)
    try:
        check_installed()
        with tempfile.TemporaryDirectory(prefix="fnqueue-demo-") as folder, server(Path(folder)) as client:
            recognise(client)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 1
    except (DemoFailed, OSError) as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    return 0


def recognise(client: Client) -> None:
    function = client.post("/v2/nvcf/functions", FUNCTION).json()["function"]
    function_id, version_id = function["id"], function["versionId"]
    say("function", f"{FUNCTION['name']} is {function_id}, version {version_id}")
    deploy(client, function_id, version_id)
    asset_id = upload(client)
    result = invoke(client, function_id, asset_id)
    say("result", f"{len(result['images'])} picture read:")
    print("\n" + "\n".join(f"    {line}" for line in result["text"].splitlines()) + "\n")


def deploy(client: Client, function_id: str, version_id: str) -> None:
    started_at = time.monotonic()
    client.post(f"/v2/nvcf/deployments/functions/{function_id}/versions/{version_id}", DEPLOYMENT)

    def active() -> bool:
        status = client.get(f"/v2/nvcf/functions/{function_id}/versions/{version_id}").json()["function"]["status"]
        if status not in {"ACTIVE", "DEPLOYING", "INACTIVE"}:
            raise DemoFailed(f"the deployment became {status}")
        return bool(status == "ACTIVE")

    wait_until(active, DEPLOY_TIMEOUT_S, f"the function was not ACTIVE within {DEPLOY_TIMEOUT_S:g} s")
    say("deployment", f"ACTIVE, one instance, {time.monotonic() - started_at:.1f} s")


def upload(client: Client) -> str:
    asset = client.post("/v2/nvcf/assets", ASSET).json()
    picture = PICTURE.read_bytes()
    # Both headers are signed: the storage refuses the upload unless they come exactly as announced.
    headers = {"Content-Type": asset["contentType"], "x-amz-meta-nvcf-asset-description": asset["description"]}
    client.upload(asset["uploadUrl"], picture, headers)
    say("asset", f"{PICTURE.name} ({len(picture)} bytes) is {asset['assetId']}")
    return str(asset["assetId"])


def invoke(client: Client, function_id: str, asset_id: str) -> dict[str, Any]:
    started_at = time.monotonic()
    poll = {"NVCF-POLL-SECONDS": str(POLL_S)}
    with_asset = {"NVCF-INPUT-ASSET-REFERENCES": asset_id, **poll}
    answer = client.post(f"/v2/nvcf/pexec/functions/{function_id}", {}, with_asset)
    while answer.status == 202:
        request_id = answer.headers["NVCF-REQID"]
        say("pending", f"request {request_id} is {answer.headers.get('NVCF-STATUS', 'accepted')}")
        if time.monotonic() - started_at > RESULT_TIMEOUT_S:
            raise DemoFailed(f"request {request_id} was not answered within {RESULT_TIMEOUT_S:g} s")
        answer = client.get(f"/v2/nvcf/pexec/status/{request_id}", poll)
    elapsed_s = time.monotonic() - started_at
    say("invocation", f"request {answer.headers.get('NVCF-REQID', '')} answered {answer.status}, {elapsed_s:.1f} s")
    return answer.json()


@contextmanager
def server(folder: Path) -> Iterator[Client]:
    """A fresh `fnqueue dev` on a free port; it and its functions are gone when the block ends."""
    port, key = free_port(), f"demo-{secrets.token_hex(16)}"
    log_path = folder / "server.log"
    command = [sys.executable, "-P", "-m", "fnqueue", "dev", "--port", str(port), "--key", key]
    command += ["--data-dir", str(folder / "data")]
    # A session of its own, so that Ctrl-C reaches the server once: through stop().
    with log_path.open("wb") as log:
        child = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)  # noqa: S603 - our own
    try:
        base_url = f"http://127.0.0.1:{port}"
        client = Client(base_url, key)
        wait_for_server(child, client)
        say("server", f"{base_url} is up")
        yield client
        say("server", "stopping")
    except (DemoFailed, OSError, HTTPException, ValueError, KeyError) as error:
        reason = f"the answer lacks {error}" if isinstance(error, KeyError) else error
        raise DemoFailed(f"{reason}\n{tail(log_path)}") from error
    finally:
        stop(child)


def environment() -> dict[str, str]:
    """This one without fnqueue's settings: the demo must not run against somebody's real queue."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FNQUEUE_")}
    return kept | {"FNQUEUE_LOG_FORMAT": "text", "PYTHONUNBUFFERED": "1"}


def wait_for_server(child: "subprocess.Popen[bytes]", client: Client) -> None:
    def healthy() -> bool:
        if child.poll() is not None:
            raise DemoFailed(f"the server ended with {child.returncode} before it was up")
        try:
            return client.get("/health").status == 200
        except (OSError, DemoFailed):
            return False

    wait_until(healthy, START_TIMEOUT_S, f"the server was not up within {START_TIMEOUT_S:g} s")


def stop(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"demo: the server did not stop within {STOP_TIMEOUT_S:g} s, killed", file=sys.stderr)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def wait_until(done: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > give_up_at:
            raise DemoFailed(complaint)
        time.sleep(0.1)


def check_installed() -> None:
    if importlib.util.find_spec("rapidocr") is None:
        raise DemoFailed("the text recognition sample is not installed: pip install 'fnqueue[ocr]'")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()[-15:]
    return "\n".join(f"    server: {line}" for line in lines)


def say(step: str, what: str) -> None:
    print(f"  {step:<11} {what}", flush=True)


def stop_as_interrupted(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
