from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra import docs

REPOSITORY = Path(__file__).parents[2]
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def test_the_settings_page_is_what_the_code_says() -> None:
    assert docs.DOCS.joinpath("settings.md").read_text() == docs.settings_page(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_what_is_there(page: Path) -> None:
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_test_that_proves_a_promise_is_there() -> None:
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    page = (REPOSITORY / "docs" / "promises.md").read_text()
    named = set(re.findall(r"`(test_\w+)", page))
    assert named
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
    cases = re.findall(r"`(?:test_a_mutant_is_caught)?\[([^\]]+)\]", page)
    assert [case for case in cases if f'"{case}": (' not in sources] == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
