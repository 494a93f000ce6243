"""What died is kept, and started again, on both families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.conftest import NVCF, Site
from tests.eventually import eventually
from tests.house import RECORDER, Caller

LETTERS = f"{NVCF}/dead-letters"
WITHIN_S = 110.0


async def letter_of(caller: Caller, request_id: str) -> Any:
    """Once the undertaker has it."""
    reply = await eventually(
        lambda: caller.call("GET", f"{LETTERS}/{request_id}"), lambda seen: seen.status != 404, within_s=WITHIN_S
    )
    assert reply.status == 200
    return reply.json


async def test_what_kills_its_container_is_kept_and_runs_once_it_is_cured(
    site: Site, caller: Caller, tmp_path: Path
) -> None:
    """The input is too large for a message, and stays in the blob store for its letter and for its redrive."""
    cure = tmp_path / "cure"
    name = f"patient {cure}"
    function = await caller.deploy(RECORDER)
    try:
        order = {"id": name, "cured": str(cure), "padding": "x" * 300_000}
        request_id = await caller.submit(function.id, order)
        dead = await caller.result(request_id, within_s=WITHIN_S)
        assert (dead.status, dead.json["cause"]) == (500, "attempts-exhausted")
        letter = await letter_of(caller, request_id)
        assert (letter["cause"], letter["attempts"]) == ("attempts-exhausted", 3)
        async with aiohttp.ClientSession() as nobody, nobody.get(letter["input"]["bodyUrl"]) as kept:
            assert json.loads(await kept.read()) == order
        cure.touch()
        replies = [await caller.call("POST", f"{LETTERS}/{request_id}/redrive", data={}) for _ in range(2)]
        assert [reply.status for reply in replies] == [202, 202]
        [new_id] = {reply.json["redrivenAs"] for reply in replies}
        done = await caller.result(new_id, within_s=WITHIN_S)
        assert (done.status, done.json["id"]) == (200, name)
        assert site.record.counts("start")[name] == 4
        receipt = (await caller.call("GET", f"{NVCF}/requests/{request_id}")).json
        assert (receipt["status"], receipt["redrivenAs"]) == ("dead", new_id)
        assert (await caller.status(request_id)).body == dead.body
        assert (await caller.call("DELETE", f"{LETTERS}/{request_id}")).status == 204
        assert (await caller.call("GET", f"{LETTERS}/{request_id}")).status == 404
    finally:
        cure.touch()
        await function.undeploy()
