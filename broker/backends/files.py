"""Large bytes in a folder: `fnqueue dev` without an S3 server.

URL: `file://` (the folder `blobs` under the data folder) or `file:///a/folder`. Several processes may share a
folder. Its URLs are signed by us and served by the embedded api; they are as strict as S3's. Objects are
replaced whole and survive a crash of the process, not of the machine: nothing is flushed to the disk. Where file
names have no case (macOS), keys have none either.

    objects/<key>   the bytes
    about/<key>     content type and description, as JSON
    drafts/…        being written
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import heapq
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar
from urllib.parse import quote, unquote, urlencode, urlsplit

from broker.errors import BadRequest, BlobsUnavailable, ConfigurationError, Forbidden, NotFound, PayloadTooLarge
from broker.model import Blob
from broker.ports import Sink
from broker.settings import MIB, Settings

P = ParamSpec("P")
T = TypeVar("T")

ROUTE = "/v2/nvcf/blobs/"
LONGEST_URL_S = 7 * 86_400  # as S3
WRITE_BYTES = MIB
ABANDONED_S = 86_400.0
KEY = re.compile(r"[A-Za-z0-9_=~-][A-Za-z0-9._=~-]{0,199}(/[A-Za-z0-9_=~-][A-Za-z0-9._=~-]{0,199}){0,15}")


class FileBlobs:
    """`Blobs` on local disk. `open_blobs` opens it; there is nothing to close.

    Keys are up to 16 segments of letters, digits and `._=~-` that do not begin with a dot; any other key is a
    BadRequest. The api that serves the URLs calls `set_base_url` once, then `verify_upload` and `receive` for a PUT,
    `verify_download`, `head` and `path` for a GET.
    """

    def __init__(self, folder: Path, *, secret: bytes) -> None:
        self._objects = folder / "objects"
        self._about = folder / "about"
        self._drafts = folder / "drafts"
        self._secret = hmac.digest(secret, b"fnqueue blob urls", hashlib.sha256)
        self._base_url = ""

    def set_base_url(self, url: str) -> None:
        """Where clients reach the api: `http://host:port`, without a path."""
        self._base_url = url.rstrip("/")

    def upload_url(
        self, key: str, *, content_type: str, description: str, expires_s: float, size_bytes: int = 0
    ) -> str:
        about = {"type": _trimmed(content_type), "description": _trimmed(description)}
        if size_bytes:
            about["size"] = str(size_bytes)
        return self._signed("PUT", key, expires_s, about)

    def download_url(self, key: str, *, filename: str, expires_s: float) -> str:
        return self._signed("GET", key, expires_s, {"filename": re.sub(r"[^A-Za-z0-9._-]", "_", filename)})

    def verify_upload(
        self, key: str, query: Mapping[str, str], *, content_type: str, description: str, size_bytes: int
    ) -> None:
        """Whether a PUT may go ahead, given its Content-Type, x-amz-meta-nvcf-asset-description ('' if absent) and
        Content-Length.

        Raises:
            Forbidden: the URL is not one of ours for this verb and key, it has expired, or a header is not what
                was signed.
        """
        names = ("type", "description", "size") if "size" in query else ("type", "description")
        signed = self._verified("PUT", key, query, names)
        if (signed["type"], signed["description"]) != (_trimmed(content_type), _trimmed(description)):
            raise Forbidden("the content type or the description is not the one that was signed")
        if signed.get("size", str(size_bytes)) != str(size_bytes):
            raise Forbidden("the size is not the one that was signed")

    def verify_download(self, key: str, query: Mapping[str, str]) -> str:
        """The file name to offer in `Content-Disposition: attachment`; needs no quoting.

        Raises:
            Forbidden: the URL is not one of ours for this verb and key, or it has expired.
        """
        return self._verified("GET", key, query, ("filename",))["filename"]

    def path(self, key: str) -> Path:
        """Where the object's bytes are, or would be: ask `head` whether it exists. Never write there."""
        return self._objects / _checked(key)

    async def receive(
        self, key: str, chunks: AsyncIterator[bytes], *, content_type: str, description: str, limit_bytes: int
    ) -> None:
        """Store an upload as it comes in, whole or not at all. Raises PayloadTooLarge; nothing stays behind then,
        nor when `chunks` raises or the caller is cancelled."""
        _checked(key)
        draft = self._draft()
        try:
            await self._fill(draft, chunks, limit_bytes)
            await _in_thread(self._publish, draft, key, content_type, description)
        finally:
            await _in_thread(draft.unlink, missing_ok=True)

    async def head(self, key: str) -> Blob | None:
        return await _in_thread(self._head, _checked(key))

    async def list(self, prefix: str) -> list[Blob]:
        _checked(prefix.removesuffix("/"))
        return [*await _in_thread(self._found, prefix)]

    async def put(self, key: str, body: bytes, *, content_type: str) -> str:
        sha256 = ""

        def write(draft: Path) -> None:
            nonlocal sha256
            draft.write_bytes(body)
            sha256 = hashlib.sha256(body).hexdigest()

        await self._store(key, content_type, write)
        return sha256

    async def get(self, key: str, *, limit_bytes: int) -> bytes:
        return await _in_thread(self._read, _checked(key), limit_bytes)

    async def upload(self, key: str, write: Callable[[Sink], None], *, content_type: str, scratch: Path) -> None:
        """`scratch` is not needed: a draft lies beside the objects."""
        stopped = threading.Event()

        def fill(draft: Path) -> None:
            with draft.open("xb") as file:
                write(_Stoppable(file, stopped))

        await self._store(key, content_type, fill, stop=stopped.set)

    async def download(self, key: str, path: Path) -> None:
        """To a file beside `path` that takes its name when it is complete."""
        await _in_thread(self._copy_out, _checked(key), path)

    async def copy(self, source: str, target: str) -> None:
        known = await self.head(source)
        if known is None:
            raise NotFound(f"no object {source}")
        await self._store(target, known.content_type, lambda draft: self._copy_out(source, draft))

    async def delete(self, key: str) -> bool:
        return await _in_thread(self._delete, _checked(key))

    async def discard(self, key: str) -> None:
        await self.delete(key)

    async def ping(self) -> None:
        await _in_thread(self._make_folders)

    async def page(self, prefix: str, *, after: str, limit: int) -> tuple[Blob, ...]:
        _checked(prefix.removesuffix("/"))
        return await _in_thread(self._found, prefix, after, limit)

    async def discard_unfinished(self, *, older_than_s: float) -> int:
        return await _in_thread(self._sweep, older_than_s)

    async def sweep(self) -> None:
        """Remove drafts of processes that were killed; younger ones than a day may be somebody's at work."""
        await _in_thread(self._sweep, ABANDONED_S)

    def _signed(self, verb: str, key: str, expires_s: float, about: Mapping[str, str]) -> str:
        if not self._base_url:
            raise BlobsUnavailable("this process serves no signed URLs")
        lifetime_s = max(1, min(int(expires_s), LONGEST_URL_S))
        fields = {"expires": str(int(time.time()) + lifetime_s), **about}
        query = urlencode({**fields, "signature": self._signature(verb, _checked(key), fields)}, quote_via=quote)
        return f"{self._base_url}{ROUTE}{key}?{query}"

    def _verified(self, verb: str, key: str, query: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
        fields = {name: query.get(name, "") for name in ("expires", *names)}
        signature = self._signature(verb, key, fields)
        genuine = hmac.compare_digest(signature.encode(), query.get("signature", "").encode(errors="replace"))
        # One value a name: a second one would be signed by nobody.
        if not genuine or len(query) != len(fields) + 1:
            raise Forbidden("the signature does not match; ask for a new URL and use it as it is")
        if time.time() >= int(fields["expires"]):
            raise Forbidden("the URL has expired; ask for a new one")
        return fields

    def _signature(self, verb: str, key: str, fields: Mapping[str, str]) -> str:
        """JSON, so that no two different sets of fields read the same."""
        message = json.dumps([verb, key, fields], sort_keys=True)
        return hmac.new(self._secret, message.encode(), hashlib.sha256).hexdigest()

    def _draft(self) -> Path:
        return self._drafts / secrets.token_hex(16)

    async def _fill(self, draft: Path, chunks: AsyncIterator[bytes], limit_bytes: int) -> None:
        received = 0
        waiting = bytearray()
        async for chunk in chunks:
            received += len(chunk)
            if received > limit_bytes:
                raise PayloadTooLarge(f"an object may have {limit_bytes} bytes", limit_bytes=limit_bytes)
            waiting += chunk
            if len(waiting) >= WRITE_BYTES:
                await _in_thread(_append, draft, bytes(waiting))
                waiting.clear()
        await _in_thread(_append, draft, bytes(waiting))

    async def _store(
        self, key: str, content_type: str, fill: Callable[[Path], object], *, stop: Callable[[], None] | None = None
    ) -> None:
        _checked(key)

        def store() -> None:
            draft = self._draft()
            try:
                fill(draft)
                self._publish(draft, key, content_type, "")
            finally:
                draft.unlink(missing_ok=True)

        await _ended(asyncio.get_running_loop().run_in_executor(None, store), stop)

    def _publish(self, draft: Path, key: str, content_type: str, description: str) -> None:
        """The description first: whoever sees the object sees what it is."""
        note = self._draft()
        try:
            note.write_text(json.dumps({"content_type": content_type, "description": description}))
            for source, folder in ((note, self._about), (draft, self._objects)):
                target = folder / key
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
        finally:
            note.unlink(missing_ok=True)

    def _head(self, key: str) -> Blob | None:
        path = self._objects / key
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        content_type, description = self._description(key)
        return Blob(
            key=key,
            size_bytes=status.st_size,
            content_type=content_type,
            description=description,
            modified_at=status.st_mtime,
        )

    def _description(self, key: str) -> tuple[str, str]:
        """An object deleted while it was being replaced can be without: it is still an object."""
        try:
            about = json.loads((self._about / key).read_bytes())
        except FileNotFoundError:
            return "application/octet-stream", ""
        return about["content_type"], about["description"]

    def _found(self, prefix: str, after: str = "", limit: int | None = None) -> tuple[Blob, ...]:
        found = (Path(folder) / name for folder, _, names in os.walk(self._objects / prefix) for name in names)
        listed = (path.relative_to(self._objects).as_posix() for path in found)
        keys = sorted(listed) if limit is None else heapq.nsmallest(limit, (key for key in listed if key > after))
        return tuple(blob for blob in map(self._head, keys) if blob is not None)

    def _read(self, key: str, limit_bytes: int) -> bytes:
        with self._open(key) as file:
            body = file.read(limit_bytes + 1)
        if len(body) > limit_bytes:
            raise PayloadTooLarge(f"the object is larger than {limit_bytes} bytes", limit_bytes=limit_bytes)
        return body

    def _copy_out(self, key: str, path: Path) -> None:
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            with self._open(key) as source, draft.open("xb") as target:
                shutil.copyfileobj(source, target, WRITE_BYTES)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _open(self, key: str) -> BinaryIO:
        try:
            return (self._objects / key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
            raise NotFound("there is no such object") from exc

    def _delete(self, key: str) -> bool:
        try:
            (self._objects / key).unlink()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        (self._about / key).unlink(missing_ok=True)
        return True

    def _make_folders(self) -> None:
        for folder in (self._objects, self._about, self._drafts):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = self._draft()
        probe.touch()
        probe.unlink()

    def _sweep(self, older_than_s: float) -> int:
        removed = 0
        for draft in self._drafts.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime >= older_than_s:
                    draft.unlink()
                    removed += 1
        return removed


@contextlib.asynccontextmanager
async def open_blobs(url: str, settings: Settings) -> AsyncIterator[FileBlobs]:
    """Without a `secret_key` in the settings, signed URLs end with this process.

    Raises:
        ConfigurationError: the URL is not one of ours, or its folder cannot be written.
    """
    folder = folder_of(url, settings)
    secret = settings.secret_key.get_secret_value().encode() or secrets.token_bytes(32)
    blobs = FileBlobs(folder, secret=secret)
    try:
        await blobs.ping()
    except BlobsUnavailable as exc:
        raise ConfigurationError(f"the blob folder {folder} cannot be used: {exc}") from exc
    await blobs.sweep()
    yield blobs


def folder_of(url: str, settings: Settings) -> Path:
    """Raises ConfigurationError for a URL that is not one of ours."""
    parts = urlsplit(url)
    if parts.netloc or parts.query or parts.fragment:
        raise ConfigurationError("a file URL is file:// or file:///an/absolute/folder")
    return Path(unquote(parts.path)) if parts.path else settings.data_dir.absolute() / "blobs"


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise BadRequest(f"{key!r} is not a key of an object")
    return key


def _trimmed(value: str) -> str:
    """As S3 signs a header: outer space gone, inner space single."""
    return " ".join(value.split())


def _append(path: Path, body: bytes) -> None:
    with path.open("ab") as file:
        file.write(body)


class _Stopped(Exception):
    """Nobody waits for what is being written."""


class _Stoppable:
    """A `Sink` in front of a file."""

    def __init__(self, file: BinaryIO, stopped: threading.Event) -> None:
        self._file = file
        self._stopped = stopped

    def write(self, data: bytes, /) -> int:
        if self._stopped.is_set():
            raise _Stopped
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Disk work; when cancelled, it ends before this does, so that it cannot race its own clean-up."""
    return await _ended(asyncio.get_running_loop().run_in_executor(None, functools.partial(work, *args, **kwargs)))


async def _ended(running: asyncio.Future[T], stop: Callable[[], None] | None = None) -> T:
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # seen, so that asyncio does not report it as lost
        raise
    try:
        return running.result()
    except OSError as exc:
        raise BlobsUnavailable(f"the blob folder failed: {exc.strerror}") from exc
    finally:
        del running  # it holds the error, which holds this frame and those of its callers
