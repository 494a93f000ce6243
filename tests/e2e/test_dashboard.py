"""The dashboard of a running product, in a real browser: what a person does after the first invocation."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from tests.browser.conftest import Visiting
from tests.browser.conftest import chromium as chromium  # noqa: PLC0414  a fixture, and of this module too
from tests.browser.conftest import visiting as visiting  # noqa: PLC0414
from tests.e2e.conftest import Gate, Site, is_running
from tests.house import Caller, Function


@pytest.mark.parametrize("site", ["embedded"], indirect=True, scope="session")
async def test_an_invocation_is_watched_from_the_queue_to_its_receipt(
    site: Site, caller: Caller, recorder: Function, gate: Gate, visiting: Visiting
) -> None:
    running, waiting = [await caller.submit(recorder.id, gate.order()) for _ in range(2)]
    await is_running(caller, running)
    async with visiting(site.url) as visit:
        await visit.log_in(site.key)
        page = visit.page
        row = page.get_by_role("table", name="Functions").get_by_role("row").filter(has_text=recorder.version_id[:8])
        await expect(row.get_by_role("cell").nth(2)).to_have_text("1")  # waits
        await expect(row.get_by_role("cell").nth(3)).to_have_text("1")  # runs
        await row.get_by_role("link").click()
        await visit.heading("under-test").to_be_visible()
        await expect(page.get_by_role("table", name="Workers").locator("tbody tr")).to_have_text(re.compile("1/1"))
        await visit.go(f"requests/{waiting}")
        timeline = page.get_by_role("region", name="Timeline").get_by_role("listitem")
        await expect(timeline).to_have_text([re.compile("Waits in the queue")])
        gate.open()
        await expect(timeline).to_have_text([re.compile("Waited in the queue"), re.compile("Attempt 1: fulfilled")])
        await expect(page.get_by_text("In the container")).to_be_visible()
        await visit.go("workers")
        await expect(page.get_by_role("table", name="GPUs on offer").locator("tbody tr")).to_have_text(
            [re.compile("CPU")]
        )
