"""Every block of code on a page is run by a test, or says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e import test_pages
from tests.pages import DOCS, REPOSITORY, RUN, assert_shows, blocks, pages, script

# Pages that have a test of their own, which runs all that is not marked.
OWN = {
    REPOSITORY / "README.md": ("tests/e2e/test_client_page.py", "tests/e2e/test_pages.py"),
    DOCS / "cli.md": ("tests/e2e/test_management_commands.py",),
    DOCS / "client.md": ("tests/e2e/test_client_page.py",),
    DOCS / "function-authors.md": ("tests/e2e/test_function_authors.py",),
    DOCS / "quickstart.md": ("tests/e2e/test_quickstart.py",),
    DOCS / "webhooks.md": ("tests/unit/test_webhooks.py",),
}
PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(REPOSITORY).as_posix())
_LANGUAGES = {*RUN, "", "toml", "json", "yaml", "text"}
_INDENTED = re.compile(r"^(?![ \t]*(?:[-*]|\d+\.) |[ \t]).*\n\n(?:    \S.*\n)+", re.MULTILINE)


@PAGES
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    tested = page in OWN or page in test_pages.PAGES
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language in _LANGUAGES, where
        assert block.kind in ("", "not run", "file", "server", "celery"), where
        if block.kind in ("not run", "file"):
            assert block.detail, where
        else:
            assert tested or block.language not in RUN, f"{where}: run it in tests/e2e/test_pages.py, or say why not"


@PAGES
def test_code_is_in_fences(page: Path) -> None:
    """What is indented only would escape. How a command is called is no command."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [each for each in _INDENTED.findall(text) if "[OPTIONS]" not in each] == []


def test_the_test_of_a_page_reads_it() -> None:
    for page, tests in OWN.items():
        assert any(page.name in REPOSITORY.joinpath(test).read_text() for test in tests), page.name


def test_marks_files_and_answers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: a.txt -->\n```text\nhello\n```\n"
        "```sh\ncat a.txt\n```\n```\nhel…\n```\n"
        "<!-- not run: it would end the world -->\n```sh\nfalse\n```\n"
        "```python\nprint(1.5)\n```\n"
    )
    file, command, _, left_out, program = blocks(page)
    assert (file.kind, file.detail, file.is_run) == ("file", "a.txt", False)
    assert (command.said, command.is_run, command.line) == ("hel…\n", True, 5)
    assert (left_out.detail, left_out.is_run) == ("it would end the world", False)
    assert program.said == ""
    program_text = script(blocks(page))
    assert "cat > a.txt" in program_text
    assert "false" not in program_text


def test_what_varies_is_not_compared() -> None:
    assert_shows('{"id": "9a260b8a-8799-4223-9fc2-446c6b8a2eba", "s": 0.25}', '{"id": "9a260b8a-…", "s": 1.5}')
    assert_shows("one\ntwo\nthree", "one\nthree")
    with pytest.raises(AssertionError):
        assert_shows("three\none", "one\nthree")
