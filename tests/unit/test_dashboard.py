"""The dashboard without a browser: sessions, who may see and change what, and what its pages are sent."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from yarl import URL

from api.app import make_app
from api.calls import Calls
from api.dashboard.board import EVERYBODY, Board, View
from api.dashboard.session import CSRF, LONGEST_S, Sessions
from api.front import Front
from broker import accounts
from broker.errors import Forbidden, Unauthenticated
from broker.model import (
    Deployment,
    FunctionStatus,
    GpuSpecification,
    HealthInfo,
    Instance,
    InstanceStatus,
    Principal,
    Version,
)
from broker.ports import Broker
from broker.settings import ApiSettings
from infra import vendored
from tests.eventually import eventually
from tests.sse import listening
from tests.unit.test_dead_letters import die
from tests.unit.test_server import FUNCTION, KEY, NVCF, VERSION, House, opened

DATA = "/dashboard/data"
SESSION = "/dashboard/session"
HANG_S = 60.0
OTHERS = "44444444-4444-4444-8444-444444444444"
SECRET = b"a secret of thirty-two characters or more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Browser:
    """What a browser does of itself: it keeps cookies, and says where a call comes from."""

    url: str
    session: aiohttp.ClientSession

    async def log_in(self, key: str = KEY) -> dict[str, Any]:
        status, who = await self.call("POST", SESSION, {"key": key})
        assert status == 200, who
        return dict(who)

    async def call(
        self, method: str, path: str, content: Any = None, *, token: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        sent = {"Sec-Fetch-Site": "same-origin", **({CSRF: token} if token else {}), **(headers or {})}
        async with self.session.request(method, path, json=content, headers=sent) as response:
            return response.status, (await response.json(content_type=None) if response.status != 204 else None)

    def cookie(self) -> str:
        [found] = [cookie for cookie in self.session.cookie_jar if cookie.key.endswith("fnqueue-session")]
        return found.value

    def keep(self, value: str) -> None:
        self.session.cookie_jar.clear()
        self.session.cookie_jar.update_cookies({"fnqueue-session": value}, URL(self.url) / "dashboard" / "session")


@asynccontextmanager
async def browsing(url: str) -> AsyncIterator[Browser]:
    jar = aiohttp.CookieJar(unsafe=True)  # which means: of an IP address too
    async with aiohttp.ClientSession(url, cookie_jar=jar) as session:
        yield Browser(url=url, session=session)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


@pytest.fixture
async def browser(house: House) -> AsyncIterator[Browser]:
    async with browsing(house.url) as found:
        yield found


# -- sessions ----------------------------------------------------------------------------------


async def test_a_key_becomes_a_cookie_that_no_script_reads(house: House, browser: Browser) -> None:
    async with browser.session.post(SESSION, json={"key": KEY}) as response:
        assert response.status == 200
        [cookie] = response.headers.getall("Set-Cookie")
        assert response.headers["Cache-Control"] == "no-store"
    assert {"HttpOnly", "SameSite=Strict", "Path=/dashboard"} <= set(cookie.split("; "))
    assert "Secure" not in cookie  # it came over plain HTTP, and a browser would not keep it
    assert KEY not in cookie
    assert accounts.hash_token(KEY) not in browser.cookie()


async def test_over_tls_the_cookie_is_this_hosts_alone(house: House, browser: Browser) -> None:
    tls = {"X-Forwarded-Proto": "https"}
    async with browser.session.post(SESSION, json={"key": KEY}, headers=tls) as response:
        [cookie] = response.headers.getall("Set-Cookie")
    assert cookie.startswith("__Host-")
    assert {"Secure", "Path=/", "HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    # One that a page without TLS, or of a sister host, could have set is none.
    plain = cookie.partition("=")[2].partition(";")[0]
    async with browser.session.get(f"{DATA}/requests", headers={**tls, "Cookie": f"fnqueue-session={plain}"}) as answer:
        assert answer.status == 401


async def test_every_front_end_with_the_secret_knows_the_session(tmp_path: Path) -> None:
    async with (
        opened(tmp_path / "a", secret_key="s" * 32) as one,
        opened(tmp_path / "b", secret_key="s" * 32) as other,
        opened(tmp_path / "c", secret_key="t" * 32) as foreign,
        browsing(one.url) as first,
        browsing(other.url) as second,
        browsing(foreign.url) as third,
    ):
        await first.log_in()
        second.keep(first.cookie())
        third.keep(first.cookie())
        assert (await second.call("GET", f"{DATA}/requests"))[0] == 200
        assert (await third.call("GET", f"{DATA}/requests"))[0] == 401


async def test_a_cookie_that_was_changed_is_nobodys(browser: Browser) -> None:
    await browser.log_in()
    good = browser.cookie()
    for at in range(len(good)):
        other = "A" if good[at] != "A" else "B"
        browser.keep(good[:at] + other + good[at + 1 :])
        status, _ = await browser.call("GET", SESSION)
        assert status == 204, at
    for bad in ("", ".", "a.b", good + "A", good * 9, "é.é"):
        browser.keep(bad)
        assert (await browser.call("GET", f"{DATA}/requests"))[0] == 401


def test_a_session_ends_when_its_pages_are_closed_and_after_its_longest_time() -> None:
    now = [1000.0]
    settings = ApiSettings(dashboard_idle_s=600)
    sessions = Sessions(settings, SECRET, now=lambda: now[0])
    session = sessions.begin("key")
    assert sessions.renewed(session) is None
    now[0] += 599
    sessions.require_going_on(session)
    renewed = sessions.renewed(session)
    assert renewed == replace(session, expires_at=1000 + 599 + 600)
    now[0] += 1
    with pytest.raises(Unauthenticated):
        sessions.require_going_on(session)
    sessions.require_going_on(renewed)
    for _ in range(200):
        now[0] = renewed.expires_at - 1
        renewed = sessions.renewed(renewed) or renewed
    assert renewed.expires_at == 1000 + LONGEST_S


async def test_a_login_begins_a_session_of_its_own_whatever_cookie_it_came_with(house: House) -> None:
    async with browsing(house.url) as attacker, browsing(house.url) as victim:
        await attacker.log_in()
        victim.keep(attacker.cookie())
        planted = await attacker.call("GET", SESSION)
        mine = await victim.log_in()
        assert victim.cookie() != attacker.cookie()
        assert mine["csrfToken"] != planted[1]["csrfToken"]


async def test_a_deleted_key_ends_its_sessions_and_what_they_watch(house: House, browser: Browser) -> None:
    token, key = await accounts.create_key(house.broker, account="default")
    await browser.log_in(token)
    async with listening(browser.session, f"{DATA}/live") as stream:
        assert stream.response.status == 200
        await stream.until("everything")
        await accounts.delete_key(house.broker, key.id)
        await stream.rest()  # it ends
    assert (await browser.call("GET", f"{DATA}/requests"))[0] == 401
    assert (await browser.call("GET", SESSION))[0] == 204


async def test_logging_out_takes_the_cookie_and_what_pages_left(browser: Browser) -> None:
    who = await browser.log_in()
    async with browser.session.delete(SESSION, headers={CSRF: who["csrfToken"]}) as response:
        assert response.status == 204
        assert "storage" in response.headers["Clear-Site-Data"]
    assert not list(browser.session.cookie_jar)


async def test_logins_keep_a_pace(browser: Browser) -> None:
    statuses = [(await browser.call("POST", SESSION, {"key": f"guess-{number}"}))[0] for number in range(11)]
    assert statuses == [401] * 10 + [429]
    assert (await browser.call("POST", SESSION, {"key": KEY}))[0] == 429


async def test_a_key_that_is_refused_is_not_repeated(browser: Browser) -> None:
    for key in ("nvapi-wrong", "k" * 513, ""):
        status, problem = await browser.call("POST", SESSION, {"key": key})
        assert status in (400, 401)
        assert not key or key not in str(problem)


async def test_a_delegated_token_logs_nobody_in(house: House, browser: Browser) -> None:
    async with house.client.post(f"{NVCF}/tokens/functions/{FUNCTION}", json={"clientId": "c"}) as response:
        token = (await response.json())["access_token"]
    assert (await browser.call("POST", SESSION, {"key": token}))[0] == 403


async def test_a_session_opens_nothing_of_the_api(house: House, browser: Browser) -> None:
    await browser.log_in()
    for headers in ({}, {"Authorization": f"Bearer {browser.cookie()}"}):
        assert (await browser.call("GET", f"{NVCF}/functions", headers=headers))[0] == 401


# -- what changes something --------------------------------------------------------------------


async def test_every_call_that_changes_something_needs_its_own_page(house: House, browser: Browser) -> None:
    app = make_app(Front.over(house.broker, ApiSettings()))
    changing = [
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource and route.resource.canonical.startswith("/dashboard") and route.method not in ("GET", "HEAD")
    ]
    assert len(changing) == 7
    who = await browser.log_in()
    for method, path in changing:
        if (method, path) == ("POST", SESSION):
            continue
        at = path.replace("{request_id}", VERSION)
        for headers, token in (
            ({}, ""),
            ({}, who["csrfToken"][:-1]),
            ({"Sec-Fetch-Site": "cross-site"}, who["csrfToken"]),
            ({"Sec-Fetch-Site": "same-site"}, who["csrfToken"]),
            ({"Sec-Fetch-Site": "none"}, who["csrfToken"]),
        ):
            status, problem = await browser.call(method, at, {}, token=token, headers=headers)
            assert status == 403, (method, path, headers, problem)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 400),
        ({}, 200),
    ],
)
async def test_nobody_is_logged_in_by_a_page_of_another_site(
    browser: Browser, headers: Mapping[str, str], status: int
) -> None:
    sent = {"Content-Type": "application/json", **headers}
    async with browser.session.post(SESSION, data=b'{"key":"%s"}' % KEY.encode(), headers=sent) as response:
        assert response.status == status


async def test_the_token_is_of_one_session_only(house: House) -> None:
    async with browsing(house.url) as mine, browsing(house.url) as other:
        await mine.log_in()
        token = (await other.log_in())["csrfToken"]
        request_id = await house.submit()
        assert (await mine.call("DELETE", f"{DATA}/requests/{request_id}", token=token))[0] == 403
        assert (await other.call("DELETE", f"{DATA}/requests/{request_id}", token=token))[0] == 202


async def test_dead_letters_are_redriven_and_purged_as_by_the_api(house: House, browser: Browser) -> None:
    who = await browser.log_in()
    first, second, third = [await die(house) for _ in range(3)]
    token = who["csrfToken"]
    status, done = await browser.call("POST", f"{DATA}/dead-letters/{first}/redrive", {}, token=token)
    assert (status, done["requestId"]) == (202, first)
    every = {"select": {"requestIds": [second]}}
    status, done = await browser.call("POST", f"{DATA}/dead-letters/redrive", every, token=token)
    assert (status, len(done["redriven"])) == (200, 1)
    assert (await browser.call("DELETE", f"{DATA}/dead-letters/{third}", token=token))[0] == 204
    _, left = await browser.call("GET", f"{DATA}/dead-letters?redriven=false")
    assert left["deadLetters"] == []


# -- who may see what --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A board that looks as fast as it is asked."""

    broker: Broker
    board: Board

    async def first(self, view: View) -> dict[str, Any]:
        stream = self.board.follow(lambda: _known(view))
        try:
            return await upto(stream, "everything")
        finally:
            await stream.aclose()


