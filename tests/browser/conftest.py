"""A real Chromium, and pages in it that must give no cause for complaint."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from infra.local import binaries
from tests.unit.test_server import KEY

WITHIN_MS = 30_000.0
# What the policy forbids is said to the document alone.
_TELL_VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) =>
  console.error("policy", event.violatedDirective, event.blockedURI, event.sourceFile, event.lineNumber));
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One page in a browser of its own. `faults` is all that it complained of."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)

    async def log_in(self, key: str = KEY) -> None:
        await self.page.goto(f"{self.url}/dashboard")
        await self.page.get_by_label("API key").fill(key)
        await self.page.keyboard.press("Enter")

    async def go(self, place: str) -> None:
        await self.page.evaluate("(place) => { location.hash = `#/${place}`; }", place)

    def heading(self, name: str) -> Any:
        return expect(self.page.get_by_role("heading", level=1, name=name))


Visiting = Callable[..., AbstractAsyncContextManager[Visit]]


@pytest.fixture(scope="session")
async def chromium() -> AsyncIterator[Browser]:
    binaries.ensure([binaries.BROWSER])
    expect.set_options(timeout=WITHIN_MS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=binaries.program(binaries.BROWSER),
            args=["--no-sandbox", "--disable-dev-shm-usage"],  # it runs as root, and shows what we made
            timeout=WITHIN_MS,
        )
        yield browser
        await browser.close()


@pytest.fixture
def visiting(chromium: Browser) -> Visiting:
    @asynccontextmanager
    async def visit(url: str, *, expected: Sequence[str] = (), **options: Any) -> AsyncIterator[Visit]:
        """Fails for whatever the page complains of, but for what holds one of `expected`."""
        context = await chromium.new_context(**options)
        context.set_default_timeout(WITHIN_MS)
        await context.add_init_script(_TELL_VIOLATIONS)
        page = await context.new_page()
        found = Visit(page=page, url=url)

        def note(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                found.faults.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: found.faults.append(str(error)))
        try:
            yield found
        finally:
            await context.close()
        assert [fault for fault in found.faults if not any(word in fault for word in expected)] == []

    return visit
