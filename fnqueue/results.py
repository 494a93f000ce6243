"""What a request gave: the function's answer, and the files that came with it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

# What is larger is on disk.
IN_MEMORY_BYTES = 8 * 1024 * 1024


class Result:
    """The answer of a function. One that is large, or has files with it, came as a zip and is held on disk.

    Close it, or use it as a context manager, to free that at once; otherwise it goes with the object.
    """

    def __init__(
        self,
        *,
        request_id: str,
        status: int,
        headers: Mapping[str, str],
        content: bytes = b"",
        archive: IO[bytes] | None = None,
    ) -> None:
        self.request_id = request_id
        self.status = status
        self.headers = headers
        self._content = content
        self._file = archive
        self._zip = zipfile.ZipFile(archive) if archive is not None else None
        if archive is not None:
            weakref.finalize(self, archive.close)

    @property
    def content_type(self) -> str:
        """Of the answer; '' where the server does not say, as for one that came as a zip."""
        return "" if self._zip else self.headers.get("content-type", "")

    @property
    def content(self) -> bytes:
        """The answer as it is, read into memory."""
        return self._zip.read(self._answer_name) if self._zip and self._answer_name else self._content

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """Raises ValueError: it is none."""
        return json.loads(self.content)

    @property
    def files(self) -> list[str]:
        """The names of the files that came with the answer, in order."""
        names = self._zip.namelist() if self._zip else []
        return [name for name in names if name != self._answer_name and not name.endswith("/")]

    def read(self, name: str) -> bytes:
        """One of `files`. Raises KeyError: there is none of that name."""
        if self._zip is None or name not in self.files:
            raise KeyError(name)
        return self._zip.read(name)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the answer to a file, which appears when it is whole; one that is there is replaced."""
        target = Path(path)
        with whole(target) as sink:
            if self._zip and self._answer_name:
                with self._zip.open(self._answer_name) as source:
                    shutil.copyfileobj(source, sink)
            else:
                sink.write(self._content)
        return target

    def extract(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write `files` into a folder, which is made where it is missing. No name leads out of it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return [Path(self._zip.extract(name, folder)) for name in self.files] if self._zip else []

    def close(self) -> None:
        if self._zip:
            self._zip.close()
        if self._file:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Result {self.status} of {self.request_id}>"

    @property
    def _answer_name(self) -> str:
        name = f"{self.request_id}.response"
        return name if self._zip and name in self._zip.namelist() else ""


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when all was written to it, and not at all after an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w+b") as sink:
            yield sink
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def spool() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)
