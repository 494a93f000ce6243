from __future__ import annotations

from infra import docs


def test_the_settings_page_is_what_the_code_says() -> None:
    assert docs.DOCS.joinpath("settings.md").read_text() == docs.settings_page(), "run: make docs"
