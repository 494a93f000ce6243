"""Large bytes in an S3 bucket: AWS, MinIO, Ceph, rclone and their like.

URL: `s3://ACCESS:SECRET@host:port/bucket?tls=false&region=us-east-1&public_endpoint=http://…`. Percent-encode what
is special in a URL. Without user info boto3 looks for credentials as it always does (environment, profile, role);
without a host it is AWS itself: `s3:///bucket?region=eu-central-1`. `public_endpoint` is how clients reach the
server when that differs from how we do: a signed URL holds for one host only.

The credentials need GetObject, PutObject, DeleteObject, AbortMultipartUpload,
ListBucketMultipartUploads and ListBucket (without ListBucket S3
answers 403 for a missing object, which reads as "away"), and CreateBucket when the bucket is to be made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError as TransferCancelled
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from boto3.session import Session
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError
from s3transfer.futures import TransferFuture
from s3transfer.subscribers import BaseSubscriber
from urllib3.exceptions import HTTPError

from broker.backends.breaker import Breaker, seek
from broker.backends.parts import Parts, Stopped
from broker.backends.s3_objects import Objects
from broker.errors import (
    BadRequest,
    BlobsUnavailable,
    ConfigurationError,
    FnqueueError,
    NotFound,
    PayloadTooLarge,
)
from broker.model import Blob
from broker.ports import Sink
from broker.settings import MIB, Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

T = TypeVar("T")
Begin = Callable[[list[BaseSubscriber]], TransferFuture]

DESCRIPTION = "nvcf-asset-description"  # the client's header is x-amz-meta-nvcf-asset-description
CALLS = 32
TRANSFERS = 8  # parts of files on the wire at once, in all, and files being written; each costs a thread
PART_BYTES = 20 * MIB
SLOWEST_BYTES_S = MIB  # a body may take this much longer than an answer without one
CONNECT_S = 3.0
STOP_S = 5.0
LONGEST_URL_S = 7 * 86_400  # S3 signs for no longer
# botocore takes this one for its own default and leaves it out of the signature.
UNSIGNABLE = "application/x-www-form-urlencoded; charset=utf-8"
MISSING = frozenset({"404", "NoSuchKey", "NotFound"})
NO_UPLOAD = "NoSuchUpload"
ABORTED = 100  # uploads of others that one call ends
OURS_ALREADY = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})


class S3Blobs:
    """`Blobs` on one bucket, by boto3 in threads of its own. `open_blobs` opens and closes it."""

    def __init__(
        self,
        *,
        calls: S3Client,
        signer: S3Client,
        credentials: Credentials | None,
        bucket: str,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        """`patience_s`: after so long without an answer the server is not asked any more, until it is found again."""
        self._client = calls
        self._objects = Objects(calls, credentials, bucket)
        self._signer = signer
        self._bucket = bucket
        self._timeout_s = timeout_s
        self._breaker = Breaker("blobs", after_s=patience_s)
        self._seeking: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(CALLS, thread_name_prefix="blobs")
        self._transfers = create_transfer_manager(calls, _transfer_config())
        self._writers = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="writers")
        self._part_threads = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="parts")
        self._uploads: set[Parts] = set()
        self._bucket_exists = False
        self._bucket_lock = threading.Lock()

    @property
    def circuit(self) -> Breaker:
        return self._breaker

    def upload_url(
        self, key: str, *, content_type: str, description: str, expires_s: float, size_bytes: int = 0
    ) -> str:
        """Good for as long as the credentials are: temporary ones may end before `expires_s`."""
        if content_type.lower() == UNSIGNABLE:
            raise BadRequest(
                f"content type {UNSIGNABLE!r} cannot be signed; leave the charset out", field="contentType"
            )
        about: dict[str, Any] = {"Metadata": {DESCRIPTION: description}} if description else {}
        if size_bytes:
            about["ContentLength"] = size_bytes
        return self._sign("put_object", expires_s, Key=key, ContentType=content_type, **about)

    def download_url(self, key: str, *, filename: str, expires_s: float) -> str:
        disposition = f'attachment; filename="{re.sub(r"[^A-Za-z0-9._-]", "_", filename)}"'
        return self._sign("get_object", expires_s, Key=key, ResponseContentDisposition=disposition)

    async def head(self, key: str) -> Blob | None:
        try:
            answer = await self._call(self._client.head_object, Key=key)
        except NotFound:
            return None
        # rclone answers with `Nvcf-Asset-Description`: names of metadata have no case.
        metadata = {name.lower(): value for name, value in answer["Metadata"].items()}
        return Blob(
            key=key,
            size_bytes=answer["ContentLength"],
            content_type=answer.get("ContentType", ""),
            description=metadata.get(DESCRIPTION, ""),
            modified_at=answer["LastModified"].timestamp(),
        )

    async def list(self, prefix: str) -> list[Blob]:
        """One call per thousand objects. S3 lists neither content type nor description."""
        page = await self._call(self._client.list_objects_v2, Prefix=prefix)
        blobs = _blobs(page)
        while page["IsTruncated"]:
            token = page["NextContinuationToken"]
            page = await self._call(self._client.list_objects_v2, Prefix=prefix, ContinuationToken=token)
            blobs += _blobs(page)
        return blobs

    async def put(self, key: str, body: bytes, *, content_type: str) -> str:
        return await self._call(self._write, size_bytes=len(body), Key=key, Body=body, ContentType=content_type)

    async def get(self, key: str, *, limit_bytes: int) -> bytes:
        return await self._call(self._read, size_bytes=limit_bytes, Key=key, limit_bytes=limit_bytes)

    async def upload(self, key: str, write: Callable[[Sink], None], *, content_type: str, scratch: Path) -> None:
        """A PUT of less than 20 MiB, else parts of 20 MiB. A stalled server is given up on after three time-outs."""
        await self._await_bucket()
        parts = Parts(
            self._client,
            self._objects,
            self._part_threads,
            scratch,
            bucket=self._bucket,
            key=key,
            content_type=content_type,
            part_bytes=PART_BYTES,
        )
        with self._guarded():
            await self._upload(parts, write)

    async def _upload(self, parts: Parts, write: Callable[[Sink], None]) -> None:
        self._uploads.add(parts)
        running = self._writers.submit(_with_translation, lambda: parts.run(write))
        done = asyncio.wrap_future(running)
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            parts.stop()
            done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen: not reported as lost
            if not running.cancel():
                await asyncio.wait({done}, timeout=STOP_S)
            raise
        finally:
            self._uploads.discard(parts)

    async def download(self, key: str, path: Path) -> None:
        """To a file beside `path` that takes its name when it is complete."""
        await self._await_bucket()
        with self._guarded():
            await self._transfer(lambda told: self._transfers.download(self._bucket, key, str(path), {}, told))

    async def copy(self, source: str, target: str) -> None:
        """By S3 itself, which does so with up to 5 GiB. Its time is that of an upload of that size."""
        known = await self.head(source)
        if known is None:
            raise NotFound(f"no object {source}")
        await self._call(
            self._client.copy_object,
            size_bytes=known.size_bytes,
            Key=target,
            CopySource={"Bucket": self._bucket, "Key": source},
        )

    async def delete(self, key: str) -> bool:
        """Of two that delete one object at the same moment, both may hear True: S3 itself does not say."""
        known = await self.head(key)
        if known is not None:
            await self.discard(key)
        return known is not None

    async def discard(self, key: str) -> None:
        await self._call(self._discard, Key=key)

    async def page(self, prefix: str, *, after: str, limit: int) -> tuple[Blob, ...]:
        found = await self._call(self._client.list_objects_v2, Prefix=prefix, StartAfter=after, MaxKeys=limit)
        return tuple(_blobs(found))

    async def discard_unfinished(self, *, older_than_s: float) -> int:
        """Of the first thousand uploads in parts that S3 lists, and ABORTED at most."""
        return await self._call(self._abort_old, older_than_s=older_than_s)

    @property
    def endpoint(self) -> str:
        """Where the server is, without credentials."""
        return self._client.meta.endpoint_url

    async def look(self) -> tuple[str, float | None]:
        """What the server calls itself, and how far its clock is ahead of ours, to the second. Makes no bucket.

        Raises BlobsUnavailable, or NotFound when there is no bucket.
        """
        answer = await self._within(self._timeout_s, lambda: self._client.head_bucket(Bucket=self._bucket))
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        told = headers.get("date")
        return headers.get("server", ""), parsedate_to_datetime(told).timestamp() - time.time() if told else None

    async def ping(self) -> None:
        await self._within(self._timeout_s, self._make_bucket)

    async def aclose(self) -> None:
        """Cut the transfers short and give the threads back; what is still on the wire ends by its time-outs."""
        if self._seeking is not None:
            self._seeking.cancel()
            await asyncio.gather(self._seeking, return_exceptions=True)
        for parts in self._uploads:
            parts.stop()
        stopping = self._threads.submit(self._transfers.shutdown, cancel=True)
        await asyncio.wait({asyncio.wrap_future(stopping)}, timeout=STOP_S)
        for threads in (self._writers, self._part_threads, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        self._signer.close()

    def _sign(self, operation: str, expires_s: float, **parameters: Any) -> str:
        lifetime_s = max(1, min(int(expires_s), LONGEST_URL_S))
        with _translated():
            return self._signer.generate_presigned_url(
                operation, Params={"Bucket": self._bucket, **parameters}, ExpiresIn=lifetime_s
            )

    async def _call(self, work: Callable[..., T], *, size_bytes: int = 0, **parameters: Any) -> T:
        """`work` with our bucket, in a thread, after making sure that the bucket exists."""

        def call() -> T:
            self._ensure_bucket()
            return work(Bucket=self._bucket, **parameters)

        return await self._within(self._timeout_s + size_bytes / SLOWEST_BYTES_S, call)

    async def _within(self, timeout_s: float, work: Callable[[], T]) -> T:
        with self._guarded():
            return await self._exchange(timeout_s, work)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What callers bring waits in memory for as long as they do, so while the server is away they do not."""
        if not self._breaker.admits():
            raise BlobsUnavailable("the blob store does not answer; try again")
        began_at = self._breaker.now()
        try:
            yield
        except BlobsUnavailable as exc:
            if isinstance(exc.__cause__, ClientError):
                self._breaker.answered()
            elif self._breaker.failed(began_at=began_at):
                self._seeking = asyncio.get_running_loop().create_task(seek(self._breaker, self._look_for_bucket))
            raise
        except FnqueueError:
            self._breaker.answered()
            raise
        self._breaker.answered()

    async def _look_for_bucket(self) -> None:
        await self._exchange(self._timeout_s, self._make_bucket)

    async def _exchange(self, timeout_s: float, work: Callable[[], T]) -> T:
        """A thread whose caller left finishes its one exchange, bounded by its time-outs, and nobody is told."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, _with_translation, work)
        except TimeoutError as exc:
            raise BlobsUnavailable(f"the blob store did not answer within {timeout_s:g} s") from exc

    async def _transfer(self, begin: Begin) -> None:
        """A file, in as many parts as it takes. When cancelled, what was begun is undone before this returns."""
        done = asyncio.Event()
        transfer = begin([_Done(asyncio.get_running_loop(), done)])
        try:
            await done.wait()
        except asyncio.CancelledError:
            transfer.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), STOP_S)
            raise
        with _translated():
            transfer.result()

    def _write(self, *, Bucket: str, Key: str, Body: bytes, ContentType: str) -> str:  # noqa: N803  boto3's names
        sha256 = hashlib.sha256(Body).hexdigest()
        if not self._objects.put(Key, Body, content_type=ContentType, sha256=sha256):
            self._client.put_object(Bucket=Bucket, Key=Key, Body=Body, ContentType=ContentType)
        return sha256

    def _discard(self, *, Bucket: str, Key: str) -> None:  # noqa: N803  boto3's names
        if not self._objects.delete(Key):
            self._client.delete_object(Bucket=Bucket, Key=Key)

    def _read(self, *, limit_bytes: int, Bucket: str, Key: str) -> bytes:  # noqa: N803  boto3's names
        found = self._objects.get(Key, limit_bytes=limit_bytes)
        if found is not None:
            return found
        answer = self._client.get_object(Bucket=Bucket, Key=Key)
        with contextlib.closing(answer["Body"]) as body:
            if answer["ContentLength"] > limit_bytes:
                raise PayloadTooLarge(f"the object is larger than {limit_bytes} bytes", limit_bytes=limit_bytes)
            return body.read()

    def _abort_old(self, *, older_than_s: float, Bucket: str) -> int:  # noqa: N803  boto3's name
        try:
            listed = self._client.list_multipart_uploads(Bucket=Bucket)
        except ClientError as exc:
            if _code(exc) == NO_UPLOAD:  # rclone's way to say that there are none
                return 0
            raise
        now = listed["ResponseMetadata"]["HTTPHeaders"].get("date")
        before = (parsedate_to_datetime(now).timestamp() if now else time.time()) - older_than_s
        old = [upload for upload in listed.get("Uploads", []) if upload["Initiated"].timestamp() <= before][:ABORTED]
        for upload in old:
            try:
                self._client.abort_multipart_upload(Bucket=Bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            except ClientError as exc:
                if _code(exc) != NO_UPLOAD:  # it ended meanwhile
                    raise
        return len(old)

    async def _await_bucket(self) -> None:
        if not self._bucket_exists:
            await self._within(self._timeout_s, self._ensure_bucket)

    def _ensure_bucket(self) -> None:
        """The server may have been away when we opened, so the first call that reaches it makes the bucket."""
        if not self._bucket_exists:
            with self._bucket_lock:
                if not self._bucket_exists:
                    self._make_bucket()

    def _make_bucket(self) -> None:
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as exc:
            if _code(exc) not in MISSING:
                raise
            self._create_bucket()
        self._bucket_exists = True

    def _create_bucket(self) -> None:
        region = self._client.meta.region_name
        place: dict[str, Any] = {}
        if region != "us-east-1":  # which S3 refuses to hear by name
            place = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            self._client.create_bucket(Bucket=self._bucket, **place)
        except ClientError as exc:
            if _code(exc) not in OURS_ALREADY:
                raise


@contextlib.asynccontextmanager
async def open_blobs(url: str, settings: Settings, *, make: bool = True) -> AsyncIterator[S3Blobs]:
    """Opens although the server is away: `ping` tells, and the bucket is made by the first call that can; `make`: now.

    Raises:
        ConfigurationError: the URL is not one of ours; its message never repeats it.
    """
    place = _parse(url)
    patience_s = min(settings.blobs_timeout_s, settings.accept_timeout_s)
    blobs = await asyncio.to_thread(_open, place, settings.blobs_timeout_s, patience_s)
    try:
        if make:
            with contextlib.suppress(BlobsUnavailable):
                await blobs.ping()
        yield blobs
    finally:
        await blobs.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What a URL says. An endpoint of None is AWS; an access key of None is for boto3 to find."""

    bucket: str
    endpoint: str | None
    public_endpoint: str | None
    region: str | None
    access_key: str | None
    secret_key: str | None