async def _known(view: View) -> View:
    return view


async def upto(stream: AsyncIterator[bytes], name: str) -> dict[str, Any]:
    async for event in stream:
        if event.startswith(b"event: " + name.encode()):
            return dict(orjson.loads(event.split(b"data: ", 1)[1]))
    raise AssertionError(f"ended without {name}")


def version(name: str, *, account: str = "default", version_id: str = VERSION) -> Version:
    return Version(
        id=version_id,
        function_id=FUNCTION,
        account=account,
        name=name,
        inference_url="/",
        container_image="i",
        created_at=1.0,
        status=FunctionStatus.ACTIVE,
    )


def deployment(version_id: str = VERSION, account: str = "default") -> Deployment:
    specification = GpuSpecification(id="s", gpu="H100", instance_type="big", min_instances=1, max_instances=2)
    health = HealthInfo(gpu="H100", instance_type="big", backend="b", error="no room")
    return Deployment(
        id="d",
        function_id=FUNCTION,
        version_id=version_id,
        account=account,
        specifications=(specification,),
        created_at=1.0,
        updated_at=1.0,
        health=(health,),
    )


@pytest.fixture
async def watched(memory_broker: Broker) -> AsyncIterator[Watched]:
    await memory_broker.catalog.versions.put(version("mine"))
    await memory_broker.catalog.versions.put(version("theirs", account="other", version_id=OTHERS))
    await memory_broker.catalog.deployments.put(deployment())
    calls = Calls()
    yield Watched(broker=memory_broker, board=Board(memory_broker, calls, look_s=0.02))
    await calls.finish(grace_s=HANG_S)


