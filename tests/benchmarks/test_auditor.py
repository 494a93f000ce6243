"""The benchmark of the auditor runs, and finds what it made."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks.auditor import main


@pytest.mark.servers
def test_the_command_counts_what_it_made() -> None:
    printed = CliRunner().invoke(main, ["--requests", "400"])
    assert printed.exit_code == 0, printed.output
    assert "counted 400," in printed.output
