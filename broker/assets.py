"""Assets: files that a client uploads straight to the blob store and names in its invocations.

An asset is an object under `assets/<account>/<asset id>` and nothing else: it exists once it was uploaded, and it
can be used any number of times until it is deleted (contract/invocation.md §6).
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar
from urllib.parse import quote

from broker.errors import BadRequest, NotFound, PayloadTooLarge
from broker.model import Asset, Blob, Principal
from broker.ports import Broker

T = TypeVar("T")

NO_DESCRIPTION = "Description not available"
NO_CONTENT_TYPE = "application/octet-stream"
LONGEST_CONTENT_TYPE = 255
LARGEST_UPLOAD_BYTES = 5 * 1024**3  # as one PUT to S3
LONGEST_DESCRIPTION = 1024  # S3 keeps 2 KB of metadata an object, names included
LOOKUPS = 16  # asked of the blob store at once, per caller

_NAMESPACE = uuid.UUID("6d1f2f0a-6a3c-5d0e-9b55-0d8f3f3f5a11")
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105  RFC 9110 §5.6.2, not a password
_QUOTED = r'"[ !#-\[\]-~]*"'
_CONTENT_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}( *; *{_TOKEN}=({_TOKEN}|{_QUOTED}))*")
_PRINTABLE = re.compile(r"[ -~]+")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


async def create(
    broker: Broker,
    principal: Principal,
    *,
    content_type: str,
    description: str,
    expires_s: float,
    size_bytes: int | None = None,
    idempotency_key: str = "",
) -> tuple[Asset, str]:
    """A new asset and the URL that takes its bytes in one PUT, exactly `size_bytes` of them where that is given;
    nothing is stored until then.

    The PUT must carry `Content-Type` and `x-amz-meta-nvcf-asset-description` exactly as in the asset returned. The same
    key leads to the same asset of the account, so that a client that crashed while it uploaded names it once more in
    the same request.

    Raises:
        BadRequest: a field is missing or cannot be a header. S3 keeps metadata as ASCII, and clients disagree on
            how to send anything else, so a description beyond printable ASCII is refused rather than garbled.
        PayloadTooLarge: a size above what one PUT may have.
    """
    if size_bytes is not None and size_bytes < 1:
        raise BadRequest("contentLength is what the upload will have in bytes, at least 1", field="contentLength")
    if size_bytes is not None and size_bytes > LARGEST_UPLOAD_BYTES:
        raise PayloadTooLarge(f"an upload may have {LARGEST_UPLOAD_BYTES} bytes", limit_bytes=LARGEST_UPLOAD_BYTES)
    asset = Asset(
        id=str(_named(principal.account, idempotency_key) if idempotency_key else uuid.uuid4()),
        content_type=_content_type(content_type),
        description=_description(description),
        created_at=time.time(),
    )
    url = broker.blobs.upload_url(
        key_of(principal.account, asset.id),
        content_type=asset.content_type,
        description=asset.description,
        expires_s=expires_s,
        size_bytes=size_bytes or 0,
    )
    return asset, url


async def list_assets(broker: Broker, principal: Principal) -> list[Asset]:
    """The caller's uploaded assets. S3 lists no descriptions: there it costs one more look per asset."""
    prefix = _prefix(principal.account)
    listed = [blob for blob in await broker.blobs.list(prefix) if _UUID.fullmatch(blob.key.removeprefix(prefix))]

    async def look(blob: Blob) -> Blob | None:
        return blob if blob.content_type else await broker.blobs.head(blob.key)

    return [_asset(blob) for blob in await _each(look, listed) if blob is not None]


async def get(broker: Broker, principal: Principal, asset_id: str) -> Asset:
    """Raises NotFound (unknown, not uploaded, deleted or foreign), or BadRequest when the id is no UUID."""
    blob = await broker.blobs.head(key_of(principal.account, asset_id))
    if blob is None:
        raise _not_found(asset_id)
    return _asset(blob)


