"""Assets (contract/invocation.md §6): named here, uploaded straight to the blob store."""

from __future__ import annotations

from aiohttp import web

from api import headers, payloads
from api.definitions import instant
from api.front import Front
from broker import assets
from broker.model import Asset, Principal
from fnqueue import wire


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    idempotency_key = headers.idempotency_key(request.headers)
    asked = await payloads.read(front, request, wire.CreateAsset)
    asset, url = await assets.create(
        front.broker,
        principal,
        content_type=asked.content_type,
        description=asked.description,
        expires_s=front.settings.asset_url_ttl_s,
        size_bytes=asked.content_length,
        idempotency_key=idempotency_key,
    )
    upload = wire.AssetUpload(
        asset_id=asset.id, upload_url=url, content_type=asset.content_type, description=asset.description
    )
    return payloads.answer(upload)


async def list_assets(front: Front, request: web.Request, principal: Principal) -> web.Response:
    found = await assets.list_assets(front.broker, principal)
    return payloads.answer(wire.AssetList(assets=[_present(asset) for asset in found]))


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    asset = await assets.get(front.broker, principal, _id(request))
    return payloads.answer(wire.AssetAnswer(asset=_present(asset)))


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    await assets.delete(front.broker, principal, _id(request))
    return web.Response(status=204)


def _id(request: web.Request) -> str:
    return headers.uuid(request.match_info["asset_id"], field="assetId")


def _present(asset: Asset) -> wire.Asset:
    return wire.Asset(
        asset_id=asset.id,
        content_type=asset.content_type,
        description=asset.description,
        created_at=instant(asset.created_at),
    )
