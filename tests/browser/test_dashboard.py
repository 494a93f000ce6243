"""The dashboard in a real browser, before a server whose stores the test fills itself."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import expect

from broker import accounts
from broker.errors import StoreUnavailable
from broker.model import FunctionStatus, Instance, InstanceStatus
from tests.browser.conftest import Visit, Visiting
from tests.eventually import eventually
from tests.unit.test_dashboard import OTHERS, deployment, version
from tests.unit.test_dead_letters import die
from tests.unit.test_server import FUNCTION, VERSION, House, opened

REFRESH_S = 0.2
PLACES = {
    "": "Overview",
    "workers": "Workers",
    "deployments": "Deployments",
    "dead-letters": "Dead letters",
    "requests": "Requests",
    f"functions/{VERSION}": "f",
}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
EVERYTHING = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
CUT_OFF = """[...document.querySelectorAll(".card")].filter((each) => each.scrollWidth > each.clientWidth)
  .map((each) => `${each.getAttribute("aria-label")}: ${each.scrollWidth} of ${each.clientWidth}`)"""
# What a browser says of an answer that a test asks for.
REFUSED = ("401 (Unauthorized)", "404 (Not Found)")


@asynccontextmanager
async def watched(folder: Path, **settings: Any) -> AsyncIterator[House]:
    async with opened(folder, dashboard_refresh_s=REFRESH_S, account_calls_per_s=0, **settings) as house:
        yield house


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with watched(tmp_path) as found:
        yield found


async def work(house: House) -> str:
    """A request that ended, one that died, one that waits, and what runs them; the ID of the first."""
    await house.broker.catalog.deployments.put(deployment())
    await house.broker.catalog.beat(worker(VERSION), ttl_s=600)
    done = await house.submit()
    await house.finish()
    await die(house)
    await house.submit()
    return done


def worker(version_id: str) -> Instance:
    return Instance(
        id=str(uuid.uuid4()),
        function_id=FUNCTION,
        version_id=version_id,
        account="default",
        gpu="H100",
        instance_type="big",
        backend="here",
        status=InstanceStatus.RUNNING,
        created_at=1.0,
        updated_at=1.0,
        slots=2,
        busy=1,
    )


def tile(visit: Visit, label: str) -> Any:
    named = visit.page.locator(".tile").filter(has=visit.page.get_by_text(label, exact=True))
    return expect(named.locator("dd"))


def rows(visit: Visit, caption: str) -> Any:
    return visit.page.get_by_role("table", name=caption).locator("tbody tr")


async def test_a_good_key_lets_in_and_logging_out_ends_it(house: House, visiting: Visiting) -> None:
    async with visiting(house.url, expected=REFUSED) as visit:
        await visit.log_in("nvapi-wrong")
        await expect(visit.page.get_by_role("alert")).to_have_text("This key is not valid.")
        await visit.log_in()
        await visit.heading("Overview").to_be_visible()
        assert await visit.page.evaluate("document.cookie") == ""
        assert await visit.page.evaluate("localStorage.length + sessionStorage.length") == 0
        await visit.page.reload()
        await visit.heading("Overview").to_be_visible()
        await visit.page.get_by_role("button", name="Log out").click()
        await expect(visit.page.get_by_label("API key")).to_be_focused()
        await visit.page.reload()
        await expect(visit.page.get_by_label("API key")).to_be_visible()


async def test_what_happens_is_shown_without_asking(house: House, visiting: Visiting) -> None:
    async with visiting(house.url) as visit:
        await visit.log_in()
        await tile(visit, "Waiting").to_have_text("0")
        await house.submit()
        await tile(visit, "Waiting").to_have_text("1")
        await tile(visit, "Oldest waiting").to_have_text(re.compile(r"\d+ s"))
        await house.finish()
        await tile(visit, "Waiting").to_have_text("0")
        await tile(visit, "Run, p50").to_have_text(re.compile("ms|s"))
        await expect(
            visit.page.get_by_role("img", name=re.compile("^Ended per minute.*: 1 in the last"))
        ).to_be_visible()


async def test_dead_letters_are_started_again_and_thrown_away(house: House, visiting: Visiting) -> None:
    for _ in range(3):
        await die(house)
    async with visiting(house.url) as visit:
        await visit.log_in()
        await visit.page.get_by_role("link", name="Dead letters 3").click()
        cause = visit.page.get_by_role("article").filter(has_text="rejected")
        await expect(cause).to_contain_text("3 in 1 version")
        await visit.page.get_by_role("button", name=re.compile("^Redrive [0-9a-f]{8}-")).first.click()
        await expect(visit.page.get_by_text("Started again as")).to_be_visible()
        await house.some_queued(1)
        await expect(cause).to_contain_text("2 in 1 version")
        await cause.get_by_role("button", name="Redrive all").click()
        dialog = visit.page.get_by_role("dialog")
        await expect(dialog).to_contain_text("Start 2 requests again?")
        await dialog.get_by_role("button", name="Keep").click()
        await expect(dialog).to_be_hidden()
        await cause.get_by_role("button", name="Purge all").click()
        await dialog.get_by_role("button", name="Throw away").click()
        await expect(visit.page.get_by_text("3 thrown away.")).to_be_visible()
        await expect(visit.page.get_by_text("There are none.")).to_be_visible()
        assert await house.queued() == 1


async def test_a_request_is_found_by_its_id_and_followed_to_its_end(house: House, visiting: Visiting) -> None:
    request_id = await house.submit()
    async with visiting(house.url, expected=REFUSED) as visit:
        await visit.log_in()
        await visit.go("requests")
        search = visit.page.get_by_label("Request ID")
        await search.fill(request_id)
        await search.press("Enter")
        await visit.heading(f"Request {request_id[:8]}").to_be_visible()
        timeline = visit.page.get_by_role("region", name="Timeline").get_by_role("listitem")
        await expect(timeline).to_have_text([re.compile("Waits in the queue")])
        await expect(visit.page.get_by_text("It is number 1 in its queue.")).to_be_visible()
        await house.finish()
        await expect(timeline).to_have_text([re.compile("Waited in the queue"), re.compile("Attempt 1: fulfilled")])
        await expect(visit.page.get_by_role("button", name="Cancel this request")).to_be_hidden()
        await search.fill(OTHERS)
        await search.press("Enter")
        await expect(visit.page.get_by_role("alert")).to_be_visible()


async def test_a_request_is_cancelled(house: House, visiting: Visiting) -> None:
    request_id = await house.submit()
    async with visiting(house.url) as visit:
        await visit.log_in()
        await visit.go(f"requests/{request_id}")
        await visit.page.get_by_role("button", name="Cancel this request").click()
        await visit.page.get_by_role("button", name="Cancel the request").click()
        await expect(visit.page.locator(".badge", has_text="cancelled").first).to_be_visible()


async def test_a_key_that_is_taken_away_ends_what_is_shown(house: House, visiting: Visiting) -> None:
    token, key = await accounts.create_key(house.broker, account="default")
    async with visiting(house.url, expected=REFUSED) as visit:
        await visit.log_in(token)
        await tile(visit, "Waiting").to_have_text("0")
        await accounts.delete_key(house.broker, key.id)
        await expect(visit.page.get_by_label("API key")).to_be_visible()


async def test_names_and_logs_that_are_scripts_are_text(house: House, visiting: Visiting) -> None:
    script = "<img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}"
    await house.broker.catalog.versions.put(
        replace(version(script, version_id=OTHERS), status=FunctionStatus.ERROR, description=script)
    )
    ill = deployment(OTHERS)
    [info] = ill.health
    await house.broker.catalog.deployments.put(replace(ill, health=(replace(info, error=script, gpu=script),)))
    await house.broker.catalog.beat(replace(worker(OTHERS), error=script, gpu=script, location=script), ttl_s=600)
    dialogs: list[str] = []
    async with visiting(house.url) as visit:
        visit.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        await visit.log_in()
        for place in ("", "workers", "deployments", f"functions/{OTHERS}"):
            await visit.go(place)
            await expect(visit.page.locator("main").get_by_text(script).first).to_be_visible()
            assert await visit.page.locator("main img, main script").count() == 0
    assert dialogs == []


async def test_no_other_page_can_hold_it_in_a_frame(house: House, visiting: Visiting) -> None:
    async with visiting(house.url, expected=["frame-ancestors", "X-Frame-Options", "ERR_BLOCKED"]) as visit:
        await visit.page.route(
            "https://evil.example/*",
            lambda route: route.fulfill(
                content_type="text/html", body=f'<iframe src="{house.url}/dashboard" width="500"></iframe>'
            ),
        )
        await visit.page.goto("https://evil.example/")
        await eventually(lambda: _texts(visit), lambda texts: len(texts) == 2, within_s=60)
        assert all("API key" not in text for text in await _texts(visit))


async def _texts(visit: Visit) -> list[str]:
    return [await frame.locator("body").inner_text() for frame in visit.page.frames]


async def test_all_is_reached_by_keyboard(house: House, visiting: Visiting) -> None:
    await work(house)
    async with visiting(house.url) as visit:
        await visit.log_in()
        press, focused = visit.page.keyboard.press, visit.page.locator(":focus")
        await expect(rows(visit, "Functions")).to_have_count(1)
        await press("Tab")
        await expect(focused).to_have_text("Skip to content")
        await press("Enter")
        await expect(focused).to_have_text("Overview")
        while await focused.inner_text() != "f":
            await press("Tab")
        await press("Enter")
        await visit.heading("f").to_be_focused()
        await visit.page.get_by_role("link", name="Dead letters").first.focus()
        await press("Enter")
        await visit.heading("Dead letters").to_be_focused()
        await expect(visit.page.get_by_role("button", name="Redrive all")).to_be_visible()
        await expect(rows(visit, "Dead letters, the latest first")).to_have_count(1)
        while await focused.inner_text() != "Purge all":
            await press("Tab")
        await press("Enter")
        await expect(visit.page.get_by_role("dialog")).to_be_visible()
        await press("Escape")
        await expect(visit.page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_bars_anybody(house: House, visiting: Visiting, scheme: str) -> None:
    """Contrast in both schemes; names, roles and landmarks, by axe's rules of WCAG 2.1 AA."""
    wanted = {"light": EVERYTHING, "dark": {"type": "rule", "values": ["color-contrast"]}}[scheme]
    request_id = await work(house)
    backgrounds = {"light": "rgb(244, 245, 248)", "dark": "rgb(15, 18, 24)"}
    async with visiting(house.url, color_scheme=scheme, reduced_motion="reduce") as visit:
        await visit.page.goto(f"{house.url}/dashboard")
        await expect(visit.page.get_by_label("API key")).to_be_visible()
        await assert_open_to_all(visit, wanted)
        await visit.log_in()
        for place, title in {**PLACES, f"requests/{request_id}": f"Request {request_id[:8]}"}.items():
            await visit.go(place)
            await visit.heading(title).to_be_visible()
            await assert_open_to_all(visit, wanted)
        body = await visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert body == backgrounds[scheme]