def names(said: Mapping[str, Any], table: str = "functions") -> list[str]:
    return [row["name"] for row in said["put"][table]]


def holder(*scopes: str, resources: tuple[str, ...] = ()) -> Principal:
    made = Principal(account="default", subject="s", scopes=frozenset(scopes))
    return replace(made, resources=frozenset(resources)) if resources else made


async def test_a_page_shows_its_own_account(watched: Watched) -> None:
    said = await watched.first(View(holder(*accounts.ACCOUNT_SCOPES), "default"))
    assert names(said) == ["mine"]
    [row] = said["put"]["deployments"]
    assert row["health"] == [{"gpu": "H100", "instanceType": "big", "error": "no room"}]
    assert (row["state"], row["specifications"][0]["most"]) == ("ACTIVE", 2)


async def test_an_instance_that_is_not_healthy_yet_does_not_count_as_running_and_says_why(watched: Watched) -> None:
    for number, status in enumerate((InstanceStatus.RUNNING, InstanceStatus.STARTING, InstanceStatus.ERRORED)):
        beat = Instance(
            id=f"i{number}",
            function_id=FUNCTION,
            version_id=VERSION,
            account="default",
            gpu="H100",
            instance_type="big",
            backend="b",
            status=status,
            created_at=1.0,
            updated_at=1.0,
            error="" if status is InstanceStatus.RUNNING else f"{status}: answered 503, not 200",
        )
        await watched.broker.catalog.beat(beat, ttl_s=600)
    said = await watched.first(View(holder("deploy_function"), "default"))
    [row] = said["put"]["deployments"]
    assert (row["running"], row["starting"], row["waitsFor"]) == (1, 1, "STARTING: answered 503, not 200")


