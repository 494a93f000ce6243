"""The supervisor of `make stack`: restarts what dies, leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.local.daemon import Daemon, wait_until
from infra.local.process import ServerFailed
from infra.local.supervisor import members

PATIENCE_S = 20.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Up, with the children of `stand_in` running."""
    daemon = Daemon(tmp_path / "stack")
    _launch(daemon)
    yield daemon
    daemon.stop()


def test_a_killed_child_is_restarted(daemon: Daemon) -> None:
    before = _pids(daemon)

    psutil.Process(before["first"]).kill()

    _await_restart(daemon, "first", before["first"])
    assert _pids(daemon)["parent"] == before["parent"]


def test_a_child_that_keeps_dying_is_restarted_ever_later(daemon: Daemon) -> None:
    for _ in range(2):
        last = _pids(daemon)["first"]
        psutil.Process(last).kill()
        _await_restart(daemon, "first", last)
    assert '"restarted_in_s": 0.2' in daemon.log.read_text()
    assert '"restarted_in_s": 0.4' in daemon.log.read_text()


def test_stopping_leaves_no_process_behind(daemon: Daemon) -> None:
    assert wait_until(lambda: len(members(daemon.folder)) == 4, PATIENCE_S)  # supervisor, two children, one grandchild

    assert daemon.stop() is True

    assert members(daemon.folder) == []
    assert daemon.pid() is None
    assert daemon.stop() is False


def test_what_a_killed_child_left_behind_is_stopped_in_the_end(daemon: Daemon) -> None:
    (left_behind,) = _children(_pids(daemon)["parent"])
    psutil.Process(_pids(daemon)["parent"]).kill()
    assert wait_until(lambda: left_behind.ppid() == daemon.pid(), PATIENCE_S)

    daemon.stop()

    assert not left_behind.is_running()


def test_a_killed_supervisor_leaves_nothing_that_the_next_stop_does_not_end(daemon: Daemon) -> None:
    supervisor = daemon.pid()
    assert supervisor is not None
    psutil.Process(supervisor).kill()
    assert wait_until(lambda: daemon.pid() is None, PATIENCE_S)
    assert members(daemon.folder) != []

    assert daemon.stop() is True

    assert members(daemon.folder) == []


def test_a_second_supervisor_of_the_same_folder_is_refused(daemon: Daemon) -> None:
    with pytest.raises(ServerFailed, match="another supervisor"):
        Daemon(daemon.folder).serve([])
    assert daemon.pid() is not None


def _launch(daemon: Daemon) -> None:
    daemon.launch([sys.executable, "-m", "tests.infra.stand_in", str(daemon.folder)])
    assert wait_until(lambda: bool((report := daemon.report()) and report["ready"]), PATIENCE_S), daemon.log.read_text()


def _pids(daemon: Daemon) -> dict[str, int]:
    """Of the children that run."""
    report = daemon.report()
    assert report is not None
    return {child["name"]: child["pid"] for child in report["children"] if child["pid"] is not None}


def _await_restart(daemon: Daemon, name: str, last: int) -> None:
    assert wait_until(lambda: _pids(daemon).get(name) not in (None, last), PATIENCE_S)


def _children(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    assert wait_until(lambda: len(parent.children()) == 1, PATIENCE_S)
    return parent.children()