class _Done(BaseSubscriber):
    """Tells the loop that a transfer ended, from whichever thread it ended in."""

    def __init__(self, loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
        self._loop = loop
        self._event = done

    def on_done(self, future: TransferFuture, **kwargs: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting
            self._loop.call_soon_threadsafe(self._event.set)


def _parse(url: str) -> _Place:
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        host = _host(parts)
    except ValueError as exc:
        raise ConfigurationError("the S3 URL cannot be read; percent-encode what is special in it") from exc
    tls = options.pop("tls", "true").lower()
    region = options.pop("region", "us-east-1" if host else None)
    public_endpoint = options.pop("public_endpoint", None)
    if options:
        raise ConfigurationError(f"unknown S3 option {sorted(options)[0]!r}; there are tls, region, public_endpoint")
    if tls not in ("true", "false"):
        raise ConfigurationError("the S3 option tls is true or false")
    if public_endpoint and not re.fullmatch(r"https?://[^/?#@]+/?", public_endpoint):
        raise ConfigurationError("the S3 option public_endpoint is http(s)://host[:port], without a path")
    bucket = parts.path.removeprefix("/").removesuffix("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise ConfigurationError("the S3 URL's path is the bucket: 3 to 63 of a-z, 0-9, dot and hyphen")
    if bool(parts.username) != bool(parts.password):
        raise ConfigurationError("the S3 URL has one half of ACCESS:SECRET; give both or none")
    return _Place(
        bucket=bucket,
        endpoint=f"{'https' if tls == 'true' else 'http'}://{host}" if host else None,
        public_endpoint=public_endpoint,
        region=region,
        access_key=unquote(parts.username) if parts.username else None,
        secret_key=unquote(parts.password) if parts.password else None,
    )


def _host(parts: SplitResult) -> str:
    """`host[:port]` without the credentials; raises ValueError on a port that is none."""
    host = parts.hostname or ""
    bracketed = f"[{host}]" if ":" in host else host
    return bracketed if parts.port is None else f"{bracketed}:{parts.port}"


def _open(place: _Place, timeout_s: float, patience_s: float) -> S3Blobs:
    """Making a client reads files: for a thread. The session is our own, since boto3's default is a global."""
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        connect_timeout=CONNECT_S,
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=CALLS + 3 * TRANSFERS,
        # The default sends trailers that other stores than AWS refuse (boto3#4392).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = Session(place.access_key, place.secret_key)
        region = place.region or session.region_name or "us-east-1"
        credentials = session.get_credentials()
        calls, signer = (
            session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
            for endpoint in (place.endpoint, place.public_endpoint or place.endpoint)
        )
    except (ValueError, BotoCoreError) as exc:
        raise ConfigurationError(f"boto3 refuses the S3 settings: {type(exc).__name__}") from exc
    return S3Blobs(
        calls=calls,
        signer=signer,
        credentials=credentials,
        bucket=place.bucket,
        timeout_s=timeout_s,
        patience_s=patience_s,
    )


def _transfer_config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES,  # above it, a download is made of several requests
        multipart_chunksize=PART_BYTES,
        max_concurrency=TRANSFERS,
        max_io_queue=32,  # of 256 KiB: what downloads may be ahead of the disk
        num_download_attempts=3,
        preferred_transfer_client="classic",
    )


def _blobs(page: ListObjectsV2OutputTypeDef) -> list[Blob]:
    return [
        Blob(
            key=item["Key"],
            size_bytes=item["Size"],
            content_type="",
            description="",
            modified_at=item["LastModified"].timestamp(),
        )
        for item in page.get("Contents", [])
    ]


def _with_translation(work: Callable[[], T]) -> T:
    with _translated():
        return work()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Their errors to ours; a message carries S3's error code or a class name, never a URL, a key or a secret."""
    try:
        yield
    except ClientError as exc:
        if _code(exc) in MISSING:
            raise NotFound("there is no such object") from exc
        raise BlobsUnavailable(f"the blob store refused: {_code(exc)}") from exc
    except (BotoCoreError, Boto3Error, RetriesExceededError, HTTPError, TransferCancelled, Stopped) as exc:
        raise BlobsUnavailable(f"the blob store did not answer: {type(exc).__name__}") from exc


def _code(exc: ClientError) -> str:
    return exc.response.get("Error", {}).get("Code", "unknown")
