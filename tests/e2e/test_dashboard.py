"""The dashboard of the running product, in a real browser: what a person sees who deploys, invokes, and breaks things.

All tests share one account, which is nobody else's: what the page adds up is theirs.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Locator, expect

from tests.browser.conftest import Visit, Visiting
from tests.browser.conftest import chromium as chromium  # noqa: PLC0414  a fixture, and of this module too
from tests.browser.conftest import visiting as visiting  # noqa: PLC0414
from tests.browser.test_dashboard import CUT_OFF, PHONE, rows, tile
from tests.e2e.conftest import Gate, Site, is_running, production_only
from tests.house import RECORDER, Caller, Function

pytestmark = production_only

DIED_WITHIN_MS = 110_000.0
STEPS = 50
RULES = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}


@dataclass(frozen=True, slots=True)
class Watched:
    """One function that runs, in an account of its own."""

    caller: Caller
    function: Function

    @property
    def key(self) -> str:
        return self.caller.key


@pytest.fixture(scope="module")
async def watched(site: Site) -> AsyncIterator[Watched]:
    async with site.caller(await site.new_key("watched")) as caller:
        function = await caller.deploy(RECORDER, name="receipts")
        yield Watched(caller, function)
        await function.undeploy()


def row_of(visit: Visit, caption: str, text: str) -> Locator:
    found: Locator = rows(visit, caption).filter(has_text=text)
    return found


def timeline(visit: Visit) -> Locator:
    return visit.page.get_by_role("region", name="Timeline").get_by_role("listitem")


async def test_a_queue_is_seen_to_grow_and_to_shrink(
    site: Site, watched: Watched, gate: Gate, visiting: Visiting
) -> None:
    caller, function = watched.caller, watched.function
    async with visiting(site.url) as visit:
        await visit.log_in(watched.key)
        await tile(visit, "Waiting").to_have_text("0")
        row = row_of(visit, "Functions", "receipts")
        await expect(row).to_contain_text("active")
        await expect(row).to_contain_text("0/1")
        first, *_, last = [await caller.submit(function.id, gate.order()) for _ in range(4)]
        await tile(visit, "Waiting").to_have_text("3")
        await tile(visit, "Running").to_have_text("1")
        await tile(visit, "Slots busy").to_have_text(re.compile("^1 of 1"))
        await tile(visit, "Oldest waiting").to_have_text(re.compile(r"\d+ s"))
        await expect(row.get_by_role("cell")).to_contain_text(["receipts", "active", "3", "1"])
        await expect(
            visit.page.get_by_role("img", name=re.compile("^Queue length: 3 waiting and 1 run"))
        ).to_be_visible()
        await visit.go(f"requests/{last}")
        await expect(visit.page.get_by_text("It is number 3 in its queue.")).to_be_visible()
        gate.open()
        await expect(timeline(visit)).to_have_text(
            [re.compile("Waited in the queue"), re.compile("Attempt 1: fulfilled")]
        )
        await expect(visit.page.get_by_text("In the container")).to_be_visible()
        await visit.go("requests")
        await expect(row_of(visit, "Latest requests", first[:8])).to_contain_text("fulfilled")
        await visit.go("")
        await tile(visit, "Waiting").to_have_text("0")
        await tile(visit, "Running").to_have_text("0")
        await tile(visit, "Wait, p50").to_have_text(re.compile("s"))
        await expect(
            visit.page.get_by_role("img", name=re.compile(r"^Ended per minute.*: [1-9]\d* in the last hour"))
        ).to_be_visible()


async def test_a_worker_that_breaks_is_seen_to(site: Site, watched: Watched, gate: Gate, visiting: Visiting) -> None:
    """One whose container is killed under its request, and one that cannot start at all."""
    caller = watched.caller
    process = (await caller.invoke(watched.function.id)).json["pid"]
    request_id = await caller.submit(watched.function.id, gate.order())
    await is_running(caller, request_id)
    async with visiting(site.url) as visit:
        await visit.log_in(watched.key)
        await visit.go("workers")
        await expect(row_of(visit, "GPUs on offer", "CPU")).to_be_visible()
        await expect(row_of(visit, "Workers", "receipts")).to_contain_text("1/1")
        await visit.go(f"requests/{request_id}")
        await expect(timeline(visit)).to_have_text([re.compile("Waited"), re.compile("Attempt 1: running")])
        os.kill(process, signal.SIGKILL)
        await expect(timeline(visit).nth(1)).to_contain_text("Attempt 1: failed")
        await expect(timeline(visit).last).to_contain_text(re.compile(r"Attempt [23]: running"))
        gate.open()
        await expect(timeline(visit).last).to_contain_text(re.compile(r"Attempt [23]: fulfilled"))

        broken = await cannot_start(caller)
        await visit.go("deployments")
        await expect(row_of(visit, "All deployments", "receipts")).to_contain_text("active")
        await expect(row_of(visit, "All deployments", broken)).to_contain_text("error")
        trouble = visit.page.locator("section").filter(has=visit.page.get_by_role("heading", name=broken))
        await expect(trouble.get_by_label("What is wrong with CPU")).to_contain_text("tests/nobody-has-it")


async def cannot_start(caller: Caller) -> str:
    """The name of a function that was deployed, of an image that nobody has."""
    name = "never-starts"
    made = await caller.call(
        "POST",
        "/v2/nvcf/functions",
        data={"name": name, "inferenceUrl": "/", "containerImage": "tests/nobody-has-it:latest"},
    )
    function = Function(caller, made.json["function"]["id"], made.json["function"]["versionId"])
    deployed = await caller.call(
        "POST",
        function.deployment_path,
        data={
            "deploymentSpecifications": [{"gpu": "CPU", "instanceType": "CPU", "minInstances": 1, "maxInstances": 1}]
        },
    )
    assert deployed.status == 200, deployed
    return name


async def test_what_died_is_found_understood_and_started_again_by_keyboard_alone(
    site: Site, watched: Watched, tmp_path: Path, visiting: Visiting
) -> None:
    """Logging in included, and out."""
    cure = tmp_path / "cure"
    dead = await watched.caller.submit(watched.function.id, {"cured": str(cure)})
    async with visiting(site.url) as visit:
        keyboard = visit.page.keyboard
        await visit.page.goto(f"{site.url}/dashboard")
        await expect(visit.page.get_by_label("API key")).to_be_focused()
        await keyboard.type(watched.key)
        await keyboard.press("Enter")
        await visit.heading("Overview").to_be_visible()
        await expect(visit.page.get_by_role("link", name="Dead letters 1")).to_be_visible(timeout=DIED_WITHIN_MS)
        await tab_to(visit, re.compile("Dead letters ?1"))
        await keyboard.press("Enter")
        await visit.heading("Dead letters").to_be_focused()
        await expect(visit.page.get_by_role("article")).to_contain_text("Every attempt that a request has")
        await expect(row_of(visit, "Dead letters, the latest first", dead[:8])).to_be_visible()
        await tab_to(visit, dead[:8])
        await keyboard.press("Enter")
        await visit.heading(f"Request {dead[:8]}").to_be_focused()
        await expect(timeline(visit).filter(has_text="failed")).to_have_count(3)
        cure.touch()
        await tab_to(visit, re.compile("Dead letters ?1"), by="Shift+Tab")
        await keyboard.press("Enter")
        await visit.heading("Dead letters").to_be_focused()
        await expect(row_of(visit, "Dead letters, the latest first", dead[:8])).to_be_visible()
        await tab_to(visit, "Redrive")
        await keyboard.press("Enter")
        await expect(visit.page.get_by_text("Started again as")).to_be_visible()
        # What has just been said comes before what it was said of.
        await tab_to(visit, re.compile("[0-9a-f-]{36}"), by="Shift+Tab")
        await keyboard.press("Enter")
        await expect(timeline(visit).last).to_contain_text("Attempt 1: fulfilled")
        await tab_to(visit, "Log out", by="Shift+Tab")
        await keyboard.press("Enter")
        await expect(visit.page.get_by_label("API key")).to_be_focused()


async def tab_to(visit: Visit, text: str | re.Pattern[str], *, by: str = "Tab") -> None:
    met = []
    for _ in range(STEPS):
        await visit.page.keyboard.press(by)
        met.append(await visit.page.evaluate("document.activeElement.textContent.trim().replace(/\\s+/g, ' ')"))
        if re.fullmatch(text, met[-1]):
            return
    raise AssertionError(f"{by} does not come to {text!r}, but to {met}")


async def test_on_a_phone_in_the_dark_all_of_it_can_be_read_and_reached(
    site: Site, watched: Watched, visiting: Visiting
) -> None:
    function = watched.function
    request_id = (await watched.caller.invoke(function.id)).request_id
    places = {
        "": "Overview",
        "workers": "Workers",
        "deployments": "Deployments",
        "dead-letters": "Dead letters",
        "requests": "Requests",
        f"requests/{request_id}": f"Request {request_id[:8]}",
        f"functions/{function.version_id}": "receipts",
    }
    async with visiting(site.url, **PHONE, color_scheme="dark", reduced_motion="reduce") as visit:
        await visit.log_in(watched.key)
        for place, title in places.items():
            await visit.go(place)
            await visit.heading(title).to_be_visible()
            await expect(visit.page.locator("main .card").first).to_be_visible()
            await expect(visit.page.locator("nav [aria-current]")).to_be_in_viewport(ratio=1)
            found = await Axe().run(visit.page, options={"runOnly": RULES})
            assert found.violations_count == 0, f"{place}: {found.generate_report()}"
            assert await visit.page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0, place
            assert await visit.page.evaluate(CUT_OFF) == [], place