@pytest.mark.parametrize(
    ("scope", "tables"),
    [
        ("queue_details", {"functions"}),
        ("deploy_function", {"deployments"}),
        ("list_functions_details", {"workers"}),
        ("list_cluster_groups", {"gpus"}),
        ("invoke_function", set()),
    ],
)
async def test_a_key_sees_what_its_scopes_are_for(watched: Watched, scope: str, tables: set[str]) -> None:
    said = await watched.first(View(holder(scope), "default"))
    assert set(said["put"]) == tables
    assert (said["deadLetters"] is not None) == (scope == "invoke_function")


async def test_a_key_sees_what_its_resources_cover(watched: Watched) -> None:
    other = holder("queue_details", resources=(f"function/{OTHERS}/*",))
    assert names(await watched.first(View(other, "default"))) == []
    this = holder("queue_details", resources=(f"function/{FUNCTION}/{VERSION}",))
    assert names(await watched.first(View(this, "default"))) == ["mine"]


async def test_who_may_act_for_accounts_sees_each_and_all(watched: Watched) -> None:
    admin = holder("queue_details", "admin:queue_details")
    assert names(await watched.first(View(admin, "other"))) == ["theirs"]
    assert sorted(names(await watched.first(View(admin, EVERYBODY)))) == ["mine", "theirs"]
    with pytest.raises(Forbidden):
        View(holder("queue_details"), "other").require_any()


