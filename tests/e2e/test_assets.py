"""Assets on both families: uploaded straight to the blob store, read by the function (contract/invocation.md §6)."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import MISFITS, NVCF, UNKNOWN_ID, Mirror, exchange, ordered, production_only, slug
from tests.house import Caller, Reply

ASSETS = f"{NVCF}/assets"
DESCRIPTION = "x-amz-meta-nvcf-asset-description"
REFERENCES = "NVCF-INPUT-ASSET-REFERENCES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An asset that was created, and not yet uploaded."""

    id: str
    url: str
    content_type: str
    description: str

    async def put(self, content: bytes | AsyncIterable[bytes], **changed: str) -> int:
        """The status; `changed` headers are sent in place of the right ones."""
        headers = {"Content-Type": self.content_type, DESCRIPTION: self.description}
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        async with aiohttp.ClientSession() as anybody, anybody.put(self.url, data=content, headers=headers) as response:
            return response.status


async def create(
    caller: Caller, content_type: str = "image/png", description: str = "a  cat; it's 100% ours"
) -> Upload:
    made = await caller.call("POST", ASSETS, data={"contentType": content_type, "description": description})
    assert (made.status, set(made.json)) == (200, {"assetId", "uploadUrl", "contentType", "description"})
    told = made.json
    return Upload(
        id=told["assetId"], url=told["uploadUrl"], content_type=told["contentType"], description=told["description"]
    )


async def uploaded(caller: Caller, content: bytes = b"\x00cat\xff", **about: str) -> Upload:
    made = await create(caller, **about)
    assert await made.put(content) == 200
    return made


async def listed(caller: Caller) -> dict[str, Any]:
    reply = await caller.call("GET", ASSETS)
    assert reply.status == 200
    return {asset["assetId"]: asset for asset in reply.json["assets"]}


async def found(mirror: Mirror, *references: str) -> Reply:
    return await mirror.post(b"{}", {"tell": True}, headers={REFERENCES: ", ".join(references)})


def given(reply: Reply, *expected: tuple[str, bytes]) -> bool:
    """Whether the function found just these files in its asset directory."""
    assert reply.status == 200, reply
    digests = {asset_id: hashlib.sha256(content).hexdigest() for asset_id, content in expected}
    return bool(reply.json["assets"] == digests)


# -- one asset's life --------------------------------------------------------------------------


async def test_an_asset_is_created_uploaded_listed_read_and_deleted(caller: Caller) -> None:
    asset = await create(caller)
    path = f"{ASSETS}/{asset.id}"
    assert asset.id not in await listed(caller)
    assert (await caller.call("GET", path)).status == 404
    assert await asset.put(b"cat") == 200
    got = await caller.call("GET", path.upper().replace(ASSETS.upper(), ASSETS))
    told = got.json["asset"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(told.pop("createdAt"))) < timedelta(minutes=5)
    assert told == {"assetId": asset.id, "contentType": asset.content_type, "description": asset.description}
    assert (await listed(caller))[asset.id]["description"] == asset.description
    gone = await caller.call("DELETE", path)
    assert (gone.status, gone.body) == (204, b"")
    assert asset.id not in await listed(caller)
    for method in ("GET", "DELETE"):
        assert (await caller.call(method, path)).status == 404


async def test_what_is_uploaded_again_replaces_what_was(mirror: Mirror) -> None:
    asset = await uploaded(mirror.caller, b"first")
    assert await asset.put(b"second") == 200
    assert given(await found(mirror, asset.id), (asset.id, b"second"))


# -- in an invocation --------------------------------------------------------------------------


async def test_the_function_finds_the_bytes_of_each_asset_named(mirror: Mirror) -> None:
    large = bytes(range(256)) * 40_000  # more than a body may have
    contents = [b"\x00\xff", large, b""]
    ids = [(await uploaded(mirror.caller, content)).id for content in contents]
    reply = await found(mirror, *ids)
    assert given(reply, *zip(ids, contents, strict=True))
    headers = dict(reply.json["headers"])
    assert headers["NVCF-FUNCTION-ASSET-IDS"] == ",".join(ids)
    assert headers["NVCF-ASSET-DIR"].endswith(f"/{reply.request_id}")
    assert REFERENCES.lower() in {name.lower() for name in headers}


async def test_references_may_repeat_have_blanks_and_be_in_upper_case(mirror: Mirror) -> None:
    first, second = [(await uploaded(mirror.caller, name)).id for name in (b"1", b"2")]
    sent = [*ordered({"tell": True}).items(), (REFERENCES, f" {first.upper()} ,, "), (REFERENCES, f"{second},")]
    reply = await exchange(mirror.caller, "POST", mirror.path, headers=sent, body=b"{}")
    assert given(reply, (first, b"1"), (second, b"2"))
    assert given(await found(mirror))
    assert given(await found(mirror, first, first), (first, b"1"))


