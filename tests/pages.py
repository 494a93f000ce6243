"""Code on the pages for readers: README.md and docs/. A block is run by a test, or says above itself why not:

    <!-- not run: needs a cluster -->

Other marks above a block: `<!-- file: NAME -->`, its text is a file that later blocks use; `<!-- server -->`, it goes
on running in a terminal of its own, and is there once it has told how to stop it; `<!-- celery -->`, a test of its own
runs it on Celery. A block without a language below one that is run is what that one writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
RUN = ("sh", "python")
NEXT = "--- next block ---"

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_VARIES = re.compile(
    rf"{_ID}|\b[0-9a-f]{{8}}-…|(?<=dur=)[\d.]+|\d{{4}}-\d\d-\d\dT[\d:.]+Z|http://127\.0\.0\.1:\d+|\d+\.\d+|…"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`said` is what the page shows below it, '' if nothing. `line` is that of the page."""

    line: int
    language: str
    code: str
    said: str
    kind: str
    detail: str

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.kind in ("", "server")


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = list(_BLOCK.finditer(text))
    made = []
    for block, after in zip(found, [*found[1:], None], strict=False):
        kind, _, detail = (block["mark"] or "").partition(": ")
        is_answered = after is not None and after["language"] == "" and block["language"] != "" and not after["mark"]
        made.append(
            Block(
                line=text.count("\n", 0, block.start("code")),
                language=block["language"],
                code=block["code"],
                said=after["code"] if after is not None and is_answered else "",
                kind=kind,
                detail=detail,
            )
        )
    return made


def pages() -> list[Path]:
    return [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "decisions"),
    ]


def script(shown: Sequence[Block]) -> str:
    """The blocks as one program for bash, which ends at the first command that fails."""
    return "\n".join(["set -eu", *_commands(shown)])


def _commands(shown: Sequence[Block]) -> Iterator[str]:
    for block in shown:
        if block.kind == "file":
            yield f"cat > {block.detail} <<'END_OF_FILE'\n{block.code}END_OF_FILE"
        elif block.is_run:
            said = f"echo; echo {NEXT!r}"
            if block.language == "python":
                yield f"python - <<'END_OF_PYTHON'\n{block.code}END_OF_PYTHON\n{said}"
            elif block.kind == "server":
                # A process group of its own, so that all of it is told to stop.
                yield f"set -m; ({block.code.strip()}) >server.txt 2>&1 &\nSERVER=$!; set +m"
                yield "trap 'kill -TERM -- -$SERVER; wait $SERVER || true' EXIT"
                yield f"until grep -q Ctrl-C server.txt; do kill -0 $SERVER; sleep 0.1; done; cat server.txt; {said}"
            else:
                yield f"{block.code}{said}"


def assert_told(shown: Sequence[Block], output: str) -> None:
    """What the script wrote is what the page shows, block by block."""
    written = output.replace("\r\n", "\n").split(f"\n{NEXT}\n")
    run = [block for block in shown if block.is_run]
    assert len(written) == len(run) + 1, output
    for block, lines in zip(run, written, strict=False):
        assert_shows(lines, block.said)


def assert_shows(output: str, page: str) -> None:
    """The page's lines are in the output, in their order. `…` stands for anything, and so do IDs, times, fractions and
    ports; empty lines and what is around a line do not count."""
    lines = iter(output.splitlines())
    for shown in filter(str.strip, page.splitlines()):
        pattern = re.compile(".*".join(re.escape(part) for part in _VARIES.split(shown.strip())))
        assert any(pattern.fullmatch(line.strip()) for line in lines), f"{shown!r} is not, or not there, in:\n{output}"
