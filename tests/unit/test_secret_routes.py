"""Secrets and registry credentials over HTTP, in the shapes that clients parse."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr, ValidationError

from api.server import serving
from broker import secrets
from broker.accounts import create_key
from broker.connect import open_broker
from broker.ports import Broker
from broker.settings import ApiSettings
from fnqueue import wire

NVCF = "/v2/nvcf"
KEY = "admin-key"
UNKNOWN = "00000000-0000-4000-8000-000000000000"
ECHO = {"name": "echo", "inferenceUrl": "/", "containerImage": "ghcr.io/acme/echo:1"}
PULL = {
    "registryHostname": "ghcr.io",
    "secret": {"name": "pull", "value": base64.b64encode(b"user:pass").decode()},
    "artifactTypes": ["CONTAINER", "helm"],
    "tags": ["t"],
    "description": "d",
}


class Api:
    def __init__(self, broker: Broker, url: str, session: aiohttp.ClientSession) -> None:
        self.broker = broker
        self._url = url
        self._session = session

    async def call(self, method: str, path: str, data: Any = None, *, key: str = KEY) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.request(method, f"{self._url}{NVCF}{path}", json=data, headers=headers) as response:
            body = await response.read()
            return response.status, json.loads(body) if body else None

    async def create(self, *given: dict[str, Any]) -> tuple[str, str]:
        """Where its secrets are put, and where it is seen."""
        status, body = await self.call("POST", "/functions", ECHO | {"secrets": list(given)})
        assert status == 200, body
        made = body["function"]
        assert "secrets" not in made
        at = f"/functions/{made['id']}/versions/{made['versionId']}"
        return f"/secrets{at}", at


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    settings = ApiSettings(
        port=0, data_dir=tmp_path, admin_key=SecretStr(KEY), encryption_keys=SecretStr(f"k:{'1a' * 32}")
    )
    async with (
        open_broker(settings) as broker,
        serving(broker, settings) as url,
        aiohttp.ClientSession() as session,
    ):
        yield Api(broker, url, session)


async def test_secrets_are_written_and_only_their_names_are_seen(api: Api) -> None:
    put, seen = await api.create({"name": "A", "value": "one"})
    assert await api.call("PUT", put, {"secrets": [{"name": "B", "value": {"k": [1.5, None]}}]}) == (204, None)
    _, body = await api.call("GET", seen)
    assert body["function"]["secrets"] == ["A", "B"]
    for listing in ("/functions", seen.rpartition("/")[0]):
        _, body = await api.call("GET", listing)
        assert "secrets" not in body["functions"][0]
    row = await api.broker.catalog.secrets.get(seen.rpartition("/")[2])
    assert row is not None
    assert json.loads(secrets.reveal(api.broker, row.item)) == {"A": "one", "B": {"k": [1.5, None]}}


@pytest.mark.parametrize(
    ("query", "shown"),
    [("", True), ("?includeSecrets=", True), ("?includeSecrets=TRUE", True), ("?includeSecrets=false", False)],
)
async def test_names_can_be_left_out(api: Api, query: str, shown: bool) -> None:
    _, seen = await api.create({"name": "A", "value": "one"})
    _, body = await api.call("GET", seen + query)
    assert ("secrets" in body["function"]) is shown


async def test_names_are_for_who_may_see_details_and_writing_for_who_may_write(api: Api) -> None:
    put, seen = await api.create({"name": "A", "value": "one"})
    lister, _ = await create_key(api.broker, account="default", scopes=["list_functions"])
    writer, _ = await create_key(api.broker, account="default", scopes=["update_secrets"])
    stranger, _ = await create_key(api.broker, account="stranger")
    _, body = await api.call("GET", seen, key=lister)
    assert "secrets" not in body["function"]
    sent = {"secrets": [{"name": "B", "value": "two"}]}
    assert [(await api.call("PUT", put, sent, key=key))[0] for key in (lister, writer, stranger)] == [403, 204, 404]
    assert (await api.call("GET", seen + "?includeSecrets=perhaps"))[0] == 400
    assert (await api.call("PUT", f"/secrets/functions/x/versions/{UNKNOWN}", sent))[0] == 400


async def test_a_server_without_a_key_says_what_to_set(tmp_path: Path) -> None:
    settings = ApiSettings(port=0, data_dir=tmp_path, admin_key=SecretStr(KEY))
    async with (
        open_broker(settings) as broker,
        serving(broker, settings) as url,
        aiohttp.ClientSession() as session,
    ):
        api = Api(broker, url, session)
        for path, sent in (
            ("/functions", ECHO | {"secrets": [{"name": "A", "value": "one"}]}),
            ("/registry-credentials", PULL),
        ):
            status, problem = await api.call("POST", path, sent)
            assert status == 400
            assert "FNQUEUE_ENCRYPTION_KEYS" in problem["detail"]
        assert (await api.call("GET", "/functions"))[1] == {"functions": []}


@pytest.mark.parametrize("name", ["A", "9", "a.b-c_d", "x" * 48])
@pytest.mark.parametrize("value", ["v", "x" * 32_768, "{}", " ", {}, {"a": {"b": [None, True, "ü"]}}])
def test_good_secrets_are_taken_as_they_are(name: str, value: Any) -> None:
    secret = wire.Secret.model_validate_json(json.dumps({"name": name, "value": value}))
    assert json.loads(secret.value.get_secret_value()) == value


@pytest.mark.parametrize("name", ["", "x" * 49, "_a", "-a", ".a", "a b", "a/b", "ä", "a\n", 1, None])
def test_bad_names_are_refused(name: Any) -> None:
    with pytest.raises(ValidationError):
        wire.Secret.model_validate_json(json.dumps({"name": name, "value": "v"}))


@pytest.mark.parametrize(
    "value", ["", "x" * 32_769, {"k": "x" * 32_768}, ["leak"], 1, True, None, {"leak": float("nan")}, {"leak": 1e999}]
)
def test_bad_values_are_refused_without_an_echo(value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        wire.PutSecrets.model_validate_json(json.dumps({"secrets": [{"name": "A", "value": value}]}))
    assert "leak" not in str(refused.value)
    assert "xxx" not in str(refused.value)


def test_a_secret_shows_nothing_of_itself() -> None:
    asked = wire.PutSecrets.model_validate_json('{"secrets": [{"name": "A", "value": "canary"}]}')
    assert "canary" not in repr(asked) + str(asked) + asked.model_dump_json()


# -- registry credentials ------------------------------------------------------------------------


async def test_a_registry_credential_lives_and_never_shows_its_secret(api: Api) -> None:
    status, body = await api.call("POST", "/registry-credentials", PULL)
    made = body["registryCredential"]
    assert status == 200
    assert {
        name: made[name] for name in made if name not in ("registryCredentialId", "createdAt", "lastUpdatedAt")
    } == {
        "ncaId": "default",
        "registryCredentialName": "pull",
        "registryName": "GitHub",
        "registryHostname": "ghcr.io",
        "artifactTypes": ["CONTAINER", "HELM"],
        "tags": ["t"],
        "description": "d",
        "provisionedBy": "USER",
    }
    one = f"/registry-credentials/{made['registryCredentialId']}"
    assert await api.call("GET", one) == (200, {"registryCredential": made})
    assert await api.call("GET", "/registry-credentials") == (200, {"registryCredentials": [made]})
    assert (await api.call("POST", "/registry-credentials", PULL))[0] == 409
    status, body = await api.call("PATCH", one, {"description": "new"})
    assert (status, body["registryCredential"]["description"]) == (200, "new")
    assert await api.call("DELETE", one) == (204, None)
    assert [(await api.call(method, one))[0] for method in ("GET", "DELETE")] == [404, 404]


async def test_an_accounts_details_list_its_registry_credentials(api: Api) -> None:
    await api.create()
    _, made = await api.call("POST", "/registry-credentials", PULL)
    _, body = await api.call("GET", "/accounts/default")
    assert body["account"]["registryCredentials"] == [made["registryCredential"]]
    stranger, _ = await create_key(api.broker, account="stranger")
    _, body = await api.call("GET", "/accounts/stranger")
    assert body["account"]["registryCredentials"] == []
    assert (await api.call("GET", "/accounts/default", key=stranger))[0] == 403


async def test_the_credentials_of_another_account_are_unknown(api: Api) -> None:
    _, body = await api.call("POST", "/registry-credentials", PULL)
    one = f"/registry-credentials/{body['registryCredential']['registryCredentialId']}"
    stranger, _ = await create_key(api.broker, account="stranger")
    lister, _ = await create_key(api.broker, account="default", scopes=["list_functions"])
    for method, sent in (("GET", None), ("PATCH", {"description": "x"}), ("DELETE", None)):
        assert (await api.call(method, one, sent, key=stranger))[0] == 404
        assert (await api.call(method, one, sent, key=lister))[0] == 403
    assert await api.call("GET", "/registry-credentials", key=stranger) == (200, {"registryCredentials": []})


@pytest.mark.parametrize(
    "change",
    [
        {"registryHostname": "evil.example"},
        {"registryHostname": "ghcr.io/path"},
        {"registryHostname": ""},
        {"artifactTypes": []},
        {"artifactTypes": ["TAPE"]},
        {"artifactTypes": ["MODEL"]},
        {"secret": {"name": "pull", "value": "user:pass"}},
        {"secret": {"name": "no good", "value": PULL["secret"]["value"]}},  # type: ignore[index]  # a mapping
        {"secret": None},
    ],
)
async def test_a_bad_registry_credential_is_refused(api: Api, change: dict[str, Any]) -> None:
    assert (await api.call("POST", "/registry-credentials", PULL | change))[0] == 400


async def test_a_patch_that_changes_nothing_and_an_unknown_filter_are_refused(api: Api) -> None:
    assert (await api.call("PATCH", f"/registry-credentials/{UNKNOWN}", {}))[0] == 400
    assert (await api.call("GET", "/registry-credentials/x"))[0] == 400
    assert (await api.call("GET", "/registry-credentials?artifactType=TAPE"))[0] == 400
    assert (await api.call("GET", "/registry-credentials?artifactType=MODEL,helm&provisionedBy=USER"))[0] == 200


async def test_recognized_registries_are_listed_by_artifact_type(api: Api) -> None:
    status, body = await api.call("GET", "/recognized-registries")
    assert status == 200
    by_type = body["recognizedRegistries"]
    assert set(by_type) == {"CONTAINER", "HELM", "MODEL", "RESOURCE"}
    assert {"name": "NGC", "hostname": "nvcr.io"} in by_type["CONTAINER"]
