"""`fnqueue keys` by HTTP, on a front end. What it does in a store is in tests/contract/test_revocation.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner, Result

from broker.accounts import create_key
from fnqueue.cli import cli
from tests.unit.test_server import KEY, NVCF, House, opened

NOBODYS = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


async def keys(house: House, *words: str, key: str = KEY, **more: str | None) -> Result:
    environment = {"FNQUEUE_URL": house.url, "FNQUEUE_API_KEY": key, "FNQUEUE_STORE_URL": None, **more}
    return await asyncio.to_thread(CliRunner(env=environment).invoke, cli, ["keys", *words])


async def told(house: House, *words: str) -> Any:
    done = await keys(house, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def works(house: House, token: str) -> int:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as client,
        client.get(f"{house.url}{NVCF}/functions") as response,
    ):
        return response.status


async def test_the_life_of_a_key(house: House) -> None:
    words = ("--scope", "list_functions", "--resource", "authorized-functions/*", "--owner", "ann")
    made = await keys(house, "create", *words, "--description", "for ann", "--expires-in", "12h")
    assert made.exit_code == 0, made.output
    token, key_id = made.stdout.strip(), made.stderr.split()[1].rstrip(",")
    assert made.stderr == f"id {key_id}, account default, scopes list_functions\n"
    assert await works(house, token) == 200

    detail = await told(house, "show", key_id)
    assert detail["owner_id"] == "ann"
    told_of = [key_id, "default", f"nvapi-{'*' * 8}{token[-3:]}", "ACTIVE", detail["expires_at"][:10], "for ann"]
    shown = [line.split(maxsplit=1) for line in (await keys(house, "show", key_id)).stdout.splitlines()]
    assert [word for _, word in shown] == [*told_of, "list_functions", "authorized-functions/*"]
    heads, *rows = [re.split(" {2,}", line) for line in (await keys(house, "list")).stdout.splitlines()]
    assert heads == [name.upper() for name, _ in shown]
    assert rows == [[*told_of, "-", "-"]]

    assert (await told(house, "suspend", key_id))["status"] == "SUSPENDED"
    assert (await told(house, "activate", key_id))["status"] == "ACTIVE"
    assert await told(house, "delete", key_id) == {"deleted": [key_id]}
    assert await told(house, "list") == {"keys": []}
    assert (await keys(house, "delete", key_id)).exit_code == 1


async def test_a_key_is_for_the_account_of_who_makes_it_or_for_another(house: House) -> None:
    own = await told(house, "create")
    assert (own["nca_id"], await works(house, own["value"])) == ("default", 200)
    other = await told(house, "create", "--account", "acme")
    assert [each["id"] for each in (await told(house, "list", "--account", "acme"))["keys"]] == [other["id"]]
    assert [each["id"] for each in (await told(house, "list"))["keys"]] == [own["id"]]


async def test_scripts_can_tell_refusals_apart(house: House) -> None:
    token, _ = await create_key(house.broker, account="acme", scopes=["manage_keys", "list_functions"])
    for words in (("show", NOBODYS), ("list", "--account", "default"), ("create", "--scope", "invoke_function")):
        done = await keys(house, *words, key=token)
        assert (done.exit_code, done.stdout) == (1, ""), words
        assert done.stderr.count("\n") == 1
    for words in (("create", "--resource", "everything"), ("create", "--expires-in", "366d"), ("show", "no-id")):
        assert (await keys(house, *words)).exit_code == 2, words
    no_scope, _ = await create_key(house.broker, account="acme", scopes=["list_functions"])
    assert "manage_keys" in (await keys(house, "list", key=no_scope)).stderr


async def test_a_store_that_is_set_is_meant_unless_a_url_is_typed(house: House) -> None:
    done = await keys(house, "list", FNQUEUE_STORE_URL="memory://")
    assert done.exit_code == 2
    assert "FNQUEUE_STORE_URL is memory://" in done.stderr
    assert (await keys(house, "list", "--url", house.url, FNQUEUE_STORE_URL="memory://")).exit_code == 0


async def test_with_neither_both_are_named(house: House, tmp_path: Path) -> None:
    unset = dict.fromkeys(("FNQUEUE_ADMIN_KEY", "FNQUEUE_KEY", "FNQUEUE_CONFIG"))
    done = await keys(house, "list", key="", XDG_CONFIG_HOME=str(tmp_path), **unset)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "FNQUEUE_API_KEY" in done.stderr
    assert "FNQUEUE_STORE_URL" in done.stderr