async def delete(broker: Broker, principal: Principal, asset_id: str) -> None:
    """Raises NotFound (unknown, already deleted or foreign), or BadRequest when the id is no UUID."""
    if not await broker.blobs.delete(key_of(principal.account, asset_id)):
        raise _not_found(asset_id)


async def resolve(broker: Broker, account: str, asset_ids: Iterable[str]) -> None:
    """Return if the account has every one of these assets right now.

    Raises:
        NotFound: names the first that is missing or foreign.
        BadRequest: an id is no UUID.
        PayloadTooLarge: together they have more than `max_assets_bytes`.
    """
    keys = {asset_id: key_of(account, asset_id) for asset_id in asset_ids}

    async def look(key: str) -> Blob | None:
        return await broker.blobs.head(key)

    size_bytes, limit_bytes = 0, broker.settings.max_assets_bytes
    for asset_id, blob in zip(keys, await _each(look, keys.values()), strict=True):
        if blob is None:
            raise _not_found(asset_id)
        size_bytes += blob.size_bytes
    if size_bytes > limit_bytes:
        raise PayloadTooLarge(f"the assets have more than {limit_bytes} bytes together", limit_bytes=limit_bytes)


def key_of(account: str, asset_id: str) -> str:
    """Where an asset lies in the blob store. Raises BadRequest when the id is no UUID."""
    return _prefix(account) + _canonical(asset_id)


def _named(account: str, idempotency_key: str) -> uuid.UUID:
    """An ID is no secret: whoever has it still needs a key of the account."""
    return uuid.uuid5(_NAMESPACE, f"{len(account)}:{account}{idempotency_key}")


def _prefix(account: str) -> str:
    """One segment per account and a slash after it, so that `t1` never sees into `t10` nor a name with a slash
    into anything. `=` marks what was encoded: a `%` in a key invites somebody to decode it twice."""
    return f"assets/{quote(account, safe='').replace('.', '%2E').replace('%', '=')}/"


def _canonical(asset_id: str) -> str:
    """`uuid.UUID` alone takes braces, `urn:` and digits of other scripts too."""
    if not _UUID.fullmatch(asset_id):
        raise BadRequest(f"{asset_id[:64]!r} is not an asset ID: a UUID such as {uuid.UUID(int=0)}", field="assetId")
    return str(uuid.UUID(asset_id))


def _content_type(value: str) -> str:
    content_type = value.strip()
    if not content_type:
        raise BadRequest("contentType is missing: say what the asset is, as in image/png", field="contentType")
    if len(content_type) > LONGEST_CONTENT_TYPE or not _CONTENT_TYPE.fullmatch(content_type):
        raise BadRequest(
            f"contentType is type/subtype with optional parameters, in at most {LONGEST_CONTENT_TYPE} ASCII characters",
            field="contentType",
        )
    return content_type


def _description(value: str) -> str:
    description = value.strip()
    if not description:
        raise BadRequest("description is missing: say what the asset shows or holds", field="description")
    if len(description) > LONGEST_DESCRIPTION or not _PRINTABLE.fullmatch(description):
        raise BadRequest(
            f"description is at most {LONGEST_DESCRIPTION} printable ASCII characters: it travels as a header",
            field="description",
        )
    return description


def _asset(blob: Blob) -> Asset:
    return Asset(
        id=blob.key.rpartition("/")[2],
        content_type=blob.content_type or NO_CONTENT_TYPE,
        description=blob.description or NO_DESCRIPTION,
        created_at=blob.modified_at,
    )


def _not_found(asset_id: str) -> NotFound:
    return NotFound(f"NotFound error: failed to find asset {_canonical(asset_id)}")


async def _each(look: Callable[[T], Awaitable[Blob | None]], items: Iterable[T]) -> list[Blob | None]:
    """In parallel, in order; one failure ends the rest and is raised as itself."""
    gate = asyncio.Semaphore(LOOKUPS)

    async def one(item: T) -> Blob | None:
        async with gate:
            return await look(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]
