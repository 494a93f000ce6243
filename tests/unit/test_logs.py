"""What a log line looks like."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import sys
from typing import Literal

import orjson
import pytest

from broker.telemetry import logs


def a_record(created: float = 0.0, **facts: object) -> logging.LogRecord:
    record = logging.getLogger("sidecar").makeRecord(
        "sidecar", logging.INFO, "file.py", 1, "invocation", (), None, None, facts
    )
    record.created = created
    return record


def as_json(record: logging.LogRecord) -> str:
    logs.configure("INFO", "json")
    [handler] = logging.getLogger().handlers
    return handler.format(record)


def test_a_line_is_an_event_and_its_facts() -> None:
    assert orjson.loads(as_json(a_record(1700000000.25, status=200, state="fulfilled"))) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "logger": "sidecar",
        "event": "invocation",
        "status": 200,
        "state": "fulfilled",
    }


@pytest.mark.parametrize(
    ("created", "told"),
    [(0.0, "1970-01-01T00:00:00.000Z"), (1.999, "1970-01-01T00:00:01.999Z"), (2.0, "1970-01-01T00:00:02.000Z")],
)
def test_every_line_has_the_time_of_its_own(created: float, told: str) -> None:
    assert orjson.loads(as_json(a_record(created)))["time"] == told


def test_what_another_formatter_added_is_no_fact() -> None:
    record = a_record(status=200)
    logging.Formatter("%(asctime)s %(message)s").format(record)
    assert set(orjson.loads(as_json(record))) == {"time", "level", "logger", "event", "status"}


def test_what_is_billed_is_written_at_any_level() -> None:
    logs.configure("ERROR", "json")
    assert logging.getLogger(logs.METERING).isEnabledFor(logging.INFO)
    assert not logging.getLogger("sidecar").isEnabledFor(logging.INFO)


def test_text_shows_the_same_facts() -> None:
    logs.configure("INFO", "text")
    [handler] = logging.getLogger().handlers
    assert handler.format(a_record(status=200)) == "1970-01-01T00:00:00.000Z INFO    invocation status=200"


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize(
    "said",
    [
        "cannot connect to amqp://fnqueue:canary@rabbit:5672/",
        "redis://:canary%2F@redis:6379/0 is away",
        "Authorization: Bearer canary",
        "wrong key: nvapi-canary",
        'GET "https://s3/b/k?X-Amz-Credential=canary%2F20260101&X-Amz-Signature=canary"',
    ],
)
def test_what_a_library_raises_shows_no_credentials(log_format: Literal["json", "text"], said: str) -> None:
    logs.configure("INFO", log_format)
    [handler] = logging.getLogger().handlers
    try:
        try:
            raise ValueError(said)
        except ValueError as cause:
            raise LookupError("a bug") from cause
    except LookupError:
        record = logging.getLogger("api").makeRecord(
            "api", logging.ERROR, "file.py", 1, "fault", (), sys.exc_info(), None, {"cause": said}
        )
    written = handler.format(record)
    assert "canary" not in written
    assert "***" in written
    assert ("LookupError: a bug" in written, "ValueError" in written) == (True, True)
    assert log_format == "text" or orjson.loads(written)["event"] == "fault"


def test_what_is_no_credential_stays() -> None:
    record = a_record(url="http://host:8000/a@b", at="::1", path="/a:b@c")
    record.levelno = logging.WARNING
    assert orjson.loads(as_json(record))["url"] == "http://host:8000/a@b"


def test_a_note_is_written_as_what_is_logged(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(logs.METERING)
    note = logs.Note(logger, "invocation", {"metering": True, "region": 'of "one"'})
    with caplog.at_level(logging.INFO, logger.name):
        note.add({"status": 200})
    assert [(record.message, record.__dict__["region"]) for record in caplog.records] == [("invocation", 'of "one"')]
    logs.configure("INFO", "json")
    note.add({"status": 200, "state": "fulfilled"})
    logger.info("invocation", extra={"metering": True, "region": 'of "one"', "status": 200, "state": "fulfilled"})
    noted, logged = (orjson.loads(line) for line in capsys.readouterr().err.splitlines())
    assert noted.pop("time") <= logged.pop("time")
    assert noted == logged


async def test_lines_of_one_loop_turn_are_written_together_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "json")
    logger = logging.getLogger("api.middleware")
    for number in range(3):
        logs.Note(logger, "answered", {}).add({"number": number})
    assert capsys.readouterr().err == ""
    await asyncio.sleep(0)
    lines = capsys.readouterr().err.splitlines()
    assert [orjson.loads(line)["number"] for line in lines] == [0, 1, 2]
    logs.Note(logger, "answered", {}).add({"number": 3})
    logger.warning("beware")
    assert len(capsys.readouterr().err.splitlines()) == 2


async def test_a_stream_that_is_gone_breaks_nothing() -> None:
    heard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, facts: heard.append(facts))
    gone = io.StringIO()
    with contextlib.redirect_stderr(gone):
        logs.configure("INFO", "json")
    gone.close()
    logs.Note(logging.getLogger(logs.METERING), "invocation", {}).add({"status": 200})
    logging.getLogger("sidecar").warning("beware")
    logs.Note(logging.getLogger(logs.METERING), "invocation", {}).add({"status": 200})
    await asyncio.sleep(0)
    assert heard == []
