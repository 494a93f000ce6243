from __future__ import annotations

import time

import pytest

from broker import accounts
from broker.errors import BadRequest, Forbidden, NotFound, Unauthenticated
from broker.ports import Broker


async def test_a_created_key_authenticates_with_its_account_and_scopes(memory_broker: Broker) -> None:
    token, key = await accounts.create_key(memory_broker, account="acme", scopes=["invoke_function"])
    principal = await accounts.Authenticator(memory_broker).authenticate(token)
    assert (principal.account, principal.subject) == ("acme", key.id)
    accounts.require(principal, "invoke_function")
    with pytest.raises(Forbidden):
        accounts.require(principal, "deploy_function")


async def test_nothing_that_is_stored_or_listed_holds_the_token(memory_broker: Broker) -> None:
    token, _ = await accounts.create_key(memory_broker, account="acme")
    listed = await accounts.list_keys(memory_broker, "acme")
    assert token not in repr(listed)
    assert token.removeprefix("nvapi-")[:20] not in repr(listed)


@pytest.mark.parametrize("token", ["", "nvapi-", "nvapi-unknown", "\x00", "é" * 1000])
async def test_an_unknown_token_is_refused(memory_broker: Broker, token: str) -> None:
    with pytest.raises(Unauthenticated):
        await accounts.Authenticator(memory_broker, admin_key="secret").authenticate(token)


async def test_an_empty_admin_key_admits_nobody(memory_broker: Broker) -> None:
    with pytest.raises(Unauthenticated):
        await accounts.Authenticator(memory_broker, admin_key="").authenticate("")


async def test_the_admin_key_has_every_scope(memory_broker: Broker) -> None:
    authenticator = accounts.Authenticator(memory_broker, admin_key="secret", admin_account="ops")
    principal = await authenticator.authenticate("secret")
    assert (principal.account, principal.scopes) == ("ops", frozenset(accounts.SCOPES))


async def test_an_expired_key_is_refused(memory_broker: Broker) -> None:
    token, _ = await accounts.create_key(memory_broker, account="acme", expires_at=time.time() - 1)
    with pytest.raises(Unauthenticated):
        await accounts.Authenticator(memory_broker).authenticate(token)


async def test_a_deleted_key_is_refused_by_another_replica_at_once(memory_broker: Broker) -> None:
    token, key = await accounts.create_key(memory_broker, account="acme")
    await accounts.delete_key(memory_broker, key.id)
    with pytest.raises(Unauthenticated):
        await accounts.Authenticator(memory_broker).authenticate(token)
    with pytest.raises(NotFound):
        await accounts.delete_key(memory_broker, key.id)


@pytest.mark.parametrize(
    ("account", "scopes"), [("acme", ["fly"]), ("acme", []), ("a/b", ["invoke_function"]), ("", None)]
)
async def test_a_bad_key_request_names_the_field(memory_broker: Broker, account: str, scopes: list[str] | None) -> None:
    with pytest.raises(BadRequest) as refused:
        await accounts.create_key(memory_broker, account=account, scopes=accounts.SCOPES if scopes is None else scopes)
    assert refused.value.field in ("account", "scopes")