async def test_another_account_is_refused_to_a_key_without_a_right_to_it(house: House, browser: Browser) -> None:
    token, _ = await accounts.create_key(house.broker, account="default")
    who = await browser.log_in(token)
    assert (who["allAccounts"], who["accounts"]) == (False, [])
    for path in ("live", "requests", "dead-letters", f"functions/{FUNCTION}/versions/{VERSION}/activity"):
        for account in ("other", EVERYBODY):
            assert (await browser.call("GET", f"{DATA}/{path}?account={account}"))[0] in (400, 403), path


async def test_the_admin_is_told_which_accounts_there_are(house: House, browser: Browser) -> None:
    await house.broker.catalog.versions.put(version("theirs", account="other", version_id=OTHERS))
    who = await browser.log_in()
    assert (who["account"], who["allAccounts"], who["accounts"]) == ("default", True, ["default", "other"])
    assert (await browser.call("GET", f"{DATA}/dead-letters?account=other"))[0] == 200


# -- what pages are sent -----------------------------------------------------------------------


async def test_one_poll_serves_all_pages_and_ends_with_them(watched: Watched) -> None:
    view = View(holder("queue_details"), "default")
    streams = [watched.board.follow(lambda: _known(view)) for _ in range(20)]
    for stream in streams:
        await upto(stream, "everything")
    assert watched.board.looks <= 20  # one, unless the poll overtook a slow machine
    first = watched.board.looks
    for stream in streams:
        await upto(stream, "changes")
    assert watched.board.looks > first
    for stream in streams:
        await stream.aclose()
    ended = watched.board.looks
    again = watched.board.follow(lambda: _known(view))
    await upto(again, "everything")
    assert watched.board.looks == ended + 1
    await again.aclose()


async def test_only_what_has_changed_is_sent(watched: Watched) -> None:
    stream = watched.board.follow(lambda: _known(View(holder("queue_details"), "default")))
    await upto(stream, "everything")
    changes = await upto(stream, "changes")
    assert (changes["put"], changes["gone"], len(changes["history"])) == ({}, {}, 1)
    row = await watched.broker.catalog.versions.get(VERSION)
    assert row is not None
    await watched.broker.catalog.versions.put(replace(row.item, name="renamed"), revision=row.revision)
    while not changes["put"]:
        changes = await upto(stream, "changes")
    assert names(changes) == ["renamed"]
    await watched.broker.catalog.versions.delete(VERSION)
    while not changes["gone"]:
        changes = await upto(stream, "changes")
    assert changes["gone"] == {"functions": [VERSION]}
    await stream.aclose()


async def test_a_page_that_missed_a_look_is_sent_everything(watched: Watched) -> None:
    view = View(holder("queue_details"), "default")
    slow, quick = (watched.board.follow(lambda: _known(view)) for _ in range(2))
    await upto(slow, "everything")
    await upto(quick, "everything")
    await upto(quick, "changes")
    await upto(quick, "changes")
    assert names(await upto(slow, "everything")) == ["mine"]
    await slow.aclose()
    await quick.aclose()


