"""Assets (contract/invocation.md §6)."""

from __future__ import annotations

from datetime import datetime

from fnqueue.wire.fields import Wire


class CreateAsset(Wire):
    """Body of `POST /assets`; what makes a good value is the server's to say."""

    content_type: str
    description: str
    content_length: int | None = None
    """Bytes that the upload will have. Ours: the URL takes no other size then."""


class AssetUpload(Wire):
    """PUT the bytes to `upload_url` with `Content-Type` and `x-amz-meta-nvcf-asset-description` as they are here."""

    asset_id: str
    upload_url: str
    content_type: str
    description: str


class Asset(Wire):
    asset_id: str
    content_type: str | None = None
    description: str | None = None
    created_at: datetime | None = None


class AssetAnswer(Wire):
    asset: Asset


class AssetList(Wire):
    assets: list[Asset]
