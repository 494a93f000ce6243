"""What is taken away from a key or an account is felt by every replica within two seconds, on the real store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker import accounts, authorizations, functions
from broker.accounts import Authenticator
from broker.connect import open_broker
from broker.errors import FnqueueError, NotFound, Unauthenticated
from broker.functions import CallableVersions, Definition
from broker.model import FunctionStatus, Key, Principal, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.settings import Settings
from fnqueue.cli import main
from infra.local.servers import Redis
from tests.eventually import eventually

WITHIN_S = 5.0


@pytest.fixture
async def replicas(redis_server: Redis, tmp_path: Path) -> AsyncIterator[tuple[Broker, Broker]]:
    settings = Settings(store_url=redis_server.url, data_dir=tmp_path, secret_key=SecretStr("s" * 32))
    async with open_broker(settings) as first, open_broker(settings) as second:
        yield first, second


async def known(authenticators: tuple[Authenticator, Authenticator], token: str) -> list[Principal | None]:
    found: list[Principal | None] = []
    for authenticator in authenticators:
        try:
            found.append(await authenticator.authenticate(token))
        except Unauthenticated:
            found.append(None)
    return found


async def test_a_deleted_key_is_refused_everywhere(replicas: tuple[Broker, Broker]) -> None:
    first, second = replicas
    authenticators = (Authenticator(first), Authenticator(second))
    token, key = await accounts.create_key(first, account=uuid.uuid4().hex)
    assert None not in await known(authenticators, token)
    await accounts.delete_key(second, key.id, account=key.account)
    await eventually(lambda: known(authenticators, token), lambda seen: seen == [None, None], within_s=WITHIN_S)


async def test_a_suspended_key_is_refused_everywhere_and_comes_back(replicas: tuple[Broker, Broker]) -> None:
    first, second = replicas
    authenticators = (Authenticator(first), Authenticator(second))
    token, key = await accounts.create_key(first, account=uuid.uuid4().hex)
    assert None not in await known(authenticators, token)
    await accounts.suspend_key(second, key.id, suspended=True, account=key.account)
    await eventually(lambda: known(authenticators, token), lambda seen: seen == [None, None], within_s=WITHIN_S)
    await accounts.suspend_key(first, key.id, suspended=False, account=key.account)
    await eventually(lambda: known(authenticators, token), lambda seen: None not in seen, within_s=WITHIN_S)


@pytest.mark.parametrize("way", ["suspended", "deleted", "left without rights"])
async def test_a_delegated_token_ends_everywhere_with_its_key(replicas: tuple[Broker, Broker], way: str) -> None:
    first, second = replicas
    authenticators = (Authenticator(first), Authenticator(second))
    key_text, key = await accounts.create_key(first, account=uuid.uuid4().hex)
    token, _ = await authenticators[0].delegate(key_text, client_id="c", functions=["function/f/*"], ttl_s=60)
    assert [seen and seen.subject for seen in await known(authenticators, token)] == [f"{key.id}/c"] * 2
    if way == "suspended":
        await accounts.suspend_key(second, key.id, suspended=True, account=key.account)
    elif way == "deleted":
        await accounts.delete_key(second, key.id, account=key.account)
    else:
        await accounts.authorize_key(second, key, scopes=["queue_details"], resources=key.resources)

    def ended(seen: list[Principal | None]) -> bool:
        return all(each is None or not each.scopes for each in seen)

    await eventually(lambda: known(authenticators, token), ended, within_s=WITHIN_S)


async def test_changed_scopes_and_resources_hold_everywhere(replicas: tuple[Broker, Broker]) -> None:
    first, second = replicas
    authenticators = (Authenticator(first), Authenticator(second))
    token, key = await accounts.create_key(first, account=uuid.uuid4().hex)
    assert None not in await known(authenticators, token)
    await accounts.authorize_key(second, key, scopes=["queue_details"], resources=[])

    def changed(seen: list[Principal | None]) -> bool:
        return all(one is not None and one.scopes == {"queue_details"} and not one.resources for one in seen)

    await eventually(lambda: known(authenticators, token), changed, within_s=WITHIN_S)


async def test_who_it_is_no_longer_shared_with_cannot_invoke_anywhere(replicas: tuple[Broker, Broker]) -> None:
    first, second = replicas
    owner = Principal(account=uuid.uuid4().hex, subject="o", scopes=frozenset())
    partner = Principal(account=uuid.uuid4().hex, subject="p", scopes=frozenset())
    await accounts.create_key(first, account=partner.account)
    definition = Definition(name="f", inference_url="/", container_image="i")
    version = await functions.create(first, owner, definition)

    def activate(stored: Version) -> Version:
        return replace(stored, status=FunctionStatus.ACTIVE)

    await edit(first.catalog.versions, version.id, activate)
    await authorizations.replace_all(first, owner, version.function_id, "", [partner.account])
    callables = (CallableVersions(first), CallableVersions(second))
    for each in callables:
        assert (await each.pick(partner, version.function_id)).id == version.id
    assert [v.id for v in await functions.list_functions(second, partner)] == [version.id]
    await authorizations.remove(second, owner, version.function_id, "", partner.account)

    async def refusals() -> int:
        refused = 0
        for each in callables:
            try:
                await each.pick(partner, version.function_id)
            except NotFound:
                refused += 1
        return refused

    await eventually(refusals, lambda seen: seen == 2)
    assert await functions.list_functions(second, partner) == []


async def test_two_replicas_never_exceed_an_owners_keys(replicas: tuple[Broker, Broker]) -> None:
    account = uuid.uuid4().hex
    made: list[tuple[str, Key] | BaseException] = await asyncio.gather(
        *(accounts.create_key(broker, account=account, owner="o", limit=3) for broker in replicas * 5),
        return_exceptions=True,
    )
    assert sum(not isinstance(each, FnqueueError) for each in made) == 3
    assert len(await accounts.list_keys(replicas[0], account)) == 3


async def test_two_replicas_add_parties_at_once_and_lose_none(replicas: tuple[Broker, Broker]) -> None:
    first, second = replicas
    owner = Principal(account=uuid.uuid4().hex, subject="o", scopes=frozenset())
    parties = [uuid.uuid4().hex for _ in range(6)]
    for party in parties:
        await accounts.create_key(first, account=party)
    version = await functions.create(first, owner, Definition(name="f", inference_url="/", container_image="i"))
    await authorizations.replace_all(first, owner, version.function_id, "", parties[:1])
    await asyncio.gather(
        *(
            authorizations.add(broker, owner, version.function_id, "", party)
            for broker, party in zip((first, second) * 3, parties[1:], strict=False)
        )
    )
    [(_, listed)] = await authorizations.get(second, owner, version.function_id)
    assert set(listed) == set(parties)


async def test_the_commands_make_suspend_and_list_keys(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FNQUEUE_STORE_URL", redis_server.url)
    account = uuid.uuid4().hex

    async def run(*words: str) -> tuple[int, str]:
        code = await asyncio.to_thread(main, ["keys", *words])
        return code, capsys.readouterr().out.strip()

    made = ("create", "--account", account, "--resource", "authorized-functions/*", "--expires-in", "12h")
    code, token = await run(*made, "--scope", "invoke_function")
    assert (code, token[:6]) == (0, "nvapi-")
    _, listed = await run("list", "--account", account)
    key_id, _, _, status, *_, resources = listed.splitlines()[1].split()
    assert (status, resources) == ("ACTIVE", "authorized-functions/*")
    assert (await run("suspend", key_id))[0] == 0
    assert "SUSPENDED" in (await run("list", "--account", account))[1]
    assert (await run("activate", key_id))[0] == 0
    assert "ACTIVE" in (await run("list", "--account", account))[1]
    assert (await run("create", "--account", account, "--expires-in", "366d"))[0] == 2
    assert (await run("create", "--account", account, "--resource", "everything"))[0] == 2
