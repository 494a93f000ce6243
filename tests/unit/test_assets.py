"""Assets: what is accepted as one, and that nobody sees anybody else's."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from broker import assets
from broker.backends import files
from broker.errors import BadRequest, NotFound, PayloadTooLarge
from broker.keyring import Keyring
from broker.model import Principal
from broker.ports import Broker, Catalog, Counters, DeadLetters, InstanceLogs, Queue, Results, Streams, Upkeep, Webhooks
from broker.settings import MIB, Settings, load

HOUR_S = 3600.0
OURS = Principal(account="t1", subject="me", scopes=frozenset())
THEIRS = Principal(account="t10", subject="them", scopes=frozenset())


class Untouched:
    """Stands for the ports that no asset needs."""


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    settings = load(Settings, data_dir=tmp_path)
    async with files.open_blobs("file://", settings) as blobs:
        blobs.set_base_url("http://fnqueue.invalid")
        nothing = Untouched()
        yield Broker(
            queue=cast(Queue, nothing),
            results=cast(Results, nothing),
            streams=cast(Streams, nothing),
            catalog=cast(Catalog, nothing),
            counters=cast(Counters, nothing),
            upkeep=cast(Upkeep, nothing),
            dead_letters=cast(DeadLetters, nothing),
            webhooks=cast(Webhooks, nothing),
            instance_logs=cast(InstanceLogs, nothing),
            blobs=blobs,
            settings=settings,
            keyring=Keyring({}),
        )


async def uploaded(broker: Broker, principal: Principal) -> str:
    """The ID of a new asset, its bytes included."""
    asset, _ = await assets.create(broker, principal, content_type="image/png", description="A cat", expires_s=HOUR_S)
    await broker.blobs.put(assets.key_of(principal.account, asset.id), b"meow", content_type="image/png")
    return asset.id


# -- create ------------------------------------------------------------------------------------


async def test_a_new_asset_has_a_fresh_id_and_a_url_for_its_key(broker: Broker) -> None:
    asset, url = await assets.create(broker, OURS, content_type=" image/png ", description=" A cat ", expires_s=HOUR_S)
    assert asset.id == str(uuid.UUID(asset.id))
    assert (asset.content_type, asset.description) == ("image/png", "A cat")
    assert url.startswith(f"http://fnqueue.invalid/v2/nvcf/blobs/assets/t1/{asset.id}?")


async def test_the_same_key_leads_to_the_same_asset_of_the_same_account(broker: Broker) -> None:
    async def made(principal: Principal, key: str) -> str:
        asset, url = await assets.create(
            broker, principal, content_type="a/b", description="d", expires_s=HOUR_S, idempotency_key=key
        )
        assert asset.id in url
        return asset.id

    first, again = await made(OURS, "order-17"), await made(OURS, "order-17")
    assert first == again == str(uuid.UUID(first))
    # Accounts t1 and t10: neither a foreign one nor one whose name and key read alike.
    others = {await made(OURS, "order-18"), await made(THEIRS, "order-17"), await made(OURS, "0order-17")}
    assert len(others | {first}) == 4


async def test_nothing_is_stored_until_the_upload(broker: Broker) -> None:
    asset, _ = await assets.create(broker, OURS, content_type="image/png", description="A cat", expires_s=HOUR_S)
    assert await assets.list_assets(broker, OURS) == []
    with pytest.raises(NotFound):
        await assets.get(broker, OURS, asset.id)


@pytest.mark.parametrize(
    "content_type",
    [
        "image/png",
        "application/vnd.api+json",
        "text/plain; charset=utf-8",
        'multipart/mixed;boundary="a b;c"; x=1',
        "application/octet-stream",
    ],
)
async def test_a_content_type_may_carry_parameters(broker: Broker, content_type: str) -> None:
    asset, _ = await assets.create(broker, OURS, content_type=content_type, description="x", expires_s=HOUR_S)
    assert asset.content_type == content_type


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "  ",
        "image",
        "image/",
        "/png",
        "image/png/x",
        "image /png",
        "image/png;",
        "image/png; charset",
        "image/png\r\nX-Injected: 1",
        "image/png\n",
        "image/png; a=\x00",
        "imäge/png",
        "image/png; name=ü",
        'text/plain; a="\\"',
        f"image/{'x' * 250}",
    ],
)
async def test_a_content_type_that_is_none_is_refused(broker: Broker, content_type: str) -> None:
    if content_type.endswith("\n"):  # outer space is forgiven, a line within is not
        content_type += "x"
    with pytest.raises(BadRequest) as refusal:
        await assets.create(broker, OURS, content_type=content_type, description="x", expires_s=HOUR_S)
    assert refusal.value.field == "contentType"


@pytest.mark.parametrize(
    "description",
    ["", " \t ", "a\r\nX-Injected: 1", "a\nb", "a\x00b", "a\x7fb", "a\tb", "Katze mit Öhrchen", "\u2028", "x" * 1025],
)
async def test_a_description_that_cannot_be_a_header_is_refused(broker: Broker, description: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        await assets.create(broker, OURS, content_type="image/png", description=description, expires_s=HOUR_S)
    assert refusal.value.field == "description"


async def test_the_longest_description_is_accepted(broker: Broker) -> None:
    asset, _ = await assets.create(broker, OURS, content_type="image/png", description="x" * 1024, expires_s=HOUR_S)
    assert len(asset.description) == 1024


# -- get, list, delete -------------------------------------------------------------------------


async def test_an_uploaded_asset_is_shown(broker: Broker) -> None:
    asset_id = await uploaded(broker, OURS)
    asset = await assets.get(broker, OURS, asset_id)
    assert (asset.id, asset.content_type) == (asset_id, "image/png")
    assert asset.created_at > 0
    assert await assets.list_assets(broker, OURS) == [asset]


async def test_a_lost_description_has_a_stand_in(broker: Broker) -> None:
    asset = await assets.get(broker, OURS, await uploaded(broker, OURS))
    assert asset.description == "Description not available"


async def test_an_asset_is_deleted_once(broker: Broker) -> None:
    asset_id = await uploaded(broker, OURS)
    await assets.delete(broker, OURS, asset_id)
    for verb in (assets.get, assets.delete):
        with pytest.raises(NotFound):
            await verb(broker, OURS, asset_id)


async def test_an_id_in_upper_case_is_the_same_asset(broker: Broker) -> None:
    asset_id = await uploaded(broker, OURS)
    assert (await assets.get(broker, OURS, asset_id.upper())).id == asset_id


@pytest.mark.parametrize(
    "asset_id",
    [
        "",
        "x",
        "../t2/6d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e",
        "%2e%2e/6d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e",
        "6d1f3c3e1b584a3e9a520c0a4c1b2d3e",
        "{6d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e}",
        "urn:uuid:6d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e",
        "6d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e\n",
        "\u0666d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e",
        "6d1f3c3e-1b58-4a3e-9a52-0c0a4c1b2d3e/x",
    ],
)
async def test_an_id_that_is_no_uuid_is_refused(broker: Broker, asset_id: str) -> None:
    for verb in (assets.get, assets.delete):
        with pytest.raises(BadRequest):
            await verb(broker, OURS, asset_id)
    with pytest.raises(BadRequest):
        await assets.resolve(broker, "t1", [asset_id])


# -- isolation ---------------------------------------------------------------------------------


async def test_a_foreign_asset_is_as_unknown_as_a_random_one(broker: Broker) -> None:
    foreign, random = await uploaded(broker, THEIRS), str(uuid.uuid4())
    for verb in (assets.get, assets.delete):
        said = []
        for asset_id in (foreign, random):
            with pytest.raises(NotFound) as refusal:
                await verb(broker, OURS, asset_id)
            said.append(str(refusal.value).replace(asset_id, "<id>"))
        assert said[0] == said[1]
    assert (await assets.get(broker, THEIRS, foreign)).id == foreign


async def test_one_account_name_within_another_sees_nothing(broker: Broker) -> None:
    ours, theirs = await uploaded(broker, OURS), await uploaded(broker, THEIRS)
    assert [asset.id for asset in await assets.list_assets(broker, OURS)] == [ours]
    assert [asset.id for asset in await assets.list_assets(broker, THEIRS)] == [theirs]


@pytest.mark.parametrize("account", ["t1/x", "..", ".", "../t1", "t1%2Fx", "t1=2Fx", "a b", "ü", "t.1", "\x00"])
async def test_an_odd_account_name_stays_in_its_own_folder(broker: Broker, account: str) -> None:
    odd = Principal(account=account, subject="odd", scopes=frozenset())
    ours, theirs = await uploaded(broker, OURS), await uploaded(broker, odd)
    assert [asset.id for asset in await assets.list_assets(broker, odd)] == [theirs]
    assert [asset.id for asset in await assets.list_assets(broker, OURS)] == [ours]


def test_no_two_accounts_share_a_key() -> None:
    accounts = ["t1", "t10", "t1/", "t1%2F", "t1=2F", "T1", "t1.", "t1=2E", ".", "=2E", ""]
    asset_id = str(uuid.uuid4())
    assert len({assets.key_of(account, asset_id) for account in accounts}) == len(accounts)


@pytest.mark.parametrize("size_bytes", [-1, 0, assets.LARGEST_UPLOAD_BYTES + 1])
async def test_a_size_that_no_upload_has_is_refused(broker: Broker, size_bytes: int) -> None:
    with pytest.raises(BadRequest) as refusal:
        await assets.create(
            broker, OURS, content_type="image/png", description="A cat", expires_s=HOUR_S, size_bytes=size_bytes
        )
    assert isinstance(refusal.value, PayloadTooLarge) == (size_bytes > 0)


# -- resolve -----------------------------------------------------------------------------------


async def test_assets_of_the_account_resolve(broker: Broker) -> None:
    asset_ids = [await uploaded(broker, OURS) for _ in range(40)]
    await assets.resolve(broker, "t1", [*asset_ids, asset_ids[0], asset_ids[1].upper()])
    await assets.resolve(broker, "t1", [])


async def test_the_first_that_is_missing_is_named(broker: Broker) -> None:
    known, foreign, random = await uploaded(broker, OURS), await uploaded(broker, THEIRS), str(uuid.uuid4())
    for missing in (foreign, random):
        with pytest.raises(NotFound) as refusal:
            await assets.resolve(broker, "t1", [known, missing.upper(), str(uuid.uuid4())])
        assert str(refusal.value) == f"NotFound error: failed to find asset {missing}"


async def test_assets_that_are_too_large_together_are_refused(broker: Broker) -> None:
    limited = replace(broker, settings=load(Settings, data_dir=broker.settings.data_dir, max_assets_bytes=MIB))
    asset_ids = [await uploaded(broker, OURS) for _ in range(2)]
    for asset_id, size_bytes in zip(asset_ids, (MIB - 4, 5), strict=True):
        await broker.blobs.put(assets.key_of("t1", asset_id), bytes(size_bytes), content_type="image/png")
    await assets.resolve(limited, "t1", asset_ids[:1] * 3)
    with pytest.raises(PayloadTooLarge) as refusal:
        await assets.resolve(limited, "t1", asset_ids)
    assert refusal.value.limit_bytes == MIB
