"""The signed URLs of `file://` blobs, which no storage server is there to serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from api.front import Front
from api.problems import BodyTooSlow
from broker.assets import LARGEST_UPLOAD_BYTES
from broker.backends.files import FileBlobs
from broker.errors import BadRequest, NotFound, PayloadTooLarge

DESCRIPTION = "x-amz-meta-nvcf-asset-description"


class BlobRoutes:
    """PUT and GET of one object, for whoever holds a URL that is signed for just that."""

    def __init__(self, front: Front, blobs: FileBlobs) -> None:
        self._blobs = blobs
        self._idle_s = front.settings.body_timeout_s

    async def put(self, request: web.Request) -> web.Response:
        key = request.match_info["key"]
        content_type, description = request.headers.get("Content-Type", ""), request.headers.get(DESCRIPTION, "")
        self._blobs.verify_upload(
            key,
            request.query,
            content_type=content_type,
            description=description,
            size_bytes=request.content_length or 0,
        )
        if request.content_length is None:
            raise BadRequest("an upload tells its length (Content-Length), as S3 wants it", field="Content-Length")
        if request.content_length > LARGEST_UPLOAD_BYTES:
            raise PayloadTooLarge(f"an upload may have {LARGEST_UPLOAD_BYTES} bytes", limit_bytes=LARGEST_UPLOAD_BYTES)
        await self._blobs.receive(
            key,
            self._chunks(request),
            content_type=content_type,
            description=description,
            limit_bytes=LARGEST_UPLOAD_BYTES,
        )
        return web.Response()

    async def get(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        filename = self._blobs.verify_download(key, request.query)
        blob = await self._blobs.head(key)
        if blob is None:
            raise NotFound("there is no such object")
        found = {"Content-Type": blob.content_type, "Content-Disposition": f'attachment; filename="{filename}"'}
        return web.FileResponse(self._blobs.path(key), headers=found)

    async def _chunks(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body as it comes; only a pause that is too long ends it, whatever its length."""
        try:
            while True:
                async with asyncio.timeout(self._idle_s):
                    chunk = await request.content.readany()
                if not chunk:
                    return
                yield chunk
        except TimeoutError:
            raise BodyTooSlow(f"nothing of the body arrived for {self._idle_s:g} s") from None
        except (ClientError, HttpProcessingError, ConnectionError) as exc:
            raise BadRequest("failed to read request body: it ended early or is not well-formed") from exc
