from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from workers import trees

DEEPER_THAN_PYTHON_RECURSES = 3_000


def nested(folder: Path, depth: int) -> None:
    """Folders in each other, with a file in each."""
    folder.mkdir()
    at = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at))
        os.mkdir("inner", dir_fd=at)
        inner = os.open("inner", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)


def test_no_depth_is_too_deep(tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    nested(folder, DEEPER_THAN_PYTHON_RECURSES)
    trees.remove(folder)
    assert not folder.exists()


def test_what_links_lead_to_stays(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("ours")
    folder = tmp_path / "planted"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "folder").symlink_to(kept)
    (folder / "a" / "file").symlink_to(kept / "file")
    (folder / "a" / "gone").symlink_to("nowhere")
    link = tmp_path / "link"
    link.symlink_to(kept)
    trees.remove(folder, link, tmp_path / "not there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert (kept / "file").read_text() == "ours"


def test_pipes_sockets_and_odd_names_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "planted"
    (folder / "in").mkdir(parents=True)
    os.mkfifo(folder / "in" / "pipe")
    monkeypatch.chdir(folder / "in")
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind("socket")
    for name in (b"\xff\xfe", b"-rf", b" ", b"\n", b"x" * 255):
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT))
    trees.remove(folder)
    assert not folder.exists()
