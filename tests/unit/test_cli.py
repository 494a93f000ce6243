"""What the commands for functions and deployments ask a server, and what they make of its answers. They are used on a
real one in tests/e2e/test_management_commands.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from fnqueue import wire
from fnqueue.cli import cli
from fnqueue.errors import ConnectionFailed
from tests.unit.service import ASSET_ID, FUNCTION_ID, KEY, REQUEST_ID, Service, hang_up, problem, serving

VERSION_ID = ASSET_ID
PATH = f"functions/{FUNCTION_ID}/versions/{VERSION_ID}"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as found:
        yield found


async def fnqueue(service: Service, *words: str) -> Result:
    environment = {"FNQUEUE_URL": service.url, "FNQUEUE_API_KEY": KEY}
    return await asyncio.to_thread(CliRunner(env=environment).invoke, cli, words)


def a_function(status: str = "ACTIVE", **given: Any) -> dict[str, Any]:
    return {
        "id": FUNCTION_ID,
        "ncaId": "default",
        "versionId": VERSION_ID,
        "name": "ocr",
        "status": status,
        "inferenceUrl": "/run",
        "containerImage": "ocr:1",
        "apiBodyFormat": "CUSTOM",
        "healthUri": "/health",
        "health": {"protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200},
        "createdAt": "2026-01-31T08:00:00Z",
        "description": "",
        "functionType": "DEFAULT",
        **given,
    }


def one(status: str = "ACTIVE", **given: Any) -> web.Response:
    return web.json_response({"function": a_function(status, **given)})


def listed(*found: dict[str, Any]) -> web.Response:
    return web.json_response({"functions": list(found)})


def deployed(*errors: str, **given: Any) -> web.Response:
    specification = {
        "gpu": "CPU",
        "instanceType": "CPU",
        "minInstances": 1,
        "maxInstances": 1,
        "gpuSpecificationId": REQUEST_ID,
        **given,
    }
    infos = [
        {"sisRequestId": "s", "icmsRequestId": "s", "gpu": "CPU", "instanceType": "CPU", "error": error}
        for error in errors
    ]
    told = {
        "functionId": FUNCTION_ID,
        "functionVersionId": VERSION_ID,
        "deploymentId": REQUEST_ID,
        "functionName": "ocr",
        "ncaId": "default",
        "functionStatus": "ACTIVE",
        "healthInfo": infos,
        "deploymentSpecifications": [specification],
        "createdAt": "2026-01-31T08:00:00Z",
        "lastUpdatedAt": "2026-01-31T08:00:00Z",
    }
    return web.json_response({"deployment": told})


def offer(*names: str) -> web.Response:
    types = [{"name": "t", "description": "", "default": True}]
    gpus = [{"name": name, "instanceTypes": types} for name in names]
    group = {"id": "g", "name": "local", "ncaId": "n", "authorizedNcaIds": [], "gpus": gpus, "clusters": []}
    return web.json_response({"clusterGroups": [group]})


def specification(service: Service, number: int) -> Any:
    [found] = json.loads(service.heard[number].body)["deploymentSpecifications"]
    return found


# -- calls -------------------------------------------------------------------------------------


async def test_what_has_an_effect_each_time_is_not_repeated_once_it_may_have_been_heard(service: Service) -> None:
    async with service.client() as client:
        service.will(hang_up)
        with pytest.raises(ConnectionFailed):
            await client.ask(wire.FunctionAnswer, "POST", "/functions", {"name": "ocr"})
    assert service.calls == ["POST /functions"]


async def test_it_is_repeated_where_the_server_says_that_it_had_none(service: Service) -> None:
    async with service.client() as client:
        service.will(problem(503), one())
        made = await client.ask(wire.FunctionAnswer, "POST", "/functions", {"name": "ocr"})
        service.will(hang_up, one())
        await client.ask(wire.FunctionAnswer, "GET", f"/{PATH}")
    assert made.function.version_id == VERSION_ID
    assert service.calls == ["POST /functions"] * 2 + [f"GET /{PATH}"] * 2


# -- functions ---------------------------------------------------------------------------------


async def test_a_definition_comes_from_a_file_and_options_replace_its_fields(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "ocr.json"
    path.write_text('{"name": "old", "containerImage": "ocr:1", "inferenceUrl": "/run", "tags": ["a"]}')
    service.will(one("INACTIVE"))
    words = ("functions", "create", "ocr", "--from", str(path), "--image", "ocr:2", "--env", "A=b=c", "--env", "E=")
    done = await fnqueue(service, *words)
    assert done.stdout == f"function {FUNCTION_ID}\nversion  {VERSION_ID}\n"
    assert json.loads(service.heard[0].body) == {
        "name": "ocr",
        "containerImage": "ocr:2",
        "inferenceUrl": "/run",
        "tags": ["a"],
        "containerEnvironment": [{"key": "A", "value": "b=c"}, {"key": "E", "value": ""}],
    }


async def test_a_new_version_is_as_the_newest_but_for_what_is_said(service: Service) -> None:
    old = a_function(createdAt="2026-01-01T08:00:00Z", versionId=REQUEST_ID, containerImage="ocr:0")
    service.will(listed(a_function(), old), one("INACTIVE"))
    words = ("functions", "version", "add", FUNCTION_ID, "--port", "9000", "--health-url", "/well")
    assert (await fnqueue(service, *words, "--json")).exit_code == 0
    sent = json.loads(service.heard[1].body)
    assert (sent["containerImage"], sent["inferencePort"]) == ("ocr:1", 9000)
    assert (sent["health"]["uri"], sent["health"]["port"]) == ("/well", 8000)
    assert not {"id", "versionId", "status", "secrets", "createdAt"} & sent.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("functions", "create"), "NAME: give one"),
        (("functions", "create", "ocr", "--env", "novalue"), "--env: write NAME=VALUE"),
        (("functions", "create", "ocr", "--from", "/nowhere"), "--from /nowhere: No such file"),
        (("functions", "delete", "ocr"), "--version ID, or --all"),
        (("deploy", "ocr", "--instances", "-1"), "--instances"),
        (("completion", "tcsh"), "tcsh"),
    ],
)
async def test_what_is_typed_wrong_is_named_before_anything_is_sent(
    service: Service, words: Sequence[str], said: str
) -> None:
    done = await fnqueue(service, *words)
    assert (done.exit_code, service.heard) == (2, [])
    assert said in done.stderr


async def test_a_secret_that_is_typed_wrong_is_not_said_again(service: Service) -> None:
    done = await fnqueue(service, "functions", "create", "ocr", "--secret", "hunter2")
    assert done.exit_code == 2
    assert "hunter2" not in done.output


async def test_what_the_server_finds_wrong_is_named_by_its_field(service: Service) -> None:
    detail = "Validation failed: object createFunction, field inferenceUrl: missing"
    service.will(web.json_response({"status": 400, "detail": detail}, status=400))
    done = await fnqueue(service, "functions", "create", "ocr", "--image", "ocr:1")
    assert done.exit_code == 2
    assert "field inferenceUrl" in done.stderr


async def test_a_version_that_there_is_not_is_said_with_those_that_there_are(service: Service) -> None:
    service.will(listed(a_function()))
    done = await fnqueue(service, "functions", "show", FUNCTION_ID, "--version", REQUEST_ID)
    assert done.exit_code == 1
    assert f"it has {VERSION_ID}" in done.stderr


# -- deploy ------------------------------------------------------------------------------------


async def test_the_only_gpu_on_offer_is_meant(service: Service) -> None:
    service.will(listed(a_function("INACTIVE")), offer("CPU", "H100"), deployed(), one(), one())
    done = await fnqueue(service, "deploy", FUNCTION_ID, "--instances", "2", "--concurrency", "4")
    assert done.exit_code == 0, done.output
    assert specification(service, 2) == {
        "gpu": "H100",
        "minInstances": 2,
        "maxInstances": 2,
        "maxRequestConcurrency": 4,
    }


async def test_without_a_gpu_it_is_the_cpu_and_with_several_one_has_to_be_named(service: Service) -> None:
    service.will(listed(a_function("INACTIVE")), offer("CPU"), deployed(), one("DEPLOYING"))
    assert (await fnqueue(service, "deploy", FUNCTION_ID, "--no-wait")).exit_code == 0
    assert specification(service, 2)["gpu"] == "CPU"
    service.will(listed(a_function("INACTIVE")), offer("A100", "CPU", "H100"))
    several = await fnqueue(service, "deploy", FUNCTION_ID)
    assert several.exit_code == 2
    assert "A100, H100, CPU" in several.stderr


async def test_one_that_cannot_run_says_why(service: Service) -> None:
    service.will(listed(a_function("INACTIVE")), deployed(), one("ERROR"), deployed("no such image\nocr:1"))
    done = await fnqueue(service, "deploy", FUNCTION_ID, "--gpu", "CPU")
    assert done.exit_code == 3
    assert "is ERROR: no such image\nocr:1" in done.stderr


async def test_one_that_takes_longer_goes_on(service: Service) -> None:
    service.will(listed(a_function("INACTIVE")), deployed(), one("DEPLOYING"), deployed("pulling\nocr:1"))
    done = await fnqueue(service, "deploy", FUNCTION_ID, "--gpu", "CPU", "--timeout", "0")
    assert done.exit_code == 4
    first, last = done.stderr.splitlines()
    assert first == "DEPLOYING, 0 of 0 instances running: pulling"
    assert "still DEPLOYING after 0 s, and goes on" in last


async def test_what_runs_already_is_given_another_number(service: Service) -> None:
    changed = web.json_response(
        {"gpuSpecification": {"gpu": "CPU", "minInstances": 3, "maxInstances": 3}},
    )
    service.will(listed(a_function()), deployed(), changed, one())
    done = await fnqueue(service, "deploy", FUNCTION_ID, "--instances", "3", "--no-wait")
    assert done.exit_code == 0, done.output
    assert service.calls[2] == f"PATCH /deployments/{REQUEST_ID}/gpu-specifications/{REQUEST_ID}"
    assert json.loads(service.heard[2].body) == {"minInstances": 3, "maxInstances": 3}
    service.will(listed(a_function()), deployed())
    other = await fnqueue(service, "deploy", FUNCTION_ID, "--gpu", "H100")
    assert other.exit_code == 2
    assert "undeploy it" in other.stderr


async def test_last_words_are_shown(service: Service) -> None:
    service.will(listed(a_function("ERROR")), deployed("Traceback\nboom"))
    assert (await fnqueue(service, "logs", FUNCTION_ID)).stdout == "CPU:\nTraceback\nboom\n"


# -- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_its_script(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert f"_FNQUEUE_COMPLETE={shell}_complete" in done.stdout


def test_commands_and_options_are_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_FNQUEUE_COMPLETE", "bash_complete")

    def completed(words: str) -> set[str]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        with pytest.raises(SystemExit):
            cli.main([], prog_name="fnqueue", standalone_mode=False)
        return set(capsys.readouterr().out.split())

    assert completed("fnqueue de") == {"plain,dead-letters", "plain,deploy", "plain,dev"}
    assert completed("fnqueue functions ver") == {"plain,version"}
    assert completed("fnqueue deploy --no") == {"plain,--no-wait"}