async def test_what_ended_is_shown_by_the_minute(house: House, browser: Browser) -> None:
    await browser.log_in()
    await house.submit()
    await house.finish()
    async with listening(browser.session, f"{DATA}/live") as stream:
        said = (await stream.until("everything")).data
    [row] = said["put"]["functions"]
    assert (row["recent"]["perMinute"] > 0, len(said["points"])) == (True, 60)
    assert sum(point[1] for point in said["points"]) == 1
    status, found = await browser.call("GET", f"{DATA}/functions/{FUNCTION}/versions/{VERSION}/activity?minutes=60")
    assert (status, len(found["minutes"])) == (200, 1)


async def test_a_request_is_followed_to_its_end(house: House, browser: Browser) -> None:
    await browser.log_in()
    request_id = await house.submit()
    async with listening(browser.session, f"{DATA}/requests/{request_id}/events") as stream:
        assert (await stream.until("queued")).data["positionInQueue"] == 1
        await house.finish()
        await stream.until("done")
    _, receipt = await browser.call("GET", f"{DATA}/requests/{request_id}")
    assert (receipt["status"], len(receipt["attempts"])) == ("fulfilled", 1)


async def test_one_page_too_many_is_told_so(tmp_path: Path) -> None:
    async with opened(tmp_path, dashboard_viewers=1) as house, browsing(house.url) as browser:
        await browser.log_in()
        async with listening(browser.session, f"{DATA}/live") as stream:
            await stream.until("everything")
            assert (await browser.call("GET", f"{DATA}/live"))[0] == 503

        async def again() -> int:
            async with browser.session.get(f"{DATA}/live") as response:
                return response.status

        assert await eventually(again, lambda status: status == 200, within_s=HANG_S) == 200


# -- the page ----------------------------------------------------------------------------------


async def test_the_page_runs_nothing_but_its_own_files_and_is_in_no_frame(house: House, browser: Browser) -> None:
    async with browser.session.get("/dashboard") as response:
        page, policy = await response.text(), response.headers["Content-Security-Policy"]
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=|https?://", page)
    for link in re.findall(r'(?:href|src)="([^"]+)"', page):
        async with browser.session.get(f"/{link}") as response:
            assert response.status == 200, link
            assert response.headers["Content-Security-Policy"] == policy
            tag = response.headers["ETag"]
        async with browser.session.get(f"/{link}", headers={"If-None-Match": tag}) as response:
            assert response.status == 304, link


async def test_nothing_but_the_pages_files_is_served(browser: Browser) -> None:
    for name in ("../routes.py", "%2e%2e/routes.py", "vendor", "vendor/preact.LICENSE.txt", ""):
        async with browser.session.get(f"/dashboard/files/{name}") as response:
            assert response.status in (401, 404), name


async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    async with opened(tmp_path, dashboard=False) as house:
        for path in ("/dashboard", SESSION, f"{DATA}/live"):
            async with house.client.get(path) as response:
                assert response.status == 404


def test_vendored_files_are_those_that_were_fetched() -> None:
    pinned = {name: digest for library in vendored.LIBRARIES for _, name, digest in library.files}
    assert {path.name: vendored.sha256(path) for path in vendored.FOLDER.iterdir()} == pinned


def test_a_page_served_over_tls_by_a_proxy_is_its_own_by_the_public_url() -> None:
    sessions = Sessions(ApiSettings(public_url="https://fnq.example/"), SECRET)
    request = make_mocked_request("POST", SESSION, headers={"Origin": "https://fnq.example", "Host": "inside:8080"})
    sessions.require_own_page(request, None)
    response = web.Response()
    sessions.give(request, response, sessions.begin("key"))
    assert "Secure" in response.headers.get("Set-Cookie", "") or response.cookies["__Host-fnqueue-session"]["secure"]
