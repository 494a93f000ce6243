"""What the commands for functions and deployments ask a server, and what they make of its answers. They are used on a
real one in tests/e2e/test_management_commands.py."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from fnqueue import wire
from fnqueue.cli import SECTIONS, cli, main
from fnqueue.config import KEY_VARIABLES
from fnqueue.errors import ConnectionFailed
from tests.unit.service import (
    ASSET_ID,
    FUNCTION_ID,
    KEY,
    REQUEST_ID,
    Service,
    event,
    events,
    hang_up,
    problem,
    serving,
)

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


def an_instance(status: str = "RUNNING", **given: Any) -> dict[str, Any]:
    return {
        "instanceId": REQUEST_ID,
        "functionId": FUNCTION_ID,
        "functionVersionId": VERSION_ID,
        "instanceType": "CPU",
        "instanceStatus": status,
        "sisRequestId": "s",
        "icmsRequestId": "s",
        "ncaId": "n",
        "gpu": "CPU",
        "instanceCreatedAt": "2026-01-31T08:00:00Z",
        "instanceUpdatedAt": "2026-01-31T08:00:00Z",
        **given,
    }


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
    assert first == "DEPLOYING, no instances running: pulling"
    assert last.endswith("still DEPLOYING after 0 s, and goes on: pulling")


async def test_an_instance_that_does_not_become_healthy_says_why(service: Service) -> None:
    ill = an_instance("STARTING", error="GET http://127.0.0.1:8000/health answered 503, not 200")
    service.will(listed(a_function("INACTIVE")), deployed(), one("DEPLOYING", activeInstances=[ill]), deployed())
    done = await fnqueue(service, "deploy", FUNCTION_ID, "--gpu", "CPU", "--timeout", "0")
    assert done.exit_code == 4
    first, last = done.stderr.splitlines()
    assert first == "DEPLOYING, 0 of 1 instances running: GET http://127.0.0.1:8000/health answered 503, not 200"
    assert last.endswith("goes on: GET http://127.0.0.1:8000/health answered 503, not 200")
    service.will(listed(a_function("DEPLOYING")), one("DEPLOYING", activeInstances=[ill]), deployed())
    shown = await fnqueue(service, "functions", "show", FUNCTION_ID)
    assert "answered 503, not 200" in shown.stdout


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


# -- logs --------------------------------------------------------------------------------------


def a_line(text: str, *, part: str = "container") -> dict[str, str]:
    return {"at": "2026-01-31T08:00:00.250000Z", "instanceId": REQUEST_ID, "part": part, "text": text}


def wrote(*lines: dict[str, str], unanswered: Sequence[str] = (), ended: Sequence[str] = ()) -> web.Response:
    gone = [{"instanceId": each, "endedAt": "2026-01-31T08:00:00Z", "cause": "container was killed"} for each in ended]
    return web.json_response({"lines": list(lines), "unanswered": list(unanswered), "ended": gone})


async def test_lines_are_shown_with_their_instance_and_then_last_words(service: Service) -> None:
    lines = [a_line("\x1b[31mred\x1b[0m\x07\tü"), a_line("draining", part="sidecar")]
    service.will(listed(a_function()), wrote(*lines, unanswered=[ASSET_ID]), deployed("Traceback\nboom"))
    done = await fnqueue(service, "logs", FUNCTION_ID)
    assert done.stdout == "[9a260b8a] red\tü\n[9a260b8a sidecar] draining\nCPU:\nTraceback\nboom\n"
    assert ASSET_ID in done.stderr
    assert (done.exit_code, service.calls[1]) == (0, f"GET /logs/{PATH}?tail=100")


async def test_what_is_asked_of_logs_is_sent(service: Service) -> None:
    service.will(listed(a_function()), one(activeInstances=[an_instance()]), wrote(a_line("x")), deployed())
    words = ("-n", "5", "--since", "2026-01-31T08:00:00+00:00", "--instance", REQUEST_ID[:4], "--json")
    done = await fnqueue(service, "logs", FUNCTION_ID, *words)
    assert done.exit_code == 0, done.output
    query = f"tail=5&instanceId={REQUEST_ID}&since=2026-01-31T08%3A00%3A00%2B00%3A00"
    assert service.calls[2] == f"GET /logs/{PATH}?{query}"
    told = json.loads(done.stdout)
    assert [line["text"] for line in told["lines"]] == ["x"]
    assert (told["unanswered"], told["failures"]) == ([], [])


@pytest.mark.parametrize("since", ["yesterday", "m", "-5m", "99999999999999d"])
async def test_a_time_that_is_none_is_refused(service: Service, since: str) -> None:
    done = await fnqueue(service, "logs", FUNCTION_ID, "--since", since)
    assert (done.exit_code, service.calls) == (2, [])


async def test_an_instance_that_is_not_there_is_refused(service: Service) -> None:
    service.will(listed(a_function()), one(), wrote())
    done = await fnqueue(service, "logs", FUNCTION_ID, "--instance", "9a26")
    assert done.exit_code == 2
    assert "there is none; running are none" in done.stderr


async def test_lines_of_those_that_ended_are_asked_for_alone(service: Service) -> None:
    service.will(listed(a_function()), one(), wrote(ended=[REQUEST_ID]), wrote(a_line("x"), ended=[REQUEST_ID]))
    service.will(deployed("Traceback"))
    done = await fnqueue(service, "logs", FUNCTION_ID, "--previous", "--instance", REQUEST_ID[:4])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "[9a260b8a] x\n", "")
    assert service.calls[2:4] == [
        f"GET /logs/{PATH}?tail=0&previous=true",
        f"GET /logs/{PATH}?tail=100&previous=true&instanceId={REQUEST_ID}",
    ]


async def test_one_that_ended_and_has_no_line_among_these_is_named(service: Service) -> None:
    service.will(listed(a_function()), wrote(ended=[REQUEST_ID]), deployed())
    done = await fnqueue(service, "logs", FUNCTION_ID)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"{REQUEST_ID}: ended at" in done.stderr
    assert "container was killed; --previous shows" in done.stderr


async def test_nothing_that_ended_is_said_and_cannot_be_followed(service: Service) -> None:
    service.will(listed(a_function()), wrote(), deployed())
    done = await fnqueue(service, "logs", FUNCTION_ID, "--previous")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "ACTIVE: no instance of" in done.stderr
    assert (await fnqueue(service, "logs", FUNCTION_ID, "--previous", "--follow")).exit_code == 2


async def test_logs_that_are_empty_say_so(service: Service) -> None:
    service.will(listed(a_function("INACTIVE")), wrote(), problem(404, "not-found"))
    done = await fnqueue(service, "logs", FUNCTION_ID)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "INACTIVE: no instance of" in done.stderr


async def test_lines_are_followed_over_a_broken_connection_until_nothing_is_deployed(service: Service) -> None:
    service.tells = True
    service.will(
        listed(a_function()),
        events("retry: 1\n\n", event("lines", "1-0", lines=[a_line("a")]), cut=True),
        events(event("lines", "2-0", lines=[a_line("b"), a_line("c")]), event("done")),
    )
    done = await fnqueue(service, "logs", FUNCTION_ID, "--follow", "--json")
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["a", "b", "c"]
    assert service.heard[2].headers["Last-Event-ID"] == "1-0"
    assert "is not deployed any more" in done.stderr


# -- several at once ---------------------------------------------------------------------------


async def test_what_can_be_cancelled_is_and_the_rest_is_told(service: Service) -> None:
    service.will(web.Response(status=202), problem(404, "not-found"), problem(409, "conflict"))
    done = await fnqueue(service, "cancel", FUNCTION_ID, ASSET_ID, REQUEST_ID)
    assert done.exit_code == 1
    assert done.stdout == f"{FUNCTION_ID}  cancelled\n{REQUEST_ID}  had ended\n"
    assert f"not cancelled: {ASSET_ID}: 404" in done.stderr
    assert FUNCTION_ID not in done.stderr

    service.will(problem(404, "not-found"), web.Response(status=202))
    done = await fnqueue(service, "cancel", "--json", ASSET_ID, REQUEST_ID)
    assert done.exit_code == 1
    told = {each["requestId"]: each for each in json.loads(done.stdout)}
    assert told[REQUEST_ID] == {"requestId": REQUEST_ID, "cancelled": True}
    assert told[ASSET_ID]["cancelled"] is False
    assert told[ASSET_ID]["error"].startswith("404")


async def test_a_key_that_is_refused_is_not_tried_on_each(service: Service) -> None:
    service.will(web.Response(status=202), problem(401, "unauthorized"))
    done = await fnqueue(service, "cancel", FUNCTION_ID, ASSET_ID, REQUEST_ID)
    assert (done.exit_code, len(service.calls)) == (1, 2)
    assert done.stdout == f"{FUNCTION_ID}  cancelled\n"
    assert all(f"{each}: 401" in done.stderr for each in (ASSET_ID, REQUEST_ID))


async def test_what_is_no_id_is_typed_wrong_and_the_others_are_cancelled(service: Service) -> None:
    service.will(web.Response(status=202), problem(404, "not-found"))
    assert (await fnqueue(service, "cancel", "no-id")).exit_code == 2
    done = await fnqueue(service, "cancel", "no-id", REQUEST_ID)
    assert (done.exit_code, done.stdout) == (2, f"{REQUEST_ID}  cancelled\n")
    assert "not cancelled: no-id: " in done.stderr
    done = await fnqueue(service, "cancel", "no-id", ASSET_ID)
    assert done.exit_code == 1


async def test_what_can_be_deleted_is_and_the_rest_is_told(service: Service) -> None:
    service.will(problem(404, "not-found"), web.Response(status=204))
    done = await fnqueue(service, "assets", "delete", "--json", ASSET_ID, REQUEST_ID)
    assert (done.exit_code, json.loads(done.stdout)) == (1, {"deleted": [REQUEST_ID]})
    assert f"not deleted: {ASSET_ID}: 404" in done.stderr


# -- in ERROR ----------------------------------------------------------------------------------


ROW = {"functionVersionId": REQUEST_ID, "functionName": "well", "functionStatus": "ACTIVE", "queueDepth": 2}
BROKEN = {"functionVersionId": VERSION_ID, "functionName": "ocr", "functionStatus": "ERROR", "queueDepth": None}


async def test_what_is_broken_stands_below_the_queues(service: Service) -> None:
    well = a_function(id=REQUEST_ID, versionId=REQUEST_ID, name="well")
    queues = {"functionId": REQUEST_ID, "queues": [ROW]}
    service.will(listed(a_function("ERROR"), well), web.json_response(queues))
    assert json.loads((await fnqueue(service, "queue", "--json")).stdout) == [ROW, BROKEN]
    service.will(listed(a_function("ERROR"), well), web.json_response(queues))
    _, first, last = (await fnqueue(service, "queue")).stdout.splitlines()
    assert (first.split()[:3], last.split()[:3]) == (["well", "ACTIVE", "2"], ["ocr", "ERROR", "-"])


async def test_what_is_broken_is_shown_where_it_is_named_and_what_is_not_deployed_refused(service: Service) -> None:
    service.will(listed(a_function("ERROR")), problem(404, "not-found"))
    assert json.loads((await fnqueue(service, "queue", "--json", FUNCTION_ID)).stdout) == [BROKEN]
    service.will(listed(a_function("INACTIVE")), problem(404, "not-found"))
    assert (await fnqueue(service, "queue", FUNCTION_ID)).exit_code == 1


async def test_a_queue_that_is_named_needs_no_right_to_list(service: Service) -> None:
    service.will(problem(403, "forbidden"), web.json_response({"functionId": FUNCTION_ID, "queues": [ROW]}))
    assert json.loads((await fnqueue(service, "queue", "--json", FUNCTION_ID)).stdout) == [ROW]


async def test_top_shows_what_is_broken_without_asking_for_its_queue(service: Service) -> None:
    service.will(listed(a_function("ERROR")), one("ERROR"))
    [row] = json.loads((await fnqueue(service, "top", "--json", "--count", "1")).stdout)
    assert (row["status"], row["queueDepth"], row["inFlight"], row["instances"]) == ("ERROR", None, None, 0)


# -- for programs ------------------------------------------------------------------------------

NO_RESULT = {
    "api": "a server, which logs as FNQUEUE_LOG_FORMAT says",
    "completion": "a script for the shell to read",
    "controller": "a server",
    "dev": "a server",
    "sidecar": "a server",
}


def commands_of(group: click.Group, *path: str) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= commands_of(command, *path, name)
        else:
            found[" ".join((*path, name))] = command
    return found


def test_every_command_that_gives_a_result_gives_it_as_json_too() -> None:
    without = {
        name
        for name, command in commands_of(cli).items()
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without == set(NO_RESULT)


# -- what was typed wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(("words", "heading"), [([], "Call functions"), (["functions"], "Commands")])
def test_a_group_of_commands_alone_lists_them_line_by_line(
    words: list[str], heading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("Usage: fnqueue ")
    assert f"{heading}:\n  " in told


def test_the_help_has_each_command_in_its_section_with_a_whole_sentence() -> None:
    told = CliRunner().invoke(cli, ["--help"]).stdout
    context = click.Context(cli)
    assert sorted(name for names in SECTIONS.values() for name in names) == cli.list_commands(context)
    for name in cli.list_commands(context):
        assert f"\n  {name} " in told
    assert "..." not in told.partition("\nBegin:")[2]


def test_what_was_typed_wrong_is_told_with_where_to_read_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 2
    assert capsys.readouterr().err == "fnqueue: Missing argument 'REQUEST_ID'; see fnqueue status --help\n"


async def test_a_server_that_does_not_answer_is_told_of_while_it_is_asked_again(service: Service) -> None:
    service.will(hang_up, hang_up, hang_up, listed(a_function()))
    done = await fnqueue(service, "functions", "list")
    assert done.exit_code == 0
    assert done.stderr.count("; trying again for up to 30 s") == 1
    service.will(hang_up, listed(a_function()))
    assert (await fnqueue(service, "functions", "list")).stderr == ""


async def test_what_answers_that_is_no_such_server_is_told_with_what_to_do(service: Service) -> None:
    service.will(web.Response(status=404, text="<html>nginx</html>"), problem(404, "not-found"))
    told = [(await fnqueue(service, "functions", "list")).stderr for _ in range(2)]
    assert "is the URL that of such a server?" in told[0]
    assert "is the URL that" not in told[1]


@pytest.mark.parametrize("words", [["functions", "list"], ["dead-letters", "list"], ["webhooks", "list"], ["welcome"]])
async def test_every_command_says_what_to_do_about_a_key_that_is_not_good(service: Service, words: list[str]) -> None:
    service.will(problem(401, "unauthorized"))
    done = await fnqueue(service, *words)
    assert done.exit_code == 1
    assert "--key, FNQUEUE_API_KEY or the configuration file" in done.stderr


@pytest.mark.parametrize("words", [["functions", "list"], ["dead-letters", "list"], ["webhooks", "list"], ["welcome"]])
async def test_every_command_reads_the_configuration_file(service: Service, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'url = "{service.url}"\napi_key = "{KEY}"\n')
    service.will(problem(403, "forbidden"))
    unset = dict.fromkeys(("FNQUEUE_URL", *KEY_VARIABLES))
    done = await asyncio.to_thread(CliRunner(env={**unset, "FNQUEUE_CONFIG": str(path)}).invoke, cli, words)
    assert (done.exit_code, "fnqueue keys create" in done.stderr) == (1, True)
    assert service.heard[0].headers["Authorization"] == f"Bearer {KEY}"


async def test_the_events_of_a_stream_are_objects_for_programs(service: Service) -> None:
    streamed = events('event: token\nid: 7-0\ndata: {"word": "once"}\n\n')
    service.will(web.json_response({}, status=202, headers={"NVCF-REQID": REQUEST_ID}), streamed)
    done = await fnqueue(service, "invoke", FUNCTION_ID, "--stream", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"event": "token", "id": "7-0", "data": '{"word": "once"}'}


def test_a_reader_that_has_seen_enough_is_no_error_to_speak_of() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-P", "-m", "fnqueue", "completion", "bash"]
    with os.fdopen(writing) as nobody:
        done = subprocess.run(words, stdout=nobody, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


# -- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_its_script(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert f"_FNQUEUE_COMPLETE={shell}_complete" in done.stdout


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], set[str]]:
    """What a shell is told of the last of some words."""
    monkeypatch.setenv("_FNQUEUE_COMPLETE", "bash_complete")

    def found(words: str) -> set[str]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        with pytest.raises(SystemExit):
            cli.main([], prog_name="fnqueue", standalone_mode=False)
        return set(capsys.readouterr().out.split())

    return found


def test_commands_and_options_are_completed(completed: Callable[[str], set[str]]) -> None:
    assert completed("fnqueue de") == {"plain,dead-letters", "plain,deploy", "plain,dev"}
    assert completed("fnqueue functions ver") == {"plain,version"}
    assert completed("fnqueue deploy --no") == {"plain,--no-wait"}


async def test_functions_are_completed_by_name_and_by_id(
    service: Service, completed: Callable[[str], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FNQUEUE_URL", service.url)
    monkeypatch.setenv("FNQUEUE_API_KEY", KEY)
    service.will(*(listed(a_function(), a_function(name="other", id=REQUEST_ID)) for _ in range(3)))

    async def told(words: str) -> set[str]:
        return await asyncio.to_thread(completed, words)

    assert await told("fnqueue invoke o") == {"plain,ocr", "plain,other"}
    assert await told("fnqueue functions version add oc") == {"plain,ocr"}
    assert await told(f"fnqueue logs {FUNCTION_ID[:3]}") == {f"plain,{FUNCTION_ID}"}
    service.will(problem(401, "unauthorized"))
    assert await told("fnqueue deploy o") == set()
