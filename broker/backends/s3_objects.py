"""Objects of S3, or parts of them, one at a time: what every request with a large body or result needs.

botocore signs them and sends them over the client's own connections. What it does around that for any operation of any
service of AWS takes as much CPU again as the transfer of 1 MiB. What does not go well the first time is left to it:
retries, other regions, what an error means.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote

from botocore.auth import UNSIGNED_PAYLOAD, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ReadTimeoutError
from botocore.httpsession import URLLib3Session
from urllib3.exceptions import HTTPError, IncompleteRead
from urllib3.exceptions import ReadTimeoutError as BodyTimeoutError
from urllib3.response import HTTPResponse

from broker.errors import NotFound, PayloadTooLarge

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SHA256 = "sha256"  # of the body, in a request's context
_REFUSAL_BYTES = 64 * 1024
_PIECE_BYTES = 256 * 1024


class Objects:
    """Of one bucket. For threads. What a verb has not done is to be done by boto3.

    All raise BotoCoreError or urllib3's HTTPError: the server took too long.
    """

    def __init__(self, client: S3Client, credentials: Credentials | None, bucket: str) -> None:
        self._credentials = credentials
        self._region = client.meta.region_name
        self._prefix = f"{client.meta.endpoint_url}/{bucket}/"
        # It knows proxies, certificates and time-outs. There is no public name for it; the contract suite notices when
        # it is gone.
        self._http = cast("URLLib3Session", cast("Any", client)._endpoint.http_session)

    def put(self, key: str, body: bytes, *, content_type: str, sha256: str) -> bool:
        """Whether it was done. The server compares the body with its `sha256`, in hex."""
        return self._ask("PUT", _path(key), {"Content-Type": content_type}, body, sha256).status == 200

    def put_file(self, key: str, path: Path, *, content_type: str) -> bool:
        """Whether it was done. Raises OSError."""
        return self._send(_path(key), path, {"Content-Type": content_type}).status == 200

    def put_part(self, key: str, path: Path, *, upload_id: str, number: int) -> str:
        """The part's ETag, "" if it was not done. Raises OSError."""
        sent = self._send(f"{_path(key)}?partNumber={number}&uploadId={quote(upload_id, safe='')}", path, {})
        return sent.etag if sent.status == 200 else ""

    def get(self, key: str, *, limit_bytes: int) -> bytes | None:
        """None if it was not done. Raises NotFound, or PayloadTooLarge past the limit."""
        got = self._ask("GET", _path(key), {}, limit_bytes=limit_bytes)
        if got.status == 404:
            raise NotFound("there is no such object")
        return got.body if got.status == 200 else None

    def delete(self, key: str) -> bool:
        """Whether it was done."""
        return self._ask("DELETE", _path(key), {}).status == 204

    def _send(self, target: str, path: Path, headers: dict[str, str]) -> _Reply:
        """The content of a file. Its digest is not signed: it would take as long as to send it, TLS protects it, and
        without TLS nothing protects it from there on."""
        with path.open("rb") as file:
            pieces = iter(lambda: file.read(_PIECE_BYTES), b"")
            headers["Content-Length"] = str(os.fstat(file.fileno()).st_size)
            return self._ask("PUT", target, headers, pieces)

    def _ask(
        self,
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes | Iterator[bytes] = b"",
        sha256: str = UNSIGNED_PAYLOAD,
        *,
        limit_bytes: int | None = None,
    ) -> _Reply:
        request = AWSRequest(method=method, url=self._prefix + target, data=body, headers=headers, stream_output=True)
        request.context[_SHA256] = sha256
        try:
            self._signer().add_auth(request)
            with contextlib.closing(self._http.send(request.prepare()).raw) as response:
                return _Reply(
                    status=response.status,
                    body=_read(response, limit_bytes),
                    etag=response.headers.get("ETag", ""),
                )
        except (ReadTimeoutError, BodyTimeoutError):
            raise
        except (BotoCoreError, HTTPError, KeyError, ValueError):
            return _NO_REPLY

    def _signer(self) -> _Signer:
        """Credentials that expire are replaced in between, but not while one request is signed."""
        frozen = self._credentials and self._credentials.get_frozen_credentials()
        return _Signer(cast("Any", frozen), "s3", self._region)


class _Reply(NamedTuple):
    """`body` of a 200, if that has a limit."""

    status: int
    body: bytes = b""
    etag: str = ""


# None came, or not a whole one.
_NO_REPLY = _Reply(0)


class _Signer(S3SigV4Auth):
    def payload(self, request: AWSRequest) -> str:
        """Worked out already, where it is wanted."""
        return str(request.context[_SHA256])


def _path(key: str) -> str:
    return quote(key, safe="/~")


def _read(response: HTTPResponse, limit_bytes: int | None) -> bytes:
    """All of it, since only then is the connection good for another request; what refuses is told by boto3.

    Raises HTTPError, PayloadTooLarge.
    """
    if response.status != 200 or limit_bytes is None:
        response.read(_REFUSAL_BYTES)
        return b""
    size_bytes = int(response.headers["Content-Length"])
    if size_bytes > limit_bytes:
        raise PayloadTooLarge(f"the object is larger than {limit_bytes} bytes", limit_bytes=limit_bytes)
    body = response.read()
    if len(body) < size_bytes:
        raise IncompleteRead(len(body), size_bytes - len(body))
    return body
