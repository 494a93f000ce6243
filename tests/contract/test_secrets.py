"""Secrets and registry credentials over every store: merged, sealed, rotated, and lost by no race."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from api.commands import secrets as secrets_command
from broker import accounts, functions, registries, secrets
from broker.connect import open_broker
from broker.errors import AlreadyExists, BadRequest, ConfigurationError, NotConfigured, NotFound, StateConflict
from broker.functions import Definition
from broker.keyring import Keyring, Rotation
from broker.model import Deployment, FunctionStatus, Login, Principal, Version
from broker.ports import Broker
from broker.registries import Change, Draft, Registry
from broker.revisions import edit
from broker.secrets import MAX_SECRETS, ORPHAN_S, Plain
from broker.settings import SecretSettings
from infra.local.servers import Redis

OLD, NEW = f"old:{'1a' * 32}", f"new:{'2b' * 32}"
ECHO = Definition(name="echo", inference_url="/echo", container_image="ghcr.io/acme/echo:1")
RACERS = 8
KNOWN = registries.recognized("GitHub=ghcr.io/CONTAINER, Azure=*.azurecr.io, Docker Hub=docker.io", "reg.local:5000")
CANARY = "canary-4f1c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    broker: Broker
    owner: Principal

    async def version(self, *plains: Plain) -> Version:
        return await functions.create(self.broker, self.owner, replace(ECHO, secrets=plains))

    async def put(self, version: Version, *plains: Plain) -> None:
        await secrets.put(self.broker, self.owner, version.function_id, version.id, plains)

    async def turn(self, version: Version, status: FunctionStatus) -> Version:
        turned = await edit(self.broker.catalog.versions, version.id, lambda stored: replace(stored, status=status))
        assert turned is not None
        return turned

    async def revealed(self, version: Version) -> object:
        row = await self.broker.catalog.secrets.get(version.id)
        return None if row is None else json.loads(secrets.reveal(self.broker, row.item))

    async def add(self, draft: Draft) -> str:
        return (await registries.add(self.broker, self.owner, draft, known=KNOWN)).id

    async def may_have(self, credentials: int) -> None:
        limits = accounts.Limits(name=self.owner.account, max_registry_credentials=credentials)
        await accounts.create_account(self.broker, self.owner.account, limits)

    async def change(self, credential_id: str, change: Change) -> None:
        await registries.update(self.broker, self.owner, credential_id, change, known=KNOWN)

    async def password_for(self, image: str) -> str | None:
        login = await registries.credential_for(self.broker, self.owner.account, image)
        return login.password if login else None


def plain(name: str, value: object = "v") -> Plain:
    return Plain(name=name, value=json.dumps(value))


def draft(name: str = "pull", hostname: str = "ghcr.io", password: str = "pass", **more: object) -> Draft:
    secret = base64.b64encode(f"user:{password}".encode()).decode()
    return replace(Draft(name=name, hostname=hostname, artifact_types=("CONTAINER",), secret=secret), **more)  # type: ignore[arg-type]  # the test's word


@pytest.fixture(params=["memory", "redis"])
async def shop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shop]:
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_server").url
    settings = SecretSettings(data_dir=tmp_path, store_url=SecretStr(url), encryption_keys=SecretStr(OLD))
    async with open_broker(settings) as broker:
        yield Shop(broker=broker, owner=Principal(account=uuid.uuid4().hex, subject="me", scopes=frozenset()))


# -- secrets -------------------------------------------------------------------------------------


async def test_secrets_are_merged_by_name_and_never_removed(shop: Shop) -> None:
    version = await shop.version(plain("A", "one"), plain("B", {"deep": [1, "ü"]}))
    await shop.put(version, plain("B", "two"), plain("c.d-e_f", ""), plain("a", "other case"))
    assert await shop.revealed(version) == {"A": "one", "B": "two", "c.d-e_f": "", "a": "other case"}
    assert await secrets.names(shop.broker, version.id) == ["A", "B", "c.d-e_f", "a"]


async def test_a_version_without_secrets_has_no_names(shop: Shop) -> None:
    version = await shop.version()
    assert await secrets.names(shop.broker, version.id) == []
    assert await shop.revealed(version) is None


async def test_first_secrets_wait_for_an_inactive_version_and_later_ones_do_not(shop: Shop) -> None:
    version = await shop.version()
    await shop.turn(version, FunctionStatus.ACTIVE)
    with pytest.raises(StateConflict, match="INACTIVE"):
        await shop.put(version, plain("A"))
    await shop.turn(version, FunctionStatus.INACTIVE)
    await shop.put(version, plain("A"))
    for status in FunctionStatus:
        await shop.turn(version, status)
        await shop.put(version, plain("B", status.value))
    assert await shop.revealed(version) == {"A": "v", "B": list(FunctionStatus)[-1].value}


async def test_empty_lists_duplicates_and_too_many_are_refused(shop: Shop) -> None:
    version = await shop.version(plain("A", "kept"))
    for refused in ([], [plain("B"), plain("B")], [plain(f"N{n}") for n in range(MAX_SECRETS)]):
        with pytest.raises(BadRequest):
            await shop.put(version, *refused)
    assert await shop.revealed(version) == {"A": "kept"}
    with pytest.raises(BadRequest):
        await shop.version(plain("B"), plain("B"))


async def test_only_the_owner_of_the_right_version_writes(shop: Shop) -> None:
    version = await shop.version(plain("A"))
    stranger = replace(shop.owner, account="stranger")
    for principal, function_id, version_id in (
        (stranger, version.function_id, version.id),
        (shop.owner, str(uuid.uuid4()), version.id),
        (shop.owner, version.function_id, str(uuid.uuid4())),
    ):
        with pytest.raises(NotFound):
            await secrets.put(shop.broker, principal, function_id, version_id, [plain("A", "theirs")])
    assert await shop.revealed(version) == {"A": "v"}


async def test_racing_writers_lose_nothing(shop: Shop) -> None:
    for _ in range(5):
        version = await shop.version()
        await asyncio.gather(*(shop.put(version, plain(f"N{n}", n * "x" + ".")) for n in range(RACERS)))
        assert await shop.revealed(version) == {f"N{n}": n * "x" + "." for n in range(RACERS)}


async def test_secrets_go_with_their_version(shop: Shop) -> None:
    version = await shop.version(plain("A"))
    await functions.delete_version(shop.broker, shop.owner, version.function_id, version.id)
    assert await shop.broker.catalog.secrets.get(version.id) is None
    with pytest.raises(NotFound):
        await shop.put(version, plain("B"))


async def test_what_a_crash_left_without_its_version_is_swept_after_an_hour(shop: Shop) -> None:
    version, alive = await shop.version(plain("A")), await shop.version(plain("A"))
    await shop.broker.catalog.versions.delete(version.id)
    await secrets.sweep(shop.broker)
    assert await shop.revealed(version) == {"A": "v"}
    past = time.time() - ORPHAN_S - 1
    for item in (version, alive):
        await edit(shop.broker.catalog.secrets, item.id, lambda stored: replace(stored, updated_at=past))
    assert await secrets.sweep(shop.broker) == 1
    assert await shop.revealed(version) is None
    assert await shop.revealed(alive) == {"A": "v"}


async def test_without_a_key_secrets_are_refused_and_nothing_is_made(shop: Shop) -> None:
    keyless = replace(shop, broker=replace(shop.broker, keyring=Keyring({})))
    with pytest.raises(NotConfigured, match="FNQUEUE_ENCRYPTION_KEYS"):
        await keyless.version(plain("A"))
    with pytest.raises(NotConfigured):
        await keyless.add(draft())
    assert await functions.list_functions(shop.broker, shop.owner) == []
    assert (await keyless.version()).status is FunctionStatus.INACTIVE


async def test_a_value_moved_to_another_name_in_the_store_does_not_open(shop: Shop) -> None:
    version = await shop.version(plain("A", "one"), plain("B", "two"))
    await edit(
        shop.broker.catalog.secrets,
        version.id,
        lambda stored: replace(
            stored,
            secrets=(
                replace(stored.secrets[0], sealed=stored.secrets[1].sealed),
                replace(stored.secrets[1], sealed=stored.secrets[0].sealed),
            ),
        ),
    )
    with pytest.raises(ConfigurationError, match="moved"):
        await shop.revealed(version)


def test_no_plain_value_is_in_a_repr() -> None:
    change = Change(secret=CANARY)
    shown = [plain("A", CANARY), replace(ECHO, secrets=(plain("A", CANARY),)), draft(password=CANARY), change]
    login = Login(hostname="h", username="u", password=CANARY)
    assert CANARY not in repr([*shown, login])
    assert base64.b64encode(f"user:{CANARY}".encode()).decode() not in repr(shown)


# -- rotation ------------------------------------------------------------------------------------


async def test_rotation_reseals_everything_and_may_be_repeated(shop: Shop) -> None:
    version = await shop.version(plain("A", "one"), plain("B", "two"))
    await shop.add(draft(password="three"))
    both = replace(shop, broker=replace(shop.broker, keyring=Keyring.parse(f"{NEW},{OLD}")))
    await both.put(version, plain("C", "new already"))

    async def rotate() -> None:
        await secrets.rotate(both.broker)
        await registries.rotate(both.broker)

    await asyncio.gather(rotate(), both.put(version, plain("D", "meanwhile")), rotate())
    alone = replace(shop, broker=replace(shop.broker, keyring=Keyring.parse(NEW)))
    assert await alone.revealed(version) == {"A": "one", "B": "two", "C": "new already", "D": "meanwhile"}
    assert await alone.password_for("ghcr.io/a/b") == "three"


async def test_one_secret_that_does_not_open_keeps_no_other_from_rotating(shop: Shop) -> None:
    version = await shop.version(plain("A", "one"))
    lost = replace(shop, broker=replace(shop.broker, keyring=Keyring.parse(f"lost:{'3c' * 32}")))
    await lost.put(version, plain("B", "two"))
    counted = await secrets._rotate(replace(shop.broker, keyring=Keyring.parse(f"{NEW},{OLD}")), version.id)
    assert counted == Rotation(resealed=1, unopened=(f"{version.id}/B",))


def test_the_command_rotates_and_tells(redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Principal(account=uuid.uuid4().hex, subject="me", scopes=frozenset())

    def settings(keys: str) -> SecretSettings:
        return SecretSettings(data_dir=tmp_path, store_url=SecretStr(redis_server.url), encryption_keys=SecretStr(keys))

    async def make() -> Version:
        async with open_broker(settings(OLD)) as broker:
            return await functions.create(broker, owner, replace(ECHO, secrets=(plain("A", CANARY),)))

    async def reveal(version: Version) -> bytes:
        async with open_broker(settings(NEW)) as broker:
            row = await broker.catalog.secrets.get(version.id)
            assert row is not None
            return secrets.reveal(broker, row.item)

    version = asyncio.run(make())
    monkeypatch.setenv("FNQUEUE_STORE_URL", redis_server.url)
    monkeypatch.setenv("FNQUEUE_ENCRYPTION_KEYS", f"{NEW},{OLD}")
    done = CliRunner().invoke(secrets_command, ["rotate"])
    assert "sealed again" in done.output
    assert CANARY in asyncio.run(reveal(version)).decode()
    assert CANARY not in done.output
    again = json.loads(CliRunner().invoke(secrets_command, ["rotate", "--json"]).stdout)
    assert again["resealed"] == 0
    # Other tests' secrets are in this Redis, too, under keys that nobody has now.
    assert not [one for one in again["unopened"] if one.startswith(version.id)]
    monkeypatch.setenv("FNQUEUE_ENCRYPTION_KEYS", f"other:{'4d' * 32}")
    failed = CliRunner().invoke(secrets_command, ["rotate"])
    assert failed.exit_code == 1
    assert f"{version.id}/A" in failed.output
    monkeypatch.setenv("FNQUEUE_ENCRYPTION_KEYS", "")
    unset = CliRunner().invoke(secrets_command, ["rotate"])
    assert (unset.exit_code, "FNQUEUE_ENCRYPTION_KEYS is not set" in unset.output) == (2, True)


# -- registry credentials ------------------------------------------------------------------------


async def test_a_credential_pulls_the_images_of_its_host(shop: Shop) -> None:
    await shop.add(draft(password="github"))
    await shop.add(draft(hostname="Index.Docker.io", password="hub:with:colons"))
    await shop.add(draft(hostname="reg.local:5000", password="local"))
    await shop.add(draft(name="models", hostname="x.azurecr.io", artifact_types=("MODEL",)))
    for image, password in {
        "ghcr.io/acme/echo:1": "github",
        "GHCR.io/acme/echo@sha256:00": "github",
        "echo": "hub:with:colons",
        "acme/echo:1": "hub:with:colons",
        "docker.io/library/echo": "hub:with:colons",
        "reg.local:5000/echo": "local",
        "docker://reg.local:5000/echo": "local",
        "reg.local/echo": None,
        "localhost/echo": None,
        "ghcr.io.evil.example/echo": None,
        "x.azurecr.io/echo": None,
    }.items():
        assert await shop.password_for(image) == password, image
    assert await registries.credential_for(shop.broker, "stranger", "ghcr.io/acme/echo") is None


async def test_the_newest_of_several_credentials_is_used(shop: Shop) -> None:
    first = await shop.add(draft(name="a", password="one"))
    await shop.add(draft(name="b", password="two"))
    assert await shop.password_for("ghcr.io/x") == "two"
    await shop.change(first, Change(secret=draft(password="three").secret))
    assert await shop.password_for("ghcr.io/x") == "three"


async def test_unknown_hosts_types_and_secrets_that_are_none_are_refused(shop: Shop) -> None:
    for bad in (
        draft(hostname="ghcr.io.evil.example"),
        draft(hostname="nvcr.io"),
        draft(artifact_types=("MODEL",)),
        *(
            draft(secret=text)
            for text in ("", "dXNlcg==", "OnBhc3M=", "dXNlcjo=", "user:pass", "%%%%", "dXNlcjoA", "ü")
        ),
    ):
        with pytest.raises(BadRequest):
            await shop.add(bad)
    assert await registries.list_credentials(shop.broker, shop.owner) == []


async def test_of_racing_additions_one_name_and_the_limit_win(shop: Shop) -> None:
    same = await asyncio.gather(*(shop.add(draft()) for _ in range(RACERS)), return_exceptions=True)
    assert sum(isinstance(answer, AlreadyExists) for answer in same) == RACERS - 1
    await shop.may_have(3)
    others = (shop.add(draft(name=f"n{n}")) for n in range(RACERS))
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert sum(isinstance(answer, BadRequest) for answer in answers) == RACERS - 2
    assert len(await registries.list_credentials(shop.broker, shop.owner)) == 3


async def test_the_accounts_record_says_how_many_credentials_it_may_have(shop: Shop) -> None:
    await shop.may_have(1)
    await shop.add(draft())
    with pytest.raises(BadRequest, match="may have 1"):
        await shop.add(draft(name="other"))


async def test_credentials_go_with_the_record_of_their_account(shop: Shop) -> None:
    await accounts.create_account(shop.broker, shop.owner.account, accounts.Limits(name=shop.owner.account))
    await shop.add(draft())
    await accounts.delete_account(shop.broker, shop.owner.account)
    assert await registries.list_credentials(shop.broker, shop.owner) == []


async def test_an_update_keeps_what_it_does_not_name(shop: Shop) -> None:
    credential_id = await shop.add(draft(hostname="x.azurecr.io", tags=("t",), description="d"))
    await shop.add(draft(name="taken", hostname="x.azurecr.io"))
    await shop.change(credential_id, Change(artifact_types=("HELM",)))
    seen = await registries.get(shop.broker, shop.owner, credential_id)
    assert (seen.name, seen.tags, seen.description, seen.artifact_types) == ("pull", ("t",), "d", ("CONTAINER", "HELM"))
    with pytest.raises(AlreadyExists):
        await shop.change(credential_id, Change(name="taken"))
    with pytest.raises(NotFound):
        await shop.change(str(uuid.uuid4()), Change(description="x"))


async def test_a_credential_in_use_stays_until_another_one_can_pull(shop: Shop) -> None:
    credential_id = await shop.add(draft())
    version = await shop.version()
    await shop.broker.catalog.deployments.put(
        Deployment(
            id="d",
            function_id=version.function_id,
            version_id=version.id,
            account=shop.owner.account,
            specifications=(),
            created_at=1.0,
            updated_at=1.0,
        )
    )
    with pytest.raises(StateConflict, match=r"ghcr\.io"):
        await registries.delete(shop.broker, shop.owner, credential_id)
    await shop.add(draft(name="other"))
    await registries.delete(shop.broker, shop.owner, credential_id)
    with pytest.raises(NotFound):
        await registries.delete(shop.broker, shop.owner, credential_id)


async def test_filters_keep_what_has_any_of_their_words(shop: Shop) -> None:
    await shop.add(draft(name="a"))
    await shop.add(draft(name="b", hostname="x.azurecr.io", artifact_types=("HELM", "MODEL")))

    async def named(**filters: list[str]) -> list[str]:
        found = await registries.list_credentials(shop.broker, shop.owner, **filters)
        return [credential.name for credential in found]

    assert await named() == ["a", "b"]
    assert await named(artifact_types=["helm", "RESOURCE"]) == ["b"]
    assert await named(provisioned_by=["system"]) == []
    assert await named(provisioned_by=["USER"], artifact_types=["CONTAINER"]) == ["a"]
    with pytest.raises(BadRequest):
        await named(artifact_types=["FLOPPY"])


def test_the_list_of_registries_is_read_from_its_setting() -> None:
    known = registries.recognized("A b=one.example/CONTAINER+helm , c=two.example", "*.three.example")
    assert known == [
        Registry(name="A b", hostname="one.example", artifact_types=("CONTAINER", "HELM")),
        Registry(name="c", hostname="two.example"),
        Registry(name="*.three.example", hostname="*.three.example"),
    ]
    for bad in ("nameless", "=host", "name=", "name=host/TAPE"):
        with pytest.raises(ConfigurationError, match="FNQUEUE_RECOGNIZED_REGISTRIES"):
            registries.recognized(bad, "")
