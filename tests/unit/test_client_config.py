from __future__ import annotations

from pathlib import Path

import pytest

from fnqueue import config
from fnqueue.errors import ConfigurationError


def load(home: Path, url: str | None = None, key: str | None = None, **environ: str) -> tuple[str, str]:
    found = config.load(url, key, environ={"XDG_CONFIG_HOME": str(home), **environ})
    return found.url, found.key


def written(home: Path, text: str) -> Path:
    path = home / "fnqueue" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_what_is_given_comes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    written(tmp_path, 'url = "https://file"\napi_key = "of-the-file"')
    assert load(tmp_path) == ("https://file", "of-the-file")
    assert load(tmp_path, FNQUEUE_URL="https://env/", FNQUEUE_API_KEY="of-env") == ("https://env", "of-env")
    assert load(tmp_path, "https://here", "mine", FNQUEUE_URL="https://env", FNQUEUE_API_KEY="of-env") == (
        "https://here",
        "mine",
    )


def test_without_a_url_it_is_this_machine(tmp_path: Path) -> None:
    assert load(tmp_path, key="k")[0] == config.DEFAULT_URL


def test_a_file_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, 'api_key = "named"')
    assert load(tmp_path / "elsewhere", FNQUEUE_CONFIG=str(path))[1] == "named"
    with pytest.raises(ConfigurationError, match="no such file"):
        load(tmp_path, key="k", FNQUEUE_CONFIG=str(tmp_path / "missing"))


@pytest.mark.parametrize("text", ["url = ", "url = 1", 'key = "typed wrong"'])
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    written(tmp_path, text)
    with pytest.raises(ConfigurationError, match=r"config\.toml"):
        load(tmp_path, key="k")


@pytest.mark.parametrize("url", ["ftp://host", "host:8080", "https://", "https://host?x=1", "https://[::1"])
def test_a_url_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="not a server's URL"):
        load(tmp_path, url, "k")


@pytest.mark.parametrize("key", ["two words", "a\nb", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be sent") as refused:
        load(tmp_path, key=key)
    assert key not in str(refused.value)


def test_who_has_no_key_is_told_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"FNQUEUE_API_KEY.*config\.toml"):
        load(tmp_path)


def test_a_configuration_does_not_show_its_key() -> None:
    assert "secret" not in repr(config.load("http://h", "secret", environ={}))
