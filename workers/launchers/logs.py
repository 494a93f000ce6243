"""The logs of instances that are gone: a folder each, the newest few of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

KEPT = 20


def keep(root: Path, instance_id: str, logs: Mapping[str, str]) -> None:
    """Write `logs` (file name to text) into the instance's folder under `root`."""
    folder = root / instance_id
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in logs.items():
        (folder / name).write_text(text, encoding="utf-8")


def forget_oldest(root: Path, *, in_use: Callable[[Path], bool] = lambda _: False) -> None:
    """Leave the newest `KEPT` folders of `root` that are not in use."""
    over = [path for path in root.iterdir() if path.is_dir() and not in_use(path)]
    for old in sorted(over, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