async def test_many_requests_share_an_asset(mirror: Mirror) -> None:
    asset = await uploaded(mirror.caller, b"shared" * 100_000)
    replies = await asyncio.gather(*(found(mirror, asset.id) for _ in range(12)))
    assert all(given(reply, (asset.id, b"shared" * 100_000)) for reply in replies)


async def test_an_asset_that_is_not_there_is_404_and_nothing_runs(mirror: Mirror) -> None:
    deleted = await uploaded(mirror.caller)
    await mirror.caller.call("DELETE", f"{ASSETS}/{deleted.id}")
    never_uploaded, there = await create(mirror.caller), await uploaded(mirror.caller)
    for missing in (deleted.id, never_uploaded.id, UNKNOWN_ID):
        reply = await found(mirror, there.id, missing)
        assert (reply.status, slug(reply)) == (404, "not-found")
        assert reply.json["detail"] == f"NotFound error: failed to find asset {missing}"
        assert "NVCF-REQID" not in reply.headers


@pytest.mark.parametrize("references", ["x", "../../etc/passwd", f"{{{UNKNOWN_ID}}}", f"{UNKNOWN_ID};{UNKNOWN_ID}"])
async def test_a_reference_that_is_no_id_is_400(mirror: Mirror, references: str) -> None:
    reply = await mirror.post(headers={REFERENCES: references})
    assert (reply.status, slug(reply)) == (400, "bad-request")
    assert REFERENCES in reply.json["detail"]


# -- what the upload URL is for ----------------------------------------------------------------


async def test_an_upload_without_a_length_is_refused(caller: Caller) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"cat"

    assert await (await create(caller)).put(pieces()) in (400, 411)  # ours, S3's


async def test_an_upload_that_is_not_as_it_was_signed_is_403(caller: Caller) -> None:
    asset = await create(caller)
    assert await asset.put(b"cat", Content_Type="text/html") == 403
    assert await asset.put(b"cat", x_amz_meta_nvcf_asset_description="a dog") == 403
    other = Upload(
        id=asset.id,
        url=asset.url.replace(asset.id, UNKNOWN_ID),
        content_type=asset.content_type,
        description=asset.description,
    )
    assert await other.put(b"cat") == 403
    async with aiohttp.ClientSession() as anybody, anybody.get(asset.url) as read:
        assert read.status == 403
    assert asset.id not in await listed(caller)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, ["contentType", "description"]),
        ({"contentType": "image/png"}, ["description"]),
        ({"contentType": None, "description": "d"}, ["contentType"]),
        ({"contentType": "", "description": "d"}, ["contentType"]),
        ({"contentType": "nonsense", "description": "d"}, ["contentType"]),
        ({"contentType": "image/png\r\nX: y", "description": "d"}, ["contentType"]),
        ({"contentType": 7, "description": ["d"]}, ["contentType", "description"]),
        ({"contentType": "image/png", "description": " "}, ["description"]),
        ({"contentType": "image/png", "description": "a\nb"}, ["description"]),
        ({"contentType": "image/png", "description": "ü"}, ["description"]),
        ({"contentType": "image/png", "description": "d" * 1025}, ["description"]),
        ({"contentType": "image/png", "description": "d", "contentLength": 0}, ["contentLength"]),
        ({"contentType": "image/png", "description": "d", "contentLength": "x"}, ["contentLength"]),
    ],
)
async def test_an_asset_without_a_type_and_a_description_is_400(
    caller: Caller, asked: dict[str, Any], named: list[str]
) -> None:
    reply = await caller.call("POST", ASSETS, data=asked)
    assert (reply.status, slug(reply) in MISFITS) == (400, True)
    assert all(field in reply.json["detail"] for field in named)


# -- whose it is -------------------------------------------------------------------------------


@production_only
async def test_an_asset_is_its_accounts_own(mirror: Mirror, stranger: Caller) -> None:
    asset, nobodys = await uploaded(mirror.caller), str(uuid.uuid4())
    assert asset.id not in await listed(stranger)
    for method in ("GET", "DELETE"):
        seen = [await stranger.call(method, f"{ASSETS}/{each}") for each in (asset.id, nobodys)]
        assert [reply.status for reply in seen] == [404, 404]
        assert seen[0].body.replace(asset.id.encode(), b"") == seen[1].body.replace(nobodys.encode(), b"")
    theirs = await uploaded(stranger)
    foreign = await mirror.post(headers={REFERENCES: theirs.id})
    assert (foreign.status, foreign.json["detail"]) == (404, f"NotFound error: failed to find asset {theirs.id}")
    assert asset.id in await listed(mirror.caller)
