"""Pages whose blocks are run as they stand, each page as one shell against `fnqueue dev`, and say what they say."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest

from tests.e2e import dev
from tests.e2e.conftest import Site
from tests.pages import DOCS, REPOSITORY, assert_told, blocks, script

PAGES = [
    REPOSITORY / "README.md",
    DOCS / "api.md",
    DOCS / "from-celery.md",
    DOCS / "from-nvcf.md",
    DOCS / "scaling.md",
]
# A bound for what hangs, on the slowest machine.
TIMEOUT_S = 180.0
# `make run` prints URL, key and function, and the pages say so. `fnqueue` and `python` are this environment's.
PREPARATION = """
# What they write ends its line, as on a terminal.
curl() {{ command curl -sS "$@" && echo; }}
fnqueue() {{ "{python}" -P -m fnqueue "$@" && echo; }}
python() {{ "{python}" -P "$@"; }}
read -r FUNCTION VERSION < <(curl -sS "$URL/v2/nvcf/functions" -H "Authorization: Bearer $KEY" | "{python}" -c '
import json, sys
[echo] = [each for each in json.load(sys.stdin)["functions"] if each["name"] == "echo"]
print(echo["id"], echo["versionId"])')
export FUNCTION VERSION
"""


@pytest.mark.parametrize("site", ["embedded"], indirect=True, scope="session")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
async def test_the_page_tells_what_happens(site: Site, page: Path, tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "examples" / "ocr" / "receipt.png", tmp_path)
    shown = blocks(page)
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        PREPARATION.format(python=sys.executable) + script(shown),
        cwd=tmp_path,
        env=dev.environment(
            URL=site.url,
            KEY=site.key,
            FNQUEUE_URL=site.url,
            FNQUEUE_API_KEY=site.key,
            XDG_CONFIG_HOME=str(tmp_path),
            PYTHONPATH=str(REPOSITORY),
        ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, output.decode()
    assert_told(shown, output.decode())