async def assert_open_to_all(visit: Visit, wanted: dict[str, Any]) -> None:
    found = await Axe().run(visit.page, options={"runOnly": wanted})
    assert found.violations_count == 0, f"{visit.page.url}: {found.generate_report()}"


async def test_nothing_is_wider_than_a_phone(house: House, visiting: Visiting) -> None:
    request_id = await work(house)
    await house.broker.catalog.versions.put(version("a-name-that-is-" + "long" * 20, version_id=OTHERS))
    async with visiting(house.url, **PHONE) as visit:
        await visit.log_in()
        for place, title in {**PLACES, f"requests/{request_id}": f"Request {request_id[:8]}"}.items():
            await visit.go(place)
            await visit.heading(title).to_be_visible()
            await expect(visit.page.locator("main .card").first).to_be_visible()
            wide = await visit.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
            assert wide <= 0, place
            assert await visit.page.evaluate(CUT_OFF) == [], place
        small = await visit.page.evaluate(
            "[...document.querySelectorAll('main button, nav a')].filter((each) => each.offsetHeight < 24).length"
        )
        assert small == 0


async def test_five_hundred_functions_cost_a_page_of_them(house: House, visiting: Visiting) -> None:
    """What the browser does is counted, and not timed: the rows that it holds, and those that a change touches."""
    ids = [str(uuid.UUID(int=number + 1, version=4)) for number in range(500)]
    made = [version(f"function-{number:03}", version_id=version_id) for number, version_id in enumerate(ids)]
    await asyncio.gather(*(house.broker.catalog.versions.put(each) for each in made))
    async with visiting(house.url) as visit:
        await visit.log_in()
        table = rows(visit, "Functions")
        await expect(visit.page.get_by_text("1 to 25 of 501")).to_be_visible()
        await expect(table).to_have_count(25)
        assert await visit.page.evaluate("document.querySelectorAll('*').length") < 1500
        await visit.page.get_by_role("button", name="Function", exact=True).click()
        await expect(table.first).not_to_contain_text("function-")
        await visit.page.evaluate(
            """() => {
                window.touched = new Set();
                const note = (changes) => changes.forEach((change) => {
                    const row = (change.target.closest ?? change.target.parentElement.closest)
                        .call(change.target.closest ? change.target : change.target.parentElement, "tbody tr");
                    if (row) window.touched.add(row.textContent.slice(0, 12));
                });
                new MutationObserver(note).observe(document.querySelector("#functions"),
                    { subtree: true, childList: true, characterData: true, attributes: true });
            }"""
        )
        [row] = [await house.broker.catalog.versions.get(ids[3])]
        assert row is not None
        await house.broker.catalog.versions.put(replace(row.item, status=FunctionStatus.ERROR), revision=row.revision)
        await expect(table.filter(has_text="function-003")).to_contain_text("error")
        assert await visit.page.evaluate("[...window.touched]") == ["function-003"]
        await visit.page.get_by_role("button", name="Next").click()
        await expect(visit.page.get_by_text("26 to 50 of 501")).to_be_visible()
        await visit.page.get_by_label("Filter functions").fill("function-49")
        await expect(table).to_have_count(10)


async def test_an_admin_looks_at_each_account_and_all(house: House, visiting: Visiting) -> None:
    await house.broker.catalog.versions.put(version("theirs", account="other", version_id=OTHERS))
    async with visiting(house.url) as visit:
        await visit.log_in()
        await expect(rows(visit, "Functions")).to_have_count(1)
        choice = visit.page.get_by_label("Account")
        await choice.select_option("other")
        await expect(rows(visit, "Functions")).to_have_text([re.compile("^theirs")])
        await choice.select_option("all accounts")
        await expect(rows(visit, "Functions")).to_have_count(2)
        await visit.go("dead-letters")
        await expect(visit.page.get_by_text("Choose one account")).to_be_visible()


async def test_stores_that_are_away_are_named(tmp_path: Path, visiting: Visiting) -> None:
    away = {"load": StoreUnavailable("the store does not answer")}
    async with watched(tmp_path, failing=away) as house, visiting(house.url) as visit:
        await visit.log_in()
        await expect(visit.page.get_by_role("alert")).to_contain_text("the store does not answer")
