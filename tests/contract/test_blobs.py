"""What every `Blobs` back end does: S3 on a real server, and the folder behind an api that serves its URLs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
import time
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from broker.backends import files, s3
from broker.backends.files import FileBlobs
from broker.backends.s3 import S3Blobs
from broker.errors import BadRequest, BlobsUnavailable, ConfigurationError, Forbidden, NotFound, PayloadTooLarge
from broker.ports import Blobs, Sink
from broker.settings import MIB, Settings, load
from infra.local.process import LOOPBACK, free_port
from infra.local.servers import S3

BIG_BYTES = 64 * MIB
LIMIT_BYTES = 256 * MIB
FLAT_BYTES = 24 * MIB
DESCRIPTION_HEADER = "x-amz-meta-nvcf-asset-description"
PNG = "image/png"
CAT = "A cat, sleeping; 100% fluffy  (two spaces)"
HEADERS = {"Content-Type": PNG, DESCRIPTION_HEADER: CAT}
SIGNED_S = 60.0


@pytest.fixture(params=["s3", "files"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Blobs]:
    """Each back end, with its signed URLs served."""
    if request.param == "s3":
        async with s3.open_blobs(request.getfixturevalue("s3").url, load(Settings)) as bucket:
            yield bucket
    else:
        async with files.open_blobs(f"file://{tmp_path}/blobs", load(Settings)) as folder, serving(folder):
            yield folder


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[FileBlobs]:
    """The folder back end alone, with a base URL that nobody serves."""
    async with files.open_blobs(f"file://{tmp_path}/blobs", load(Settings)) as opened:
        opened.set_base_url("http://nobody.invalid")
        yield opened


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@contextlib.asynccontextmanager
async def serving(blobs: FileBlobs) -> AsyncIterator[None]:
    """The two handlers as the embedded api has them."""

    async def handle(request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        try:
            if request.method == "PUT":
                return await put(request, key)
            if request.method == "GET":
                return await get(request, key)
        except Forbidden as exc:
            raise web.HTTPForbidden(text=str(exc)) from exc
        raise web.HTTPForbidden

    async def put(request: web.Request, key: str) -> web.StreamResponse:
        content_type = request.headers.get("Content-Type", "")
        description = request.headers.get(DESCRIPTION_HEADER, "")
        blobs.verify_upload(
            key,
            request.query,
            content_type=content_type,
            description=description,
            size_bytes=request.content_length or 0,
        )
        chunks = request.content.iter_chunked(256 * 1024)
        await blobs.receive(key, chunks, content_type=content_type, description=description, limit_bytes=LIMIT_BYTES)
        return web.Response()

    async def get(request: web.Request, key: str) -> web.StreamResponse:
        filename = blobs.verify_download(key, request.query)
        blob = await blobs.head(key)
        if blob is None:
            raise web.HTTPNotFound
        headers = {"Content-Type": blob.content_type, "Content-Disposition": f'attachment; filename="{filename}"'}
        return web.FileResponse(blobs.path(key), headers=headers)

    app = web.Application()
    app.router.add_route("*", files.ROUTE + "{key:.+}", handle)
    async with TestServer(app) as server:
        blobs.set_base_url(str(server.make_url("")))
        yield


def new_key(folder: str = "results/t1") -> str:
    return f"{folder}/{uuid.uuid4()}"


def cat_url(blobs: Blobs, key: str) -> str:
    return blobs.upload_url(key, content_type=PNG, description=CAT, expires_s=SIGNED_S)


async def status_of(client: aiohttp.ClientSession, verb: str, url: str, headers: dict[str, str]) -> int:
    async with client.request(verb, url, data=b"meow" if verb == "PUT" else None, headers=headers) as answer:
        await answer.read()
        return answer.status


# -- objects -----------------------------------------------------------------------------------


async def test_what_was_put_is_got(blobs: Blobs) -> None:
    key = new_key()
    body = os.urandom(100_000)
    assert await blobs.put(key, body, content_type="application/zip") == hashlib.sha256(body).hexdigest()
    assert await blobs.get(key, limit_bytes=len(body)) == body


async def test_an_empty_object_is_an_object(blobs: Blobs) -> None:
    key = new_key()
    await blobs.put(key, b"", content_type="text/plain")
    assert await blobs.get(key, limit_bytes=0) == b""
    blob = await blobs.head(key)
    assert blob is not None
    assert blob.size_bytes == 0


async def test_head_tells_size_type_and_time(blobs: Blobs) -> None:
    key = new_key()
    before = time.time()
    await blobs.put(key, b"12345", content_type="text/plain; charset=utf-8")
    blob = await blobs.head(key)
    assert blob is not None
    assert (blob.key, blob.size_bytes, blob.content_type) == (key, 5, "text/plain; charset=utf-8")
    assert before - 1.5 < blob.modified_at < time.time() + 1.5


async def test_a_second_put_replaces_the_first(blobs: Blobs) -> None:
    key = new_key()
    await blobs.put(key, b"first, and longer", content_type="text/plain")
    await blobs.put(key, b"second", content_type="application/json")
    blob = await blobs.head(key)
    assert blob is not None
    assert blob.content_type == "application/json"
    assert await blobs.get(key, limit_bytes=100) == b"second"


async def test_the_unknown_is_none_or_not_found(blobs: Blobs, tmp_path: Path) -> None:
    key = new_key()
    assert await blobs.head(key) is None
    assert await blobs.list(f"{key}/") == []
    assert not await blobs.delete(key)
    with pytest.raises(NotFound):
        await blobs.get(key, limit_bytes=10)
    with pytest.raises(NotFound):
        await blobs.download(key, tmp_path / "copy")
    assert files_under(tmp_path, "copy*") == []


async def test_get_refuses_what_is_past_the_limit(blobs: Blobs) -> None:
    key = new_key()
    await blobs.put(key, b"123456", content_type="text/plain")
    with pytest.raises(PayloadTooLarge) as refusal:
        await blobs.get(key, limit_bytes=5)
    assert refusal.value.limit_bytes == 5


async def test_a_copy_is_an_object_of_its_own(blobs: Blobs) -> None:
    key, other = new_key(), new_key()
    await blobs.put(key, b"as it was", content_type="text/plain")
    await blobs.copy(key, other)
    await blobs.copy(key, other)
    assert await blobs.delete(key)
    assert await blobs.get(other, limit_bytes=100) == b"as it was"
    with pytest.raises(NotFound):
        await blobs.copy(key, new_key())


async def test_delete_says_whether_there_was_one(blobs: Blobs) -> None:
    key = new_key()
    await blobs.put(key, b"x", content_type="text/plain")
    assert await blobs.delete(key)
    assert not await blobs.delete(key)
    assert await blobs.head(key) is None


async def test_what_was_discarded_is_gone(blobs: Blobs) -> None:
    key = new_key()
    await blobs.put(key, b"x", content_type="text/plain")
    for _ in range(2):
        await blobs.discard(key)
        assert await blobs.head(key) is None


async def test_list_never_leaves_its_prefix(blobs: Blobs) -> None:
    account = uuid.uuid4().hex
    ours, deeper = f"assets/{account}1/a", f"assets/{account}1/b/c"
    for key in (ours, deeper, f"assets/{account}10/a", f"assets/{account}/a", f"other/{account}1/a"):
        await blobs.put(key, b"abc", content_type="text/plain")
    listed = await blobs.list(f"assets/{account}1/")
    assert [blob.key for blob in listed] == [ours, deeper]
    assert [blob.size_bytes for blob in listed] == [3, 3]


async def test_pages_go_through_all_objects_in_order(blobs: Blobs) -> None:
    prefix = f"inputs/{uuid.uuid4()}/"
    keys = sorted(f"{prefix}{uuid.uuid4()}" for _ in range(7))
    for key in keys:
        await blobs.put(key, b"12", content_type="text/plain")
    seen: list[str] = []
    while page := await blobs.page(prefix, after=seen[-1] if seen else "", limit=3):
        assert len(page) <= 3
        assert all(time.time() - blob.modified_at < 60 for blob in page)
        seen += [blob.key for blob in page]
    assert seen == keys


async def test_there_is_no_page_of_nothing(blobs: Blobs) -> None:
    assert await blobs.page(f"inputs/{uuid.uuid4()}/", after="", limit=3) == ()


async def test_only_what_was_cut_off_long_ago_is_discarded(blobs: Blobs) -> None:
    assert await blobs.discard_unfinished(older_than_s=3600) == 0
    await leave_half_an_upload(blobs)
    assert await blobs.discard_unfinished(older_than_s=3600) == 0
    assert await blobs.discard_unfinished(older_than_s=-60) == 1
    assert await blobs.discard_unfinished(older_than_s=-60) == 0


async def leave_half_an_upload(blobs: Blobs) -> None:
    """As a sidecar that was killed."""
    if isinstance(blobs, S3Blobs):
        client, bucket = blobs._client, blobs._bucket
        begun = await asyncio.to_thread(client.create_multipart_upload, Bucket=bucket, Key=new_key())
        part = {"Bucket": bucket, "Key": begun["Key"], "UploadId": begun["UploadId"], "PartNumber": 1, "Body": b"x"}
        await asyncio.to_thread(lambda: client.upload_part(**part))  # type: ignore[arg-type]  # as a whole it is right
    else:
        assert isinstance(blobs, FileBlobs)
        (blobs.path("a").parent.parent / "drafts" / "half").write_bytes(b"x")


async def test_list_returns_more_than_one_page(blobs: Blobs) -> None:
    prefix = f"results/{uuid.uuid4().hex}/"
    keys = [f"{prefix}{number:04}" for number in range(1050)]
    async with asyncio.TaskGroup() as group:
        for key in keys:
            group.create_task(blobs.put(key, b"", content_type="text/plain"))
    assert [blob.key for blob in await blobs.list(prefix)] == keys


async def test_many_calls_at_once_do_not_mix(blobs: Blobs) -> None:
    bodies = {new_key(): os.urandom(10_000) for _ in range(200)}

    async def there_and_back(key: str, body: bytes) -> bool:
        await blobs.put(key, body, content_type="text/plain")
        return await blobs.get(key, limit_bytes=10_000) == body

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(there_and_back(key, body)) for key, body in bodies.items()]
    assert all(task.result() for task in tasks)


async def test_racing_puts_leave_one_whole_object(blobs: Blobs) -> None:
    key = new_key()
    bodies = [bytes([number]) * 200_000 for number in range(8)]
    async with asyncio.TaskGroup() as group:
        for body in bodies:
            group.create_task(blobs.put(key, body, content_type="text/plain"))
    assert await blobs.get(key, limit_bytes=200_000) in bodies


async def test_ping_answers(blobs: Blobs) -> None:
    await blobs.ping()


# -- files -------------------------------------------------------------------------------------


async def test_a_large_file_goes_there_and_back_in_flat_memory(blobs: Blobs, tmp_path: Path) -> None:
    key, source, copy = new_key(), tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(MIB) * (BIG_BYTES // MIB - 1) + b"the end")
    with tracked() as peak_bytes:
        await blobs.upload(key, copying(source), content_type="application/zip", scratch=tmp_path)
        await blobs.download(key, copy)
        assert peak_bytes() < FLAT_BYTES
    blob = await blobs.head(key)
    assert blob is not None
    assert (blob.size_bytes, blob.content_type) == (source.stat().st_size, "application/zip")
    assert copy.read_bytes() == source.read_bytes()
    assert files_under(tmp_path, "copy*") == [copy]


async def test_a_small_file_keeps_its_content_type(blobs: Blobs, tmp_path: Path) -> None:
    key, source = new_key(), tmp_path / "source"
    source.write_bytes(b"zip")
    await blobs.upload(key, copying(source), content_type="application/zip", scratch=tmp_path)
    blob = await blobs.head(key)
    assert blob is not None
    assert (blob.size_bytes, blob.content_type) == (3, "application/zip")


async def test_a_cancelled_download_leaves_no_file(blobs: Blobs, tmp_path: Path) -> None:
    key, source, copy = new_key(), tmp_path / "source", tmp_path / "copy"
    source.write_bytes(bytes(BIG_BYTES))
    await blobs.upload(key, copying(source), content_type="application/zip", scratch=tmp_path)
    download = asyncio.ensure_future(blobs.download(key, copy))

    async def begun() -> bool:
        return download.done() or bool(files_under(tmp_path, "copy?*"))

    await until(begun)
    download.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await download
    assert files_under(tmp_path, "copy?*") == []


async def test_a_cancelled_upload_stores_all_or_nothing(blobs: Blobs, tmp_path: Path) -> None:
    key, source = new_key(), tmp_path / "source"
    source.write_bytes(bytes(BIG_BYTES))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await blobs.upload(key, copying(source), content_type="application/zip", scratch=tmp_path)
    blob = await blobs.head(key)
    assert blob is None or blob.size_bytes == BIG_BYTES
    assert files_under(tmp_path, "part*") == []


async def test_an_upload_whose_writer_fails_stores_nothing(blobs: Blobs, tmp_path: Path) -> None:
    def write(sink: Sink) -> None:
        for _ in range(s3.PART_BYTES * 2 // MIB + 1):
            sink.write(bytes(MIB))
        raise LookupError("no more")

    key = new_key()
    await blobs.put(key, b"old", content_type=PNG)
    with pytest.raises(LookupError):
        await blobs.upload(key, write, content_type="application/zip", scratch=tmp_path)
    assert await blobs.get(key, limit_bytes=3) == b"old"
    assert files_under(tmp_path, "part*") == []


@pytest.mark.parametrize("size_bytes", [0, s3.PART_BYTES - 1, s3.PART_BYTES, s3.PART_BYTES + 1, 2 * s3.PART_BYTES])
async def test_an_upload_ends_anywhere_in_a_part(blobs: Blobs, tmp_path: Path, size_bytes: int) -> None:
    def write(sink: Sink) -> None:
        assert sink.write(body) == size_bytes

    key, body = new_key(), os.urandom(size_bytes)
    await blobs.upload(key, write, content_type="application/zip", scratch=tmp_path)
    assert await blobs.get(key, limit_bytes=size_bytes) == body
    assert files_under(tmp_path, "part*") == []


async def test_a_cancelled_upload_stops_its_writer(blobs: Blobs, tmp_path: Path) -> None:
    stopped = threading.Event()

    def write(sink: Sink) -> None:
        try:
            while True:
                sink.write(b"for ever")
                begun.set()
        finally:
            stopped.set()

    begun = threading.Event()
    key = new_key()
    upload = asyncio.ensure_future(blobs.upload(key, write, content_type=PNG, scratch=tmp_path))
    assert await asyncio.to_thread(begun.wait, 10)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert stopped.is_set()
    assert await blobs.head(key) is None


# -- signed uploads ----------------------------------------------------------------------------


async def test_a_signed_put_stores_body_type_and_description(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key = new_key("assets/t1")
    assert await status_of(client, "PUT", cat_url(blobs, key), HEADERS) == 200
    blob = await blobs.head(key)
    assert blob is not None
    assert (blob.size_bytes, blob.content_type, blob.description) == (4, PNG, CAT)
    assert await blobs.get(key, limit_bytes=4) == b"meow"


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"Content-Type": "image/jpeg"}, id="other type"),
        pytest.param({"Content-Type": "image/png; charset=utf-8"}, id="type with a parameter"),
        pytest.param({DESCRIPTION_HEADER: "A dog"}, id="other description"),
        pytest.param({DESCRIPTION_HEADER: CAT.lower()}, id="description in other case"),
        pytest.param({DESCRIPTION_HEADER: None}, id="no description"),
    ],
)
async def test_a_signed_put_with_other_headers_is_refused(
    blobs: Blobs, client: aiohttp.ClientSession, changed: dict[str, str | None]
) -> None:
    key = new_key("assets/t1")
    headers = {name: value for name, value in {**HEADERS, **changed}.items() if value is not None}
    assert await status_of(client, "PUT", cat_url(blobs, key), headers) == 403
    assert await blobs.head(key) is None


@pytest.mark.parametrize("verb", ["GET", "HEAD", "DELETE", "POST"])
async def test_a_url_for_put_allows_no_other_verb(blobs: Blobs, client: aiohttp.ClientSession, verb: str) -> None:
    key = new_key("assets/t1")
    await blobs.put(key, b"meow", content_type=PNG)
    assert await status_of(client, verb, cat_url(blobs, key), HEADERS) == 403
    assert await blobs.head(key) is not None


async def test_a_signed_put_allows_no_other_key(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key, other = new_key("assets/t1"), new_key("assets/t1")
    url = cat_url(blobs, key).replace(key, other)
    assert await status_of(client, "PUT", url, HEADERS) == 403
    assert await blobs.head(other) is None


async def test_a_signed_put_takes_the_size_that_was_said_and_no_other(
    blobs: Blobs, client: aiohttp.ClientSession
) -> None:
    """`status_of` sends four bytes."""
    for size_bytes, expected in ((3, 403), (5, 403), (4, 200)):
        key = new_key("assets/t1")
        url = blobs.upload_url(key, content_type=PNG, description=CAT, expires_s=SIGNED_S, size_bytes=size_bytes)
        assert await status_of(client, "PUT", url, HEADERS) == expected
        assert (await blobs.head(key) is not None) == (expected == 200)


async def test_no_part_of_a_signed_url_can_be_changed(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key = new_key("assets/t1")
    url = blobs.upload_url(key, content_type=PNG, description=CAT, expires_s=SIGNED_S, size_bytes=4)
    base, _, query = url.partition("?")
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        tampered = f"{value[:-1]}{'1' if value[-1] != '1' else '2'}"
        changed = f"{base}?{query.replace(pair, f'{name}={tampered}')}"
        removed = f"{base}?{'&'.join(part for part in query.split('&') if part != pair)}"
        assert await refused(client, "PUT", changed), name
        assert await refused(client, "PUT", removed), name
    assert await refused(client, "PUT", base)
    assert await blobs.head(key) is None


async def refused(client: aiohttp.ClientSession, verb: str, url: str) -> bool:
    """400 counts: AWS answers it when a part of the signature cannot be read, rclone when the URL has expired."""
    return await status_of(client, verb, url, HEADERS) in (400, 403)


async def test_an_expired_put_is_refused(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    url = blobs.upload_url(new_key("assets/t1"), content_type=PNG, description=CAT, expires_s=1)
    await until(lambda: refused(client, "PUT", url))


async def test_a_large_signed_put_and_get_pass_in_flat_memory(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key = new_key("assets/t1")

    async def body() -> AsyncIterator[bytes]:
        for _ in range(BIG_BYTES // MIB):
            yield bytes(MIB)

    headers = {**HEADERS, "Content-Length": str(BIG_BYTES)}
    with tracked() as peak_bytes:
        async with client.put(cat_url(blobs, key), data=body(), headers=headers) as answer:
            assert answer.status == 200
        url = blobs.download_url(key, filename="cat.png", expires_s=SIGNED_S)
        async with client.get(url) as answer:
            received = sum([len(chunk) async for chunk in answer.content.iter_chunked(MIB)])
        assert peak_bytes() < FLAT_BYTES
    assert received == BIG_BYTES


# -- signed downloads --------------------------------------------------------------------------


async def test_a_signed_get_is_an_attachment_for_whoever_holds_it(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key = new_key()
    await blobs.put(key, b"zipped", content_type="application/zip")
    url = blobs.download_url(key, filename='a"b\r\nX: 1/../ü.zip', expires_s=SIGNED_S)
    async with client.get(url) as answer:
        assert (answer.status, await answer.read()) == (200, b"zipped")
        assert answer.headers["Content-Type"] == "application/zip"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="a_b__X__1_..__.zip"'
        assert "X" not in answer.headers


async def test_a_signed_get_serves_ranges(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key = new_key()
    await blobs.put(key, b"0123456789", content_type="application/zip")
    url = blobs.download_url(key, filename="x.zip", expires_s=SIGNED_S)
    async with client.get(url, headers={"Range": "bytes=2-4"}) as answer:
        assert answer.ok  # 206; rclone says 200
        assert await answer.read() == b"234"


async def test_a_signed_get_of_nothing_is_404(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    url = blobs.download_url(new_key(), filename="x.zip", expires_s=SIGNED_S)
    assert await status_of(client, "GET", url, {}) == 404


@pytest.mark.parametrize("verb", ["PUT", "HEAD", "DELETE"])
async def test_a_url_for_get_allows_no_other_verb(blobs: Blobs, client: aiohttp.ClientSession, verb: str) -> None:
    key = new_key()
    await blobs.put(key, b"kept", content_type="application/zip")
    url = blobs.download_url(key, filename="x.zip", expires_s=SIGNED_S)
    assert await status_of(client, verb, url, {}) == 403
    assert await blobs.get(key, limit_bytes=4) == b"kept"


async def test_a_signed_get_allows_no_other_key(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key, other = new_key(), new_key()
    await blobs.put(other, b"secret", content_type="application/zip")
    url = blobs.download_url(key, filename="x.zip", expires_s=SIGNED_S)
    assert await status_of(client, "GET", url.replace(key, other), {}) == 403


async def test_an_expired_get_is_refused(blobs: Blobs, client: aiohttp.ClientSession) -> None:
    key = new_key()
    await blobs.put(key, b"old", content_type="application/zip")
    url = blobs.download_url(key, filename="x.zip", expires_s=1)
    await until(lambda: refused(client, "GET", url))


# -- S3 alone ----------------------------------------------------------------------------------


async def test_s3_away_is_unavailable_and_opening_survives_it(new_s3: Callable[[], S3], tmp_path: Path) -> None:
    server = new_s3()
    server.stop()
    async with asyncio.timeout(60), open_s3(server.url) as blobs:
        await all_unavailable(blobs, server, tmp_path)
        await asyncio.to_thread(server.start)
        await blobs.put("a/b", b"x", content_type=PNG)
        await blobs.ping()


async def test_s3_that_dies_is_unavailable_until_it_is_back(new_s3: Callable[[], S3], tmp_path: Path) -> None:
    server = new_s3()
    async with asyncio.timeout(60), open_s3(server.url) as blobs:
        await blobs.put("a/b", b"x", content_type=PNG)
        await asyncio.to_thread(server.kill)
        await all_unavailable(blobs, server, tmp_path)
        await asyncio.to_thread(server.start)
        assert await blobs.get("a/b", limit_bytes=1) == b"x"


async def all_unavailable(blobs: S3Blobs, server: S3, tmp_path: Path) -> None:
    """Every call says so, and none says where the server is or what its secret is."""
    source = tmp_path / "source"
    source.write_bytes(bytes(s3.PART_BYTES + 1))
    outcomes = await asyncio.gather(
        blobs.ping(),
        blobs.head("a/b"),
        blobs.list("a/"),
        blobs.get("a/b", limit_bytes=1),
        blobs.put("a/b", b"x", content_type=PNG),
        blobs.delete("a/b"),
        blobs.upload("a/b", copying(source), content_type=PNG, scratch=tmp_path),
        blobs.download("a/b", tmp_path / "copy"),
        return_exceptions=True,
    )
    for outcome in outcomes:
        assert isinstance(outcome, BlobsUnavailable)
        assert server.secret_key not in str(outcome)
        assert str(server.port) not in str(outcome)
    assert files_under(tmp_path, "copy*") == []


async def test_an_upload_ends_when_its_bucket_is_closed(s3: S3, tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def write(sink: Sink) -> None:
        try:
            while True:
                sink.write(bytes(MIB))
                begun.set()
        finally:
            ended.set()

    async with asyncio.timeout(30):
        async with open_s3(s3.url) as blobs:
            upload = asyncio.ensure_future(blobs.upload(new_key(), write, content_type=PNG, scratch=tmp_path))
            assert await asyncio.to_thread(begun.wait, 10)
            await asyncio.sleep(0.3)  # parts wait for their turn by then
        with pytest.raises(BlobsUnavailable):
            await upload
    assert ended.is_set()
    assert files_under(tmp_path, "part*") == []


async def test_a_silent_s3_is_unavailable_in_time() -> None:
    async with asyncio.timeout(20), silent_server() as port:
        url = f"s3://access:secret@{LOOPBACK}:{port}/bucket?tls=false"
        async with s3.open_blobs(url, load(Settings, blobs_timeout_s=0.5), make=False) as blobs:
            with pytest.raises(BlobsUnavailable, match=r"within 0\.5 s"):
                await blobs.head("a/b")


async def test_what_goes_wrong_once_is_repeated_by_boto() -> None:
    """A refusal, and an answer that is cut short."""
    body = os.urandom(100_000)
    agents: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD":
            return web.Response()
        agents.append((request.method, "boto" if "Boto3" in request.headers.get("User-Agent", "") else "short"))
        assert request.method != "PUT" or await request.read() == body
        if len(agents) % 2:
            if request.method != "GET":
                return web.Response(status=503)
            cut = web.StreamResponse(headers={"Content-Length": str(len(body))})
            await cut.prepare(request)
            await cut.write(body[:5000])
            assert request.transport is not None
            request.transport.close()
            return cut
        if request.method == "GET":
            return web.Response(body=body)
        return web.Response(status=204 if request.method == "DELETE" else 200)

    app = web.Application()
    app.add_routes([web.route("*", "/{path:.*}", answer)])
    async with TestServer(app) as server:
        url = f"s3://access:secret@{LOOPBACK}:{server.port}/bucket?tls=false"
        async with open_s3(url) as blobs:
            assert await blobs.put("a/b", body, content_type=PNG) == hashlib.sha256(body).hexdigest()
            assert await blobs.get("a/b", limit_bytes=len(body)) == body
            await blobs.discard("a/b")
    assert agents == [(method, agent) for method in ("PUT", "GET", "DELETE") for agent in ("short", "boto")]


async def test_a_part_that_is_refused_once_is_sent_again_by_boto(tmp_path: Path) -> None:
    sent: dict[str, list[bytes]] = {}
    completed = b""

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal completed
        if "uploads" in request.query:
            return web.Response(body=b"<Upload><UploadId>1/&amp;</UploadId></Upload>", content_type="application/xml")
        if request.method == "POST":
            completed = await request.read()
            return web.Response(body=b"<Done><ETag>whole</ETag></Done>", content_type="application/xml")
        if request.method == "PUT":
            assert request.query["uploadId"] == "1/&"
            number = request.query["partNumber"]
            tries = sent.setdefault(number, [])
            tries.append(hashlib.sha256(await request.read()).digest())
            return web.Response(status=503 if len(tries) == 1 else 200, headers={"ETag": f'"part {number}"'})
        return web.Response()

    content = os.urandom(s3.PART_BYTES + MIB)
    path = tmp_path / "file"
    path.write_bytes(content)
    app = web.Application(client_max_size=s3.PART_BYTES + MIB)
    app.add_routes([web.route("*", "/{path:.*}", answer)])
    async with TestServer(app) as server, open_s3(f"s3://a:b@{LOOPBACK}:{server.port}/bucket?tls=false") as blobs:
        await blobs.upload("a/b", copying(path), content_type=PNG, scratch=tmp_path)
    parts = content[: s3.PART_BYTES], content[s3.PART_BYTES :]
    digests = [hashlib.sha256(part).digest() for part in parts]
    assert sent == {"1": [digests[0]] * 2, "2": [digests[1]] * 2}
    assert completed.index(b"part 1") < completed.index(b"part 2")


async def test_a_wrong_secret_is_unavailable(s3: S3) -> None:
    url = s3.url.replace(s3.secret_key, "wrong")
    async with open_s3(url) as blobs:
        with pytest.raises(BlobsUnavailable, match="the blob store refused"):
            await blobs.ping()


async def test_the_bucket_is_made_when_it_is_missing(s3: S3) -> None:
    bucket = f"made-{uuid.uuid4().hex}"
    url = s3.url.replace(f"/{s3.bucket}?", f"/{bucket}?")
    async with open_s3(url), open_s3(url) as blobs:
        await blobs.put("a/b", b"x", content_type=PNG)
        assert await blobs.head("a/b") is not None


async def test_an_object_outlives_a_server_that_forgets_what_it_was(new_s3: Callable[[], S3]) -> None:
    """rclone keeps metadata in memory; AWS and MinIO keep it."""
    server = new_s3()
    async with open_s3(server.url) as blobs, aiohttp.ClientSession() as client:
        await status_of(client, "PUT", cat_url(blobs, "assets/t1/a"), HEADERS)
        await asyncio.to_thread(server.restart)
        blob = await blobs.head("assets/t1/a")
        assert blob is not None
        assert (blob.size_bytes, blob.content_type, blob.description) == (4, "application/octet-stream", "")


async def test_urls_are_signed_for_the_public_endpoint(s3: S3) -> None:
    url = f"{s3.url}&public_endpoint={quote('https://files.example.com:9000', safe='')}"
    async with open_s3(url) as blobs:
        signed = urlsplit(cat_url(blobs, "a/b"))
        assert (signed.scheme, signed.netloc) == ("https", "files.example.com:9000")
        assert signed.path == f"/{s3.bucket}/a/b"
        await blobs.ping()


async def test_the_one_type_that_boto_would_not_sign_is_refused(s3: S3) -> None:
    async with open_s3(s3.url) as blobs:
        with pytest.raises(BadRequest) as refusal:
            blobs.upload_url(
                "a/b",
                content_type="application/x-www-form-urlencoded; charset=utf-8",
                description=CAT,
                expires_s=SIGNED_S,
            )
        assert refusal.value.field == "contentType"


async def test_percent_encoded_credentials_are_decoded() -> None:
    async with open_s3(f"s3://ac%2Fcess:se%40cret%3A@{LOOPBACK}:{free_port()}/bucket?tls=false") as blobs:
        assert "X-Amz-Credential=ac%2Fcess%2F" in cat_url(blobs, "a/b")


@pytest.mark.parametrize(
    "url",
    [
        "s3://access:secret@host:99999/bucket",
        "s3://access:secret@host/",
        "s3://access:secret@host/Bad_Bucket",
        "s3://access:secret@host/bucket/key",
        "s3://access@host/bucket",
        "s3://access:secret@host/bucket?tls=maybe",
        "s3://access:secret@host/bucket?colour=secret",
        "s3://access:secret@host/bucket?public_endpoint=files.example.com",
        "s3://access:sec/ret@host/bucket",
    ],
)
async def test_a_bad_s3_url_is_a_configuration_error_that_repeats_no_secret(url: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        async with open_s3(url):
            pass
    assert "secret" not in str(refusal.value)


def open_s3(url: str) -> contextlib.AbstractAsyncContextManager[S3Blobs]:
    return s3.open_blobs(url, load(Settings, blobs_timeout_s=5))


# -- the folder alone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "a/../../b", "..", "a/./b", "a//b", "a/", "a\0b", "a\\b", "a b", "a%2e", "ü", ".hidden", "a\n"],
)
async def test_a_key_that_could_leave_the_folder_is_refused(folder: FileBlobs, key: str) -> None:
    with pytest.raises(BadRequest):
        await folder.put(key, b"x", content_type=PNG)
    with pytest.raises(BadRequest):
        await folder.head(key)
    with pytest.raises(BadRequest):
        folder.path(key)
    with pytest.raises(Forbidden):
        folder.verify_upload(key, {}, content_type=PNG, description=CAT, size_bytes=4)


async def test_a_cut_upload_leaves_nothing(folder: FileBlobs, tmp_path: Path) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield bytes(3 * MIB)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await folder.receive("a/b", cut(), content_type=PNG, description=CAT, limit_bytes=LIMIT_BYTES)
    assert files_under(tmp_path) == []


async def test_a_cancelled_upload_leaves_nothing(folder: FileBlobs, tmp_path: Path) -> None:
    stuck = asyncio.Event()

    async def hang() -> AsyncIterator[bytes]:
        yield bytes(3 * MIB)
        stuck.set()
        await asyncio.Event().wait()

    upload = asyncio.ensure_future(
        folder.receive("a/b", hang(), content_type=PNG, description=CAT, limit_bytes=LIMIT_BYTES)
    )
    await stuck.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert files_under(tmp_path) == []


async def test_an_upload_past_the_limit_leaves_nothing(folder: FileBlobs, tmp_path: Path) -> None:
    async def much() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield bytes(MIB)

    with pytest.raises(PayloadTooLarge):
        await folder.receive("a/b", much(), content_type=PNG, description=CAT, limit_bytes=3 * MIB)
    assert files_under(tmp_path) == []


async def test_a_failed_upload_keeps_the_object_that_was_there(folder: FileBlobs) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield b"new"
        raise ConnectionResetError

    await folder.put("a/b", b"old", content_type=PNG)
    with pytest.raises(ConnectionResetError):
        await folder.receive("a/b", cut(), content_type="text/plain", description=CAT, limit_bytes=100)
    blob = await folder.head("a/b")
    assert blob is not None
    assert blob.content_type == PNG
    assert await folder.get("a/b", limit_bytes=3) == b"old"


async def test_objects_outlive_the_process(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/blobs"
    async with files.open_blobs(url, load(Settings)) as first:
        await first.put("a/b", b"kept", content_type=PNG)
    async with files.open_blobs(url, load(Settings)) as second:
        assert await second.get("a/b", limit_bytes=4) == b"kept"


async def test_urls_hold_for_every_process_with_the_secret(tmp_path: Path) -> None:
    url, key = f"file://{tmp_path}/blobs", "a/b"
    ours, theirs = (load(Settings, secret_key=SecretStr(letter * 32)) for letter in "xy")
    async with (
        files.open_blobs(url, ours) as first,
        files.open_blobs(url, ours) as second,
        files.open_blobs(url, theirs) as stranger,
    ):
        first.set_base_url("http://host")
        signed = urlsplit(first.download_url(key, filename="x.zip", expires_s=SIGNED_S))
        query = dict(pair.split("=") for pair in signed.query.split("&"))
        assert second.verify_download(key, query) == "x.zip"
        with pytest.raises(Forbidden):
            stranger.verify_download(key, query)


async def test_no_url_is_signed_before_the_api_has_an_address(tmp_path: Path) -> None:
    async with files.open_blobs(f"file://{tmp_path}/blobs", load(Settings)) as folder:
        with pytest.raises(BlobsUnavailable):
            cat_url(folder, "a/b")


async def test_the_default_folder_is_under_the_data_folder(tmp_path: Path) -> None:
    async with files.open_blobs("file://", load(Settings, data_dir=tmp_path)) as folder:
        assert folder.path("a/b").is_relative_to(tmp_path / "blobs")


async def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (f"file://{tmp_path}/file/blobs", "file://host/folder"):
        with pytest.raises(ConfigurationError):
            async with files.open_blobs(url, load(Settings)):
                pass


async def test_drafts_of_a_killed_process_are_swept_after_a_day(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/blobs"
    async with files.open_blobs(url, load(Settings)):
        pass
    old, young = tmp_path / "blobs/drafts/old", tmp_path / "blobs/drafts/young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    async with files.open_blobs(url, load(Settings)):
        assert (old.exists(), young.exists()) == (False, True)


# -- means -------------------------------------------------------------------------------------


def copying(path: Path) -> Callable[[Sink], None]:
    def write(sink: Sink) -> None:
        with path.open("rb") as file:
            while chunk := file.read(MIB):
                sink.write(chunk)

    return write


def files_under(folder: Path, name: str = "*") -> list[Path]:
    return [path for path in folder.rglob(name) if path.is_file()]


@contextlib.contextmanager
def tracked() -> Iterator[Callable[[], int]]:
    """Bytes that Python held at most since the beginning of the block, in all threads."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """Accepts connections and never says a word."""
    quiet = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await quiet.wait()
        writer.close()

    server = await asyncio.start_server(hold, LOOPBACK, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        quiet.set()


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    """Look again until it is so, for ten seconds."""
    async with asyncio.timeout(20):
        while not await true():  # noqa: ASYNC110  a server's clock tells nobody when it moves on
            await asyncio.sleep(0.01)
