"""What the server's commands refuse before they start."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from api.commands import api
from tests.unit.container import FUNCTION_ID, VERSION_ID
from workers.commands import sidecar
from workers.controller.command import controller

SERVERS = {
    "FNQUEUE_QUEUE_URL": "amqp://127.0.0.1:1",
    "FNQUEUE_STORE_URL": "redis://127.0.0.1:1",
    "FNQUEUE_FUNCTION_ID": FUNCTION_ID,
    "FNQUEUE_FUNCTION_VERSION_ID": VERSION_ID,
}


@pytest.mark.parametrize("command", [api, controller, sidecar])
@pytest.mark.parametrize("name", ["FNQUEUE_QUEUE_URL", "FNQUEUE_STORE_URL"])
def test_a_process_of_several_refuses_what_only_one_process_sees(command: click.Command, name: str) -> None:
    result = CliRunner().invoke(command, [], env={**SERVERS, name: "memory://"})
    assert result.exit_code == 2
    assert f"{name} is memory://, which no other process could see" in result.output
    assert len(result.output.splitlines()) == 1
