"""What a function is given: JSON, with files in it, or one file as it is.

A file that fits goes along in the body; one that does not is uploaded first, and the body names it. Inside JSON a file
is a data URL, `data:image/png;base64,…` or `data:image/png;asset_id,<asset ID>`, as NVIDIA's own functions read them.
A file in place of JSON is the body itself, or an asset beside an empty body.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import mimetypes
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

# What a server takes in a body unless it was told otherwise (FNQUEUE_MAX_BODY_BYTES).
MAX_BODY_BYTES = 5 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
UNKNOWN_TYPE = "application/octet-stream"
_UNPRINTABLE = re.compile(r"[^ -~]+")
_LONGEST_NAME = 200


class Readable(Protocol):
    """A binary file object, or what is read like one."""

    def read(self, size: int = -1, /) -> bytes: ...


FileLike: TypeAlias = bytes | bytearray | memoryview | os.PathLike[str] | Readable


@dataclass(frozen=True, slots=True)
class File:
    """A file among the inputs, where more is to be said of it than a path, bytes or a file object do.

    `content_type` is guessed by the name where it is not given. `upload`: as an asset, however small it is.
    """

    content: FileLike
    content_type: str = ""
    name: str = ""
    upload: bool = False


class Opened:
    """A file whose size is known, which can be read from its beginning any number of times."""

    def __init__(self, stream: IO[bytes], start: int, size_bytes: int, about: File) -> None:
        self._stream = stream
        self._start = start
        self.size_bytes = size_bytes
        self.name = about.name
        self.content_type = about.content_type or mimetypes.guess_type(about.name)[0] or UNKNOWN_TYPE
        self.forced = about.upload

    @property
    def description(self) -> str:
        """As an asset is described: printable ASCII, never empty."""
        return _UNPRINTABLE.sub("_", self.name)[:_LONGEST_NAME].strip() or "input"

    def read(self) -> bytes:
        self._stream.seek(self._start)
        return self._stream.read(self.size_bytes)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    async def chunks(self, sent: Callable[[int], None]) -> AsyncIterator[bytes]:
        """From the beginning; `sent` is told how many bytes were asked for so far. Raises OSError: it got shorter."""
        reading, done = self._chunks(), 0
        while chunk := await asyncio.to_thread(next, reading, b""):
            yield chunk
            done += len(chunk)
            sent(done)

    def _chunks(self) -> Iterator[bytes]:
        self._stream.seek(self._start)
        left = self.size_bytes
        while left:
            chunk = self._stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{self.name or 'a file'} ended {left} bytes before its end")
            left -= len(chunk)
            yield chunk


class Input:
    """An input with its files open. `to_upload` is what does not fit into the body."""

    def __init__(self, value: Any, files: Mapping[int, Opened], *, whole: bool, max_body_bytes: int) -> None:
        self._value = value
        self._files = files
        self._whole = whole
        self.to_upload: Mapping[int, Opened] = {at: files[at] for at in self._chosen(max_body_bytes)}

    def body(self, asset_ids: Mapping[int, str]) -> tuple[bytes, str]:
        """The body and its type, once all of `to_upload` have an ID. Raises TypeError, ValueError: it is no JSON."""
        if self._whole:
            [(at, file)] = self._files.items()
            return (b"", "application/json") if at in asset_ids else (file.read(), file.content_type)

        def url(at: int) -> str:
            file = self._files[at]
            if at in asset_ids:
                return f"data:{file.content_type};asset_id,{asset_ids[at]}"
            return f"data:{file.content_type};base64,{base64.b64encode(file.read()).decode()}"

        return _encoded(_replaced(self._value, url)), "application/json"

    def _chosen(self, max_body_bytes: int) -> list[int]:
        if self._whole:
            return [at for at, file in self._files.items() if file.forced or file.size_bytes > max_body_bytes]
        size_bytes = len(_encoded(_replaced(self._value, lambda at: "x" * len(self._files[at].content_type))))
        inline = {at: 4 * (-(-file.size_bytes // 3)) + 16 for at, file in self._files.items()}
        forced = [at for at, file in self._files.items() if file.forced]
        return forced + outsized(
            {at: size for at, size in inline.items() if at not in forced}, max_body_bytes - size_bytes
        )


def outsized(sizes: Mapping[int, int], room: int) -> list[int]:
    """Those that have to go for the others to fit, the largest first."""
    found, total = [], sum(sizes.values())
    for at, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if total <= room:
            break
        found.append(at)
        total -= size
    return found


@contextlib.contextmanager
def opened(value: Any, *, max_body_bytes: int = MAX_BODY_BYTES) -> Iterator[Input]:
    """The input with its files open; closed again are those that were opened here.

    Raises: OSError: a file cannot be read. TypeError, ValueError: the rest is no JSON.
    """
    files: dict[int, Opened] = {}
    with contextlib.ExitStack() as stack:

        def noted(found: File) -> _Place:
            place = _Place(len(files))
            files[place.at] = _open(found, stack)
            return place

        whole = isinstance(value, File) or _is_file(value)
        marked = _marked(value, noted)
        yield Input(marked, files, whole=whole, max_body_bytes=max_body_bytes)


@dataclass(frozen=True, slots=True)
class _Place:
    at: int


def _marked(value: Any, noted: Callable[[File], _Place]) -> Any:
    if isinstance(value, File):
        return noted(value)
    if _is_file(value):
        return noted(File(value))
    if isinstance(value, Mapping):
        return {name: _marked(each, noted) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_marked(each, noted) for each in value]
    return value


def _replaced(value: Any, url: Callable[[int], str]) -> Any:
    if isinstance(value, _Place):
        return url(value.at)
    if isinstance(value, dict):
        return {name: _replaced(each, url) for name, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, url) for each in value]
    return value


def _is_file(value: Any) -> bool:
    return isinstance(value, bytes | bytearray | memoryview | os.PathLike) or hasattr(value, "read")


def _encoded(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _open(file: File, stack: contextlib.ExitStack) -> Opened:
    content = file.content
    if isinstance(content, os.PathLike):
        path = Path(content)
        stream: IO[bytes] = stack.enter_context(path.open("rb"))
        about = File(content, file.content_type, file.name or path.name, file.upload)
        return Opened(stream, 0, os.fstat(stream.fileno()).st_size, about)
    if isinstance(content, bytes | bytearray | memoryview):
        return _spooled(iter([bytes(content)]), file, stack)
    own = getattr(content, "name", "")
    about = File(content, file.content_type, file.name or (Path(own).name if isinstance(own, str) else ""), file.upload)
    return _spooled(iter(lambda: content.read(CHUNK_BYTES), b""), about, stack)


def _spooled(chunks: Iterator[bytes], about: File, stack: contextlib.ExitStack) -> Opened:
    """In memory, or on disk once it is large: a file object may be read once only, or by others meanwhile."""
    stream: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=MAX_BODY_BYTES)  # noqa: SIM115  closed by the stack
    stack.enter_context(stream)
    size_bytes = 0
    for chunk in chunks:
        if not isinstance(chunk, bytes):
            raise TypeError(f"{about.name or 'a file'} gives text: open it in binary mode")
        size_bytes += stream.write(chunk)
    return Opened(stream, 0, size_bytes, about)
