"""One object of S3 while it is being written: a PUT if it stays small, else parts that leave while the next is filled.

A part waits in a file, not in memory, and is sent again from there. What is on disk is bounded by the parts under way,
whatever the size of the object.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from broker.backends.s3_objects import Objects
from broker.ports import Sink

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PARTS_AHEAD = 4  # of one object, beside the one that is being filled


class Stopped(Exception):
    """Nobody waits for the object any more."""


class Parts:
    """A `Sink`. `run` is for a thread; `stop` may be called from any other."""

    def __init__(
        self,
        client: S3Client,
        objects: Objects,
        threads: ThreadPoolExecutor,
        folder: Path,
        *,
        bucket: str,
        key: str,
        content_type: str,
        part_bytes: int,
    ) -> None:
        self._client = client
        self._objects = objects
        self._threads = threads
        self._place = folder / f"part-{secrets.token_hex(4)}"
        self._bucket = bucket
        self._key = key
        self._content_type = content_type
        self._part_bytes = part_bytes
        self._file: BinaryIO | None = None
        self._filled = 0
        self._upload_id = ""
        self._sending: deque[Future[CompletedPartTypeDef]] = deque()
        self._sent: list[CompletedPartTypeDef] = []
        self._stopped = threading.Event()

    def run(self, write: Callable[[Sink], None]) -> None:
        """Store what `write` writes, whole or not at all.

        Raises what `write` and the client raise, OSError of the folder, and Stopped.
        """
        try:
            write(self)
            self._complete()
        except BaseException:
            self._abort()
            raise
        finally:
            if self._file is not None:
                self._file.close()
                Path(self._file.name).unlink(missing_ok=True)

    def stop(self) -> None:
        self._stopped.set()
        for part in list(self._sending):
            part.cancel()

    def write(self, data: bytes, /) -> int:
        if self._stopped.is_set():
            raise Stopped
        left = memoryview(data)
        while left:
            if self._filled == self._part_bytes:
                self._send()
            now = left[: self._part_bytes - self._filled]
            self._current().write(now)
            self._filled += len(now)
            left = left[len(now) :]
        return len(data)

    def flush(self) -> None:
        """A part is flushed when it is sent."""

    def _current(self) -> BinaryIO:
        if self._file is None:
            self._file = Path(f"{self._place}-{len(self._sent) + len(self._sending) + 1}").open("xb")  # noqa: SIM115
        return self._file

    def _finish_file(self) -> Path:
        file = self._current()
        file.close()
        self._file, self._filled = None, 0
        return Path(file.name)

    def _send(self) -> None:
        """Begin to send the part that is full, and wait while too many are under way."""
        if not self._upload_id:
            answer = self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._key, ContentType=self._content_type
            )
            self._upload_id = answer["UploadId"]
        number = len(self._sent) + len(self._sending) + 1
        path = self._finish_file()
        try:
            self._sending.append(self._threads.submit(self._send_part, number, path))
        except RuntimeError as exc:  # the pool is closed
            path.unlink(missing_ok=True)
            raise Stopped from exc
        while len(self._sending) > PARTS_AHEAD:
            self._await_oldest()

    def _await_oldest(self) -> None:
        part = self._sending[0].result()
        self._sending.popleft()
        self._sent.append(part)

    def _send_part(self, number: int, path: Path) -> CompletedPartTypeDef:
        try:
            etag = self._objects.put_part(self._key, path, upload_id=self._upload_id, number=number)
            if not etag:
                with path.open("rb") as body:
                    etag = self._client.upload_part(
                        Bucket=self._bucket, Key=self._key, UploadId=self._upload_id, PartNumber=number, Body=body
                    )["ETag"]
        finally:
            path.unlink(missing_ok=True)
        return {"ETag": etag, "PartNumber": number}

    def _complete(self) -> None:
        if self._stopped.is_set():
            raise Stopped
        if not self._upload_id:
            self._put()
            return
        self._send()
        while self._sending:
            self._await_oldest()
        self._client.complete_multipart_upload(
            Bucket=self._bucket, Key=self._key, UploadId=self._upload_id, MultipartUpload={"Parts": self._sent}
        )

    def _put(self) -> None:
        path = self._finish_file()
        try:
            if not self._objects.put_file(self._key, path, content_type=self._content_type):
                with path.open("rb") as body:
                    self._client.put_object(
                        Bucket=self._bucket, Key=self._key, Body=body, ContentType=self._content_type
                    )
        finally:
            path.unlink(missing_ok=True)

    def _abort(self) -> None:
        """Best effort: a server that is away keeps the parts until its own rule removes them."""
        # A part that arrives after the abort would stay; each is bounded by its time-outs. One that was cancelled is
        # not waited for: a pool that is shut down never says that it is over.
        wait([part for part in self._sending if not part.cancel()])
        for number, part in enumerate(self._sending, start=len(self._sent) + 1):
            if part.cancelled():
                Path(f"{self._place}-{number}").unlink(missing_ok=True)
        if self._upload_id:
            with contextlib.suppress(ClientError, BotoCoreError, HTTPError):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload_id)
