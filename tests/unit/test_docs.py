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


def test_the_metrics_page_is_what_the_code_says() -> None:
    assert docs.DOCS.joinpath("metrics.md").read_text() == docs.metrics_page(), "run: make docs"


def test_the_page_of_commands_is_what_they_say_themselves() -> None:
    assert docs.DOCS.joinpath("cli.md").read_text() == docs.cli_page(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_what_is_there(page: Path) -> None:
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["promises.md", "security.md"])
def test_each_test_and_file_that_a_page_builds_on_is_there(name: str) -> None:
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    page = (REPOSITORY / "docs" / name).read_text()
    tests = set(re.findall(r"`(test_\w+)", page))
    files = set(re.findall(r"`([\w/]+/[\w.]+\.(?:py|txt|json|conf))`", page)) - {"build/sbom.json"}
    assert tests
    assert files
    assert [test for test in sorted(tests) if f"def {test}(" not in sources] == []
    assert [file for file in sorted(files) if not (REPOSITORY / file).exists()] == []


def test_each_mutant_that_proves_a_promise_is_there() -> None:
    sources = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    page = (REPOSITORY / "docs" / "promises.md").read_text()
    cases = re.findall(r"`(?:test_a_mutant_is_caught)?\[([^\]]+)\]", page)
    assert [case for case in cases if f'"{case}": (' not in sources] == []


def test_each_threat_has_a_control_and_a_test_or_says_why_not() -> None:
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (.*) \|$", (REPOSITORY / "docs" / "security.md").read_text(), re.MULTILINE
    )
    threats = [(control, test) for _, control, test in rows if (control, test) != ("Control", "Test")]
    assert len(threats) > 20
    bare = [control for control, test in threats if "test_" not in test and not re.search("none yet|`make ", control)]
    assert bare == []


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
