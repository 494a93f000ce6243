"""The Celery side of docs/from-celery.md, run by Celery: its broker in memory, its worker in the same process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.e2e import dev
from tests.pages import DOCS, NEXT, assert_shows, blocks

LIMIT_S = 120.0
IN_MEMORY = {'broker="amqp://"': 'broker="memory://"', 'backend="redis://"': 'backend="cache+memory://"'}
# The page's first block is the module that the others import.
PROGRAM = f"""
import sys
from pathlib import Path

from celery.contrib.testing.worker import start_worker

from captions import app

with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=60):
    for block in sys.argv[1:]:
        exec(compile(Path(block).read_text(), block, "exec"), {{}})
        print("\\n" + {NEXT!r})
"""


async def test_celerys_side_says_what_the_page_says(tmp_path: Path) -> None:
    tasks, *callers = [block for block in blocks(DOCS / "from-celery.md") if block.kind == "celery"]
    module = tasks.code
    for url, in_memory in IN_MEMORY.items():
        assert url in module
        module = module.replace(url, in_memory)
    (tmp_path / "captions.py").write_text(module)
    files = [tmp_path / f"block{number}.py" for number in range(len(callers))]
    for path, block in zip(files, callers, strict=True):
        path.write_text(block.code)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *map(str, files), cwd=tmp_path, env=dev.environment(),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    *written, _ = output.decode().split(f"\n{NEXT}\n")
    assert len(written) == len(callers) > 0
    for block, lines in zip(callers, written, strict=True):
        assert block.said
        assert_shows(lines, block.said)
